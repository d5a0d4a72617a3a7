"""The gated FFN of selected experts in one call."""

import jax
import numpy as np

from cpu_kernels.library import call


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
    rows = experts[gate][0].shape[1]
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
