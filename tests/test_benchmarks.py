"""What the CPU benchmark makes of numbers and of logs; nothing is measured here."""

import dataclasses

import jax
import pytest

import checkpoints_tools
from benchmarks import cpu_report, random_model, sweep_bench

ROW = "|   512 |     64 | {depth:6} |    1.024 |   500.00 |    {seconds} |   {speed} |"
TABLE = f"""
main: n_kv_max = 1024, n_batch = 512, n_ubatch = 512, flash_attn = 1, n_threads = 1

|    PP |     TG |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |
|-------|--------|--------|----------|----------|----------|----------|
====== tg_start for n_kv = 0
{ROW.format(depth=0, seconds="0.640", speed="100.00")}
====== tg_start for n_kv = 512
{ROW.format(depth=512, seconds="0.800", speed=" 80.00")}
"""


def test_sweep_table_is_read_among_other_lines():
    assert sweep_bench.parse(TABLE, 64) == {0: (500.0, 100.0), 512: (500.0, 80.0)}


@pytest.mark.parametrize(
    ("text", "predict", "message"),
    [
        (TABLE, 128, "must decode 128 tokens, got 64"),
        (TABLE.replace("flash_attn = 1", "flash_attn = 0"), 64, "flash attention"),
        ("error: unknown argument: -fa", 64, "must print a table"),
    ],
    ids=["tokens", "flash", "no table"],
)
def test_sweep_of_other_settings_is_refused(text, predict, message):
    with pytest.raises(RuntimeError, match=message):
        sweep_bench.parse(text, predict)


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (
            "loading\n/a/b.h:7: ASSERT(S > 0) failed\n#0  0x00 in ?? () at /a/c.c:30\n",
            "b.h:7: ASSERT(S > 0) failed",
        ),
        ("the process ended:\ncannot make a context\n\n", "cannot make a context"),
        ("", "nothing was said"),
    ],
    ids=["trace after it", "last line", "empty"],
)
def test_reason_of_an_end_is_found_in_its_log(log, reason):
    assert cpu_report.refusal(log) == reason


def _cell(depth, cache_type="f16", **engines):
    place = dict(model="x.gguf", cores=[0], cache_type=cache_type, depth=depth)
    return place | dict(cache_bytes_per_token=1000, weight_bytes=10**6, engines=engines)


def _engine(decode, prefill=100.0):
    return dict(prefill_tokens_per_second=prefill, decode_tokens_per_second=decode)


def test_an_engine_is_told_in_medians_and_bytes():
    cell = cpu_report.engine_cell([(90, 10), (110, 50), (500, 20)], step_bytes=10**8, plain_read=10**10)
    assert cell["prefill_tokens_per_second"] == 110 and cell["decode_runs"] == [10, 50, 20]
    assert cell["decode_tokens_per_second"] == 20
    assert (cell["decode_gb_per_second"], cell["share_of_plain_read"]) == (2.0, 0.2)


def test_slope_is_microseconds_per_1000_tokens():
    cells = [_cell(depth, ours=_engine(1 / (0.001 + 2e-6 * depth))) for depth in (0, 2000, 8000)]
    (row,) = cpu_report.slopes(cells, {"0": 1e9})
    assert row["engine"] == "ours"
    assert (row["us_per_1000_tokens"], row["plain_read_us"]) == (2000.0, 1000.0)


def test_a_depth_without_figures_does_not_bend_the_slope():
    cells = [_cell(depth, ours=_engine(1000.0), peer=dict(refuses="no")) for depth in (0, 2000)]
    assert [row["engine"] for row in cpu_report.slopes(cells, {"0": 1e9})] == ["ours"]


def test_ratios_are_ours_over_the_others_that_were_measured():
    engines = dict(ours=_engine(50.0), peer=_engine(100.0, prefill=50.0), other=dict(refuses="no"))
    assert cpu_report.ratios(engines) == dict(peer=dict(prefill=2.0, decode=0.5))
    assert cpu_report.ratios(dict(ours=dict(refuses="no"), peer=_engine(1.0))) == {}


def test_ours_is_compared_with_the_float16_cache_of_an_engine_that_refuses():
    refusing = _cell(512, "q8_0", ours=_engine(60.0), peer=dict(refuses="no"))
    cells = [refusing, _cell(512, ours=_engine(50.0), peer=_engine(100.0))]
    cells.append(_cell(2048, ours=_engine(1.0), peer=_engine(1.0)))
    cpu_report.add_ratios_to_f16(cells)
    assert refusing["ratios_to_f16"] == dict(peer=dict(prefill=1.0, decode=0.6))
    assert not any("ratios_to_f16" in cell for cell in cells if cell is not refusing)


def test_random_model_has_the_shapes_of_its_config_and_the_types_that_fit(tmp_path):
    mla = dataclasses.replace(random_model.BENCH.mla, q_lora_rank=256, kv_lora_rank=256, num_heads=2)
    moe = dataclasses.replace(random_model.BENCH.moe, num_experts=300, expert_hidden_dim=96)
    sizes = dict(vocab_size=4100, embed_dim=256, num_layers=2, dense_hidden_dim=512, mla=mla, moe=moe)
    config = dataclasses.replace(random_model.BENCH, norm_epsilon=2.0**-20, **sizes)
    path = tmp_path / "random.gguf"
    random_model.write(path, config, "q4_K")
    checkpoint = checkpoints_tools.load_gguf(path)
    assert checkpoint.config == config
    assert len(checkpoint.metadata["tokenizer.ggml.tokens"]) == 4100
    types = {name: info.type_name for name, info in checkpoint.file_tensors.items()}
    assert types["blk.1.ffn_gate_exps.weight"] == "q4_K"
    assert types["blk.1.ffn_down_exps.weight"] == "iq4_nl"  # rows of 96 weights
    assert types["blk.1.ffn_gate_inp.weight"] == "f32"
    assert all(jax.numpy.isfinite(leaf).all() for leaf in jax.tree.leaves(checkpoint.params))
