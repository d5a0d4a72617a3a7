"""Adapters in the forms that models have weights in: `kv_b`, or `k_b` and `v_b`; gate and up apart, or one.

An adapter is two factors, and both forms are the same numbers in another order, so a change of form is exact:
factors are cut, put side by side, or swapped where a weight is transposed.
"""

import math
from collections.abc import Callable, Container, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from checkpoints_tools import layout
from checkpoints_tools.gguf_file import GGUFError
from mla_jax import lora as lora_lib
from mla_jax.config import MLAConfig, ModelConfig
from mla_jax.lora import Adapter, Lora

_Part = Adapter | None


def known_shapes(config: ModelConfig) -> dict[str, layout.Shape]:
    """Returns what adapters can be of, in every form: GGUF name -> shape of a matrix."""
    kinds = ("attn_k_b", "ffn_gate_up_exps")
    forms = {f"blk.{layer}.{kind}.weight" for layer in range(config.num_layers) for kind in kinds}
    shapes = layout.expected_shapes(config, ()) | layout.expected_shapes(config, forms)
    return {name: shape for name, shape in shapes.items() if len(shape) > 1 and name != "token_embd.weight"}


def check_shapes(
    path: str, name: str, a: layout.Shape, b: layout.Shape, shapes: Mapping[str, layout.Shape]
) -> None:
    """Checks the shapes of an adapter's factors before they are read.

    Args:
      path: the file, for messages.
      name: GGUF name of the tensor that it is of.
      a: shape of the factor that is to be [..., r, in].
      b: of the one that is to be [..., out, r].
      shapes: `known_shapes` of the model.

    Raises:
      GGUFError: if there is no such tensor, or the shapes do not fit it.
    """
    if name not in shapes:
        raise GGUFError(f"{path}: {name!r} must be a matrix that this model multiplies by, it is none.")
    *lead, height, width = shapes[name]
    rank, largest = a[-2] if len(a) > 1 else 0, _largest_rank(height, width)
    if a != (*lead, rank, width) or b != (*lead, height, rank) or not 1 <= rank <= largest:
        lead = "".join(f"{size}, " for size in lead)
        raise GGUFError(
            f"{path}: the adapter of {name!r} must have factors a [{lead}r, {width}] and "
            f"b [{lead}{height}, r] of a rank r in [1, {largest}], got {list(a)} and {list(b)}."
        )


def check_savable(adapters: Mapping[str, Adapter], alpha: float) -> None:
    """Checks what is to be written, so that there is no file of an adapter that cannot be loaded.

    Args:
      adapters: by GGUF name.
      alpha: of all of them.

    Raises:
      ValueError: for no adapters, an alpha or a rank that loading refuses, or a number that is not finite.
    """
    if not adapters:
        raise ValueError("an adapter must be of at least one weight, got none.")
    if not lora_lib.is_alpha(alpha):
        raise ValueError(f"alpha must be a number {lora_lib.ALPHAS}, got {alpha}.")
    for name, adapter in adapters.items():
        largest = _largest_rank(adapter.b.shape[-2], adapter.a.shape[-1])
        if not 1 <= adapter.rank <= largest:
            raise ValueError(
                f"the rank of the adapter of {name!r} must be in [1, {largest}], got {adapter.rank}."
            )
    check_finite(adapters)


def check_strength(lora: Lora, strength: float) -> None:
    """Checks what the updates of an adapter are to be multiplied by.

    Raises:
      ValueError: if it is not finite, or makes factors of what is not.
    """
    if not math.isfinite(strength):
        raise ValueError(f"the scale of an adapter must be finite, got {strength}.")
    for name, adapter in lora.adapters.items():
        with np.errstate(over="ignore", invalid="ignore"):
            factor = np.float32(strength * lora.alpha / adapter.rank)
            is_finite = np.isfinite(np.asarray(adapter.b) * factor).all()
        if not is_finite:
            raise ValueError(
                f"the scale of an adapter must leave its factors finite, got {strength} for {name!r}."
            )


def check_finite(adapters: Mapping[str, Adapter]) -> None:
    """Checks that all numbers of adapters are finite.

    Raises:
      ValueError: if one is not.
    """
    for name, adapter in adapters.items():
        if not all(np.isfinite(np.asarray(part)).all() for part in (adapter.a, adapter.b)):
            raise ValueError(f"the adapter of {name!r} must be finite, it is not.")


@np.errstate(over="ignore")  # what is infinite then is refused by `check_finite`
def scaled(adapter: Adapter, factor: float) -> Adapter:
    """Returns an adapter of NumPy arrays that adds `factor` times as much."""
    return adapter if factor == 1 else Adapter(a=adapter.a, b=adapter.b * np.float32(factor))


