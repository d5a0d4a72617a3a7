"""Peers of the GPU benchmark: what they are asked for, by stand-ins that compute it from pages in PyTorch."""

import dataclasses
import sys
import types

import pytest

from benchmarks import gpu_cases, gpu_measure, gpu_peers
from benchmarks.gpu_cases import OURS

torch = pytest.importorskip("torch", reason="needs the extra `oracle`")

B, S, N, RANK, ROPE, SCALE = 2, 130, 3, 32, 16, 0.2
PEERS = gpu_peers.decode_peers(B, S, N, RANK, ROPE, num_sets=2, sm_scale=SCALE)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setattr(gpu_peers, "_torch", lambda: (torch, "cpu"))


def _attend(q_BNC, pool_ZSC, table_BM, lengths_B):
    """Attends as the definition says, to pages in the order of the table."""
    results = []
    for q_NC, pages_M, length in zip(q_BNC, table_BM.long(), lengths_B, strict=True):
        key_SC = pool_ZSC[pages_M].reshape(-1, q_NC.shape[1])[: int(length)].float()
        prob_NS = torch.softmax(q_NC.float() @ key_SC.T * SCALE, dim=-1)
        results.append(prob_NS @ key_SC[:, :RANK])
    return torch.stack(results).to(q_BNC.dtype)


def _flash_mla(wrong):
    def attend(q, pool, table, lengths, rank, plan, splits, *, softmax_scale, causal=False):
        assert (rank, plan, splits, softmax_scale, causal) == (RANK, "plan", None, SCALE, False)
        assert pool.shape[1:] == (64, 1, RANK + ROPE) and table.dtype == lengths.dtype == torch.int32
        return _attend(q[:, 0], pool[:, :, 0], table, lengths)[:, None] + wrong, None

    return dict(
        get_mla_metadata=lambda lengths, heads, kv_heads: ("plan", None), flash_mla_with_kvcache=attend
    )


def _flashinfer(wrong):
    class Wrapper:
        def __init__(self, workspace):
            assert workspace.dtype == torch.int8

        def plan(self, of_q, of_pages, pages, lengths, heads, rank, rope, page_size, causal, scale, *types):
            assert (heads, rank, rope, page_size, causal, scale) == (N, RANK, ROPE, 64, False, SCALE)
            assert of_q.tolist() == [0, 1, 2] and of_pages.tolist() == [0, 3, 6]
            assert set(types) == {torch.bfloat16}
            self._table, self._lengths = pages.view(B, 3), lengths

        def run(self, q, q_rope, latent, rope):
            assert all(part.is_contiguous() for part in (q, q_rope, latent, rope))
            join = lambda *parts: torch.cat(parts, dim=-1)
            return _attend(join(q, q_rope), join(latent, rope), self._table, self._lengths) + wrong

    return dict(BatchMLAPagedAttentionWrapper=Wrapper)


def _vllm(wrong):
    def decode(q, k, v, out, lse, table, lengths, partial, splits, scale, page_size, *, is_mla, **scales):
        assert partial.shape == (B, N, splits, RANK + 1) and lse.shape == (B, N)
        assert (scale, page_size, is_mla, v.shape[-1]) == (SCALE, 64, True, RANK)
        assert {name: float(value) for name, value in scales.items()} == dict(k_scale=1, v_scale=1)
        out.copy_(_attend(q, k[:, :, 0], table, lengths) + wrong)

    return dict(decode_attention_fwd=decode)


STAND_INS = dict(
    flash_mla=("flash_mla", _flash_mla),
    flashinfer=("flashinfer.mla", _flashinfer),
    vllm=("vllm.v1.attention.ops.triton_decode_attention", _vllm),
)


def _install(monkeypatch, name, content):
    for count in range(1, name.count(".") + 2):
        package = ".".join(name.split(".")[:count])
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    vars(sys.modules[name]).update(content)


@pytest.mark.parametrize("library", STAND_INS)
def test_a_library_is_asked_for_the_rows_of_its_pages(monkeypatch, library):
    name, stand_in = STAND_INS[library]
    _install(monkeypatch, name, stand_in(0))
    seconds = gpu_peers.seconds_per_call(PEERS[library], calls=3, repeats=2)
    assert len(seconds) == 2 and min(seconds) > 0
    call = PEERS[library]()
    first, second, third = (call(index).clone() for index in range(3))
    assert first.numel() == B * N * RANK and (first == third).all() and (first != second).any()


@pytest.mark.parametrize("library", STAND_INS)
def test_a_library_that_computes_something_else_is_not_timed(monkeypatch, library):
    name, stand_in = STAND_INS[library]
    _install(monkeypatch, name, stand_in(0.5))
    with pytest.raises(ValueError, match="must agree with PyTorch's attention"):
        gpu_peers.seconds_per_call(PEERS[library], calls=1, repeats=1)


def test_a_pool_that_vllm_cannot_address_is_not_given_to_it(monkeypatch):
    name, stand_in = STAND_INS["vllm"]
    _install(monkeypatch, name, stand_in(0))
    rows = gpu_peers._draw_rows(B, S, N, RANK, ROPE, num_sets=1, sm_scale=SCALE)
    large = torch.empty(2**31, dtype=torch.bfloat16, device="meta")
    with pytest.raises(ValueError, match="fewer than 2\\^31 numbers, got 2147483648"):
        gpu_peers._by_vllm(dataclasses.replace(rows, pools=[large]))


def test_flash_mla_is_found_in_vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_mla", None)  # not installed
    _install(monkeypatch, "vllm.third_party.flashmla.flash_mla_interface", _flash_mla(0))
    assert PEERS["flash_mla"]()(0).shape == (B, 1, N, RANK)


def test_pages_are_shuffled_and_the_last_stays_the_last():
    rows = gpu_peers._draw_rows(2, 64 * 40 + 1, N, RANK, ROPE, num_sets=1, sm_scale=SCALE)
    assert rows.table.flatten().sort().values.tolist() == list(range(82))
    assert rows.table[:, -1].tolist() == [40, 81] and rows.table[0, :40].tolist() != list(range(40))


def test_prefill_is_causal_attention():
    (peer,) = gpu_peers.prefill_peers(5, 2, 24, 16, sm_scale=SCALE).values()
    torch.manual_seed(0)
    found = peer()(0).float()
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, width, dtype=torch.bfloat16).float() for width in (24, 24, 16))
    score = (q @ k.transpose(-1, -2) * SCALE).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    wanted = torch.softmax(score, dim=-1) @ v
    assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_those_of_a_case_are_measured_and_one_that_is_not_there_is_recorded(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    (case,) = gpu_cases.decode_cases([2], [70], [16], ["bf16"], implementation="reference", cold_bytes=10**6)
    ceilings = gpu_measure.Ceilings(copy=1e9, product=1e12)
    settings = dict(memory=None, calls=1, repeats=1)
    ways = gpu_measure.measure(case, ceilings, **settings, libraries=["torch", "vllm"])["ways"]
    assert ways["torch"]["seconds"] > 0 and ways["vllm"]["skipped"].startswith("ModuleNotFoundError: ")
    assert "flashinfer" not in ways
    assert list(gpu_measure.measure(case, ceilings, **settings, has_peers=False)["ways"]) == [OURS]
