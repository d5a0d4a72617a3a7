"""The memory of published models, in every type of cache, against the table that ik_llama.cpp's rows give."""

import pytest
from synthetic import write_deepseek2

import checkpoints_tools
from mla_jax.cache import bytes_per_token
from mla_jax.config import RunConfig
from mla_jax.presets import PRESETS

# Bytes per token: of one layer's 576 numbers, and of all layers of V3, V2, V2-Lite and GLM-4.7-Flash.
LAYERS = {"deepseek-v3": 61, "kimi-k2": 61, "deepseek-v2": 60, "deepseek-v2-lite": 27, "glm-4.7-flash": 47}
ROWS = {
    "f32": 2304,
    "f16": 1152,
    "bf16": 1152,
    "q8_0": 612,
    "q8_KV": 584,
    "q6_0": 468,
    "q5_1": 432,
    "q5_0": 396,
    "q4_1": 360,
    "q4_0": 324,
    "iq4_nl": 324,
    "fp8_e4m3": 576,
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("cache_type", ROWS)
def test_bytes_per_token(name, cache_type):
    expected = LAYERS[name] * ROWS[cache_type]
    assert bytes_per_token(PRESETS[name], RunConfig(cache_type=cache_type)) == expected


def test_a_preset_is_planned_without_a_file():
    text = checkpoints_tools.plan("deepseek-v3", ctx_size=1024, run=RunConfig())
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    assert rows["weights"] == ["671.03", "billion"] and rows["context"] == ["1,024", "tokens"]
    assert rows["f16"] == ["70,272", "68.6"]
    assert rows["q8_0"] == ["37,332", "36.5"]
    assert rows["q4_0"] == ["19,764", "19.3"]


def test_the_rotary_part_counts_in_its_own_type():
    mixed = RunConfig(cache_type="q4_0", cache_type_rope="f16")
    assert bytes_per_token(PRESETS["deepseek-v3"], mixed) == 61 * (288 + 128)


def test_a_file_is_planned_and_types_that_do_not_fit_are_left_open(tmp_path):
    write_deepseek2(tmp_path / "nano.gguf", layers=2)  # rotary part of 16
    text = checkpoints_tools.plan(tmp_path / "nano.gguf", ctx_size=None, run=RunConfig())
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    assert rows["f16"] == ["192", "0.8"] and rows["q8_0"] == ["-", "-"] and rows["context"][0] == "4,096"
    assert rows["weights"][1] == "MiB"
