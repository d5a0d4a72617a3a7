"""Peers of the GPU benchmark that compute by PyTorch, with operands of their own.

torch      PyTorch's own attention: decode over rows in order, since it reads no pages
flash_mla  FlashMLA, by itself or out of vLLM's wheel: decode
flashinfer FlashInfer, whose kernels are compiled by the first call: decode
vllm       vLLM's Triton kernel for MLA: decode

Caches are bfloat16. A peer of decode must agree with PyTorch's attention before it is timed. The calls of a
run are captured in a CUDA graph, which launches them as one, as a `jit` does. PyTorch takes the memory that
JAX has left, a quarter by default, and gives it back after each peer.
"""

import dataclasses
import importlib
import time
from collections.abc import Callable
from typing import Any

from benchmarks import machine

LIBRARIES = TORCH, FLASH_MLA, FLASHINFER, VLLM = "torch", "flash_mla", "flashinfer", "vllm"

Call = Callable[[int], Any]  # number of the call -> result
Peer = Callable[[], Call]  # draws operands

_PAGE_SIZE = 64
_TOLERANCE = 0.02  # of the largest number
_SLOTS_OF_A_SPLIT = 512  # and two splits for each multiprocessor, as vLLM chooses them
_WORKSPACE_BYTES = 128 << 20


def decode_peers(batch: int, context: int, heads: int, rank: int, rope: int, **sizes) -> dict[str, Peer]:
    """Returns the peers of absorbed decode over pages, by library.

    Args:
      batch: sequences.
      context: cached tokens of each.
      heads: query heads.
      rank: width of the latent, which is the value.
      rope: width of the rope part of keys.
      **sizes: `num_sets` of pages that calls take turns with, and `sm_scale`.
    """
    builders = {TORCH: _by_torch, FLASH_MLA: _by_flash_mla, FLASHINFER: _by_flashinfer, VLLM: _by_vllm}

    def peer(build):
        def make():
            rows = _draw_rows(batch, context, heads, rank, rope, **sizes)
            call = build(rows)
            if build is not _by_torch:
                _check(call(0), _by_torch(rows)(0))
            return call

        return make

    return {name: peer(build) for name, build in builders.items()}


def prefill_peers(queries: int, heads: int, qk: int, value: int, *, sm_scale: float) -> dict[str, Peer]:
    """Returns the peers of causal attention: keys of `qk`, values of `value` numbers."""

    def make():
        torch, device = _torch()
        draw = lambda width: torch.randn(1, heads, queries, width, dtype=torch.bfloat16, device=device)
        q, k, v = draw(qk), draw(qk), draw(value)
        attend = torch.nn.functional.scaled_dot_product_attention
        return lambda index: attend(q, k, v, is_causal=True, scale=sm_scale)

    return {TORCH: make}


def seconds_per_call(peer: Peer, *, calls: int, repeats: int) -> list[float]:
    """Times runs of `calls` calls, without the first run."""
    torch, device = _torch()
    try:
        return _seconds_per_call(torch, device, peer, calls, repeats)
    finally:
        if device == "cuda":
            torch.cuda.empty_cache()


def _seconds_per_call(torch, device, peer, calls, repeats):
    with torch.inference_mode():
        call, seconds = peer(), []
        run = _captured(torch, call, calls) if device == "cuda" else lambda: [call(i) for i in range(calls)]
        for _ in range(repeats + 1):
            began = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append((time.perf_counter() - began) / calls)
    return seconds[1:]


def versions() -> dict[str, str]:
    """Returns the version of each library that is installed as a package."""
    packages = zip(LIBRARIES, ("torch", "flash_mla", "flashinfer-python", "vllm"), strict=True)
    found = {name: machine.version(package) for name, package in packages}
    return {name: version for name, version in found.items() if version is not None}


def _torch():
    torch = importlib.import_module("torch")
    return torch, "cuda" if torch.cuda.is_available() else "cpu"


def _captured(torch, call, calls):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(0)  # what is compiled or planned by a first call is not to be captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # what other threads do is theirs
        for i in range(calls):
            call(i)
    return graph.replay


def _check(found, wanted):
    found, wanted = found.reshape(wanted.shape).float(), wanted.float()
    difference = float((found - wanted).abs().max() / wanted.abs().max())
    if not difference < _TOLERANCE:
        raise ValueError(f"it must agree with PyTorch's attention, got a difference of {difference:.3g}")