@np.errstate(over="ignore", invalid="ignore")  # as above
def fit(adapters: Mapping[str, Adapter], config: ModelConfig, names: Container[str]) -> dict[str, Adapter]:
    """Brings adapters into the forms of the tensors at hand.

    Args:
      adapters: by GGUF name, of NumPy arrays; keys and shapes as in `known_shapes`.
      config: the model.
      names: GGUF names of its tensors. Where a weight is there in both forms, so is its adapter.

    Returns:
      The adapters of tensors in `names`. Those of another rank than before have factors that make up for it,
      since an adapter adds `alpha / rank * b @ a`.

    Raises:
      ValueError: for an adapter of a tensor that is there in no form, or two adapters of one weight.
    """
    fitted = {name: adapter for name, adapter in adapters.items() if name in names}
    placed = set(fitted)
    for whole, parts, form in _forms(config):
        given = [adapters.get(part) for part in parts]
        is_in_parts = any(part is not None for part in given)
        if whole in adapters and is_in_parts:
            raise ValueError(
                f"{whole!r} and {' or '.join(map(repr, parts))} are the same weight, adapted twice."
            )
        if whole in adapters and any(part in names for part in parts):
            cut = zip(parts, form.cut(adapters[whole], config.mla), strict=True)
            fitted |= {part: adapter for part, adapter in cut if part in names}
            placed.add(whole)
        elif is_in_parts and whole in names:
            fitted[whole] = form.join(*given, config.mla)
            placed |= set(parts)
    lost = next((name for name in adapters if name not in placed), None)
    if lost is not None:
        raise ValueError(f"the model must have a tensor {lost!r}, it has none.")
    return fitted


class _Form(NamedTuple):
    """Two ways to have a weight: `cut` leads from the whole to the parts, and `join` back."""

    whole: str
    parts: tuple[str, str]
    cut: Callable[[Adapter, MLAConfig], tuple[Adapter, Adapter]]
    join: Callable[[_Part, _Part, MLAConfig], Adapter]


def _forms(config: ModelConfig) -> Iterator[tuple[str, list[str], _Form]]:
    """Yields the GGUF names of each weight that has two forms."""
    forms = (
        _Form("attn_kv_b", ("attn_k_b", "attn_v_b"), _cut_heads, _join_heads),
        _Form("ffn_gate_up_exps", ("ffn_gate_exps", "ffn_up_exps"), _cut_gate_up, _join_gate_up),
    )
    for layer in range(config.num_layers):
        for form in forms:
            whole, *parts = (f"blk.{layer}.{kind}.weight" for kind in (form.whole, *form.parts))
            yield whole, parts, form


def _largest_rank(height, width):
    """Returns more than any update needs, a multiple of 8 as ranks in GGUF files are."""
    return height + width + -(height + width) % 8


def _cut_heads(adapter, mla):
    """Returns adapters of `k_b` [N, R, H], which is W_uk transposed, and of `v_b` [N, V, R]."""
    N, H = mla.num_heads, mla.qk_nope_head_dim
    right = np.broadcast_to(adapter.a, (N, *adapter.a.shape))
    left = adapter.b.reshape(N, -1, adapter.b.shape[-1])
    key = Adapter(a=left[:, :H].swapaxes(1, 2), b=right.swapaxes(1, 2))
    return key, Adapter(a=right, b=left[:, H:])


def _join_heads(key, value, mla):
    """Returns an adapter of `kv_b` [N * (H + V), R], of the least rank that the factors tell.

    Factors that heads share, as all do that were cut out of one adapter, are taken once. Where those of all
    heads have more rows than a latent has numbers, the factors are the whole difference and the unit matrix.
    """
    N, H, V, R = mla.num_heads, mla.qk_nope_head_dim, mla.v_head_dim, mla.kv_lora_rank
    pieces = []  # first row in `kv_b`, factors
    for head in range(N):
        first = head * (H + V)
        if key is not None:
            pieces.append((first, key.a[head].T, key.b[head].T))
        if value is not None:
            pieces.append((first + H, value.b[head], value.a[head]))
    own = {right.tobytes(): right for _, _, right in pieces}
    rank = sum(len(right) for right in own.values())
    if rank > R:
        own, rank = {}, R
    starts = dict(zip(own, np.cumsum([0, *(len(right) for right in own.values())]).tolist(), strict=False))
    joined = np.zeros((N * (H + V), rank), np.float32)
    for first, left, right in pieces:
        left = left * np.float32(rank / len(right))
        start = starts.get(right.tobytes())
        values, start = (left @ right, 0) if start is None else (left, start)
        joined[first : first + len(left), start : start + values.shape[1]] = values
    return Adapter(a=np.concatenate([*own.values()]) if own else np.eye(R, dtype=np.float32), b=joined)


def _cut_gate_up(adapter, mla):
    width = adapter.b.shape[1] // 2
    return tuple(Adapter(a=adapter.a, b=part) for part in (adapter.b[:, :width], adapter.b[:, width:]))


def _join_gate_up(gate, up, mla):
    """Returns an adapter of both: factors side by side, or the one that there is beside zeros."""
    if gate is None or up is None:
        there = gate or up
        zeros = np.zeros_like(there.b)
        return Adapter(
            a=there.a, b=np.concatenate([zeros, there.b] if gate is None else [there.b, zeros], axis=1)
        )
    ranks = gate.a.shape[1], up.a.shape[1]
    if ranks[0] == ranks[1] and np.array_equal(gate.a, up.a):
        return Adapter(a=gate.a, b=np.concatenate([gate.b, up.b], axis=1))
    gate_b, up_b = (
        part.b * np.float32(sum(ranks) / own) for part, own in zip((gate, up), ranks, strict=True)
    )
    pad = lambda b, before, after: np.pad(b, ((0, 0), (0, 0), (before, after)))
    b = np.concatenate([pad(gate_b, 0, ranks[1]), pad(up_b, ranks[0], 0)], axis=1)
    return Adapter(a=np.concatenate([gate.a, up.a], axis=1), b=b)
