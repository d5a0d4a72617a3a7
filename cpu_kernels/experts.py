"""Experts: which a token takes, and their gated FFN, in a call each."""

import jax
import jax.numpy as jnp
import numpy as np

from cpu_kernels.library import call
from cpu_kernels.panels import num_rows


def expert_ffn(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    experts: dict[str, tuple[jax.Array, jax.Array]],
    *,
    formats: dict[str, str],
) -> jax.Array:
    """Returns for each token the sum of `weight * down(silu(gate(x)) * up(x))` of its experts.

    Args:
      x: f32[X, D].
      ids: i32[X, K] experts of each token; E for none: such a pair takes no time.
      weights: f32[X, K].
      experts: blocks and header, as in `matmul`, of gate and up [E, F, D], or gate_up [E, 2F, D], and of
        down [E, D, F].
      formats: the format of each.

    Returns:
      f32[X, D].
    """
    gate, up = ("gate_up", "gate_up") if "gate_up" in experts else ("gate", "up")
    rows = num_rows(experts[gate][0].shape[1:], formats[gate])
    up_first = rows // 2 if gate == up else 0
    return call("mla_expert_ffn", x.shape)(
        x,
        ids,
        weights,
        *experts[gate],
        *experts[up],
        *experts["down"],
        gate_format=formats[gate],
        up_format=formats[up],
        down_format=formats["down"],
        up_first=np.int64(up_first),
    )


def select_experts(
    logits: jax.Array,
    bias: jax.Array | None,
    minimum: jax.Array | None,
    threshold: jax.Array | None,
    *,
    num_chosen: int,
    gating: str,
    num_groups: int,
    num_groups_used: int,
    normalize: bool,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Returns the best K experts of each token and their weights.

    Args:
      logits: f32[X, E] of the router. One that is no number is chosen first, so that it shows in the weights.
      bias: f32[E] added to the scores that select, not to the weights; None for none.
      minimum: i32[X] experts that are kept whatever they score; None for all.
      threshold: f32[X]: the others are kept from this share of the best score on; None where `minimum` is.
      num_chosen: K.
      gating: "softmax" or "sigmoid" of the logits: the weights, and without `bias` the scores.
      num_groups: equal groups, of which the experts of the best `num_groups_used` are chosen from. With
        softmax a group scores as its best expert, with sigmoid as the sum of its two best.
      num_groups_used: how many.
      normalize: whether weights are divided by their sum.
      scale: of the weights.

    Returns:
      ids i32[X, K], best first, ties to the lowest id, E for one that is left out, and weights f32[X, K].
    """
    X, E = logits.shape
    or_empty = lambda array, dtype: jnp.zeros((0,), dtype) if array is None else array
    shapes = [jax.ShapeDtypeStruct((X, num_chosen), dtype) for dtype in (jnp.int32, jnp.float32)]
    best_of_group = 1 if gating == "softmax" else min(2, E // num_groups)
    select = jax.ffi.ffi_call("mla_select_experts", shapes, vmap_method="sequential")
    ids, weights = select(
        logits,
        or_empty(bias, jnp.float32),
        or_empty(minimum, jnp.int32),
        or_empty(threshold, jnp.float32),
        is_softmax=gating == "softmax",
        groups=np.int64(num_groups),
        groups_used=np.int64(num_groups_used),
        best_of_group=np.int64(best_of_group),
        normalizes=normalize,
        scale=np.float32(scale),
    )
    return ids, weights