# --- decode ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rows:
    """Queries and cached rows, tensors of PyTorch.

    Attributes:
      q: [B, 1, N, R + P].
      pools: each [Z, 64, 1, R + P]; calls take turns with them.
      table: i32[B, M], pages of each sequence, which are all in one piece of the pool; the last is the last.
      lengths: i32[B], each S.
      rank: R.
      scale: of scores.
    """

    q: Any
    pools: list
    table: Any
    lengths: Any
    rank: int
    scale: float

    def pool(self, index: int):
        """Returns the pool of a call."""
        return self.pools[index % len(self.pools)]


def _draw_rows(B, S, N, rank, rope, *, num_sets, sm_scale):
    torch, device = _torch()
    M, place = -(-S // _PAGE_SIZE), dict(device=device)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.bfloat16, **place)
    last = torch.tensor([M - 1], **place)
    orders = [torch.cat([torch.randperm(M - 1, **place), last]) + b * M for b in range(B)]
    return _Rows(
        q=draw(B, 1, N, rank + rope),
        pools=[draw(B * M, _PAGE_SIZE, 1, rank + rope) for _ in range(num_sets)],
        table=torch.stack(orders).int(),
        lengths=torch.full((B,), S, dtype=torch.int32, **place),
        rank=rank,
        scale=sm_scale,
    )


def _by_torch(rows):
    """Takes heads for queries of the one head of the cache; the order of full pages changes nothing."""
    torch, _ = _torch()
    B, _, _, width = rows.q.shape
    S = int(rows.lengths[0])

    def call(index):
        k = rows.pool(index).view(B, 1, -1, width)[:, :, :S]
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(rows.q, k, k[..., : rows.rank], scale=rows.scale)

    return call


def _by_flash_mla(rows):
    try:
        library = importlib.import_module("flash_mla")
    except ModuleNotFoundError:
        library = importlib.import_module("vllm.third_party.flashmla.flash_mla_interface")
    plan, splits = library.get_mla_metadata(rows.lengths, rows.q.shape[2], 1)

    def call(index):
        about = rows.table, rows.lengths, rows.rank, plan, splits
        return library.flash_mla_with_kvcache(rows.q, rows.pool(index), *about, softmax_scale=rows.scale)[0]

    return call


def _by_flashinfer(rows):
    mla = importlib.import_module("flashinfer.mla")
    torch, device = _torch()
    B, _, N, width = rows.q.shape
    count = lambda step: torch.arange(0, (B + 1) * step, step, dtype=torch.int32, device=device)
    plan = mla.BatchMLAPagedAttentionWrapper(torch.empty(_WORKSPACE_BYTES, dtype=torch.int8, device=device))
    pages = count(1), count(rows.table.shape[1]), rows.table.flatten(), rows.lengths
    types = rows.q.dtype, rows.q.dtype
    plan.plan(*pages, N, rows.rank, width - rows.rank, _PAGE_SIZE, False, rows.scale, *types)
    q = rows.q[:, 0]
    q_latent, q_rope = q[..., : rows.rank].contiguous(), q[..., rows.rank :].contiguous()
    pools = [pool[:, :, 0] for pool in rows.pools]
    parts = [(pool[..., : rows.rank].contiguous(), pool[..., rows.rank :].contiguous()) for pool in pools]
    return lambda index: plan.run(q_latent, q_rope, *parts[index % len(parts)])


def _by_vllm(rows):
    decode = importlib.import_module("vllm.v1.attention.ops.triton_decode_attention")
    torch, device = _torch()
    if (size := rows.pools[0].numel()) >= 2**31:
        raise ValueError(f"its places have 32 bits: the pool must have fewer than 2^31 numbers, got {size}")
    q = rows.q[:, 0]
    B, N, _ = q.shape
    most = 2 * torch.cuda.get_device_properties(0).multi_processor_count if device == "cuda" else 2
    splits = min(1 << (max(1, int(rows.lengths[0]) // _SLOTS_OF_A_SPLIT) - 1).bit_length(), most)
    partial = torch.empty(B, N, splits, rows.rank + 1, dtype=torch.float32, device=device)
    out, lse = torch.empty_like(q[..., : rows.rank]), torch.empty(B, N, dtype=q.dtype, device=device)
    one = torch.ones((), device=device)  # it would be copied from the host, which no graph captures
    scales = dict(k_scale=one, v_scale=one)

    def call(index):
        pool = rows.pool(index)
        results = out, lse, rows.table, rows.lengths, partial, splits, rows.scale, _PAGE_SIZE
        decode.decode_attention_fwd(q, pool, pool[..., : rows.rank], *results, **scales, is_mla=True)
        return out

    return call
