"""What the devices of a mesh tell each other within a layer. Without a mesh each function does nothing.

Devices along `expert` and `model` are a group: they have the same tokens, and each a part of the heads, of
hidden sizes and of the vocabulary. Devices along `data` have other tokens, but share out the experts.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mla_jax.config import Shard

DATA, EXPERT, MODEL = "data", "expert", "model"
AXES = (DATA, EXPERT, MODEL)  # of every mesh
GROUP = (EXPERT, MODEL)


def sum_over_group(x: jax.Array, shard: Shard | None) -> jax.Array:
    """Returns the sum of what the devices of a group have, f32[...] on each of them."""
    return x if shard is None or shard.group_size == 1 else jax.lax.psum(x, GROUP)


def gather_over_group(x: jax.Array, shard: Shard | None) -> jax.Array:
    """Returns [..., n * devices]: what each device of the group has of the last axis, in order."""
    if shard is None or shard.group_size == 1:
        return x
    return jax.lax.all_gather(x, GROUP, axis=x.ndim - 1, tiled=True)


def gather_over_data(x: jax.Array, shard: Shard | None) -> jax.Array:
    """Returns [B, ...] of the sequences of all devices along `data`, on each of them."""
    return x if shard is None or shard.data == 1 else jax.lax.all_gather(x, DATA, axis=0, tiled=True)


def of_group_rows(
    take: Callable[[jax.Array], jax.Array], ids: jax.Array, num_rows: int, shard: Shard | None
) -> jax.Array:
    """Returns rows of a table that the devices of a group share out.

    Args:
      take: from ids in [0, num_rows) to rows [..., D] of this device's part.
      ids: int[...] into the whole table.
      num_rows: of this device's part.
      shard: this device's part of the model.
    """
    if shard is None or shard.group_size == 1:
        return take(ids)
    own = ids - jax.lax.axis_index(GROUP) * num_rows
    is_own = (own >= 0) & (own < num_rows)
    rows = jnp.where(is_own[..., None], take(jnp.clip(own, 0, num_rows - 1)), 0)
    return sum_over_group(rows, shard)


def by_experts(
    experts: Callable, x: jax.Array, ids: jax.Array, weights: jax.Array, num_experts: int, shard: Shard | None
) -> jax.Array:
    """Applies experts that devices share out to the tokens of all devices.

    Each device is given the tokens of all that share experts with it, and applies its own experts to them.

    Args:
      experts: from [X', D], ids i32[X', K] of this device's experts, `num_experts` for none, and weights
        f32[X', K] to f32[X', D], the weighted sum.
      x: [X, D] tokens of this device.
      ids: i32[X, K] experts of each; the number of all experts, or more, for none.
      weights: f32[X, K].
      num_experts: of this device.
      shard: this device's part of the model.

    Returns:
      f32[X, D], which `sum_over_group` completes.
    """
    if shard is None:
        return experts(x, ids, weights)
    if shard.data > 1:
        x, ids, weights = (gather_over_data(part, shard) for part in (x, ids, weights))
    own = ids - jax.lax.axis_index((DATA, EXPERT)) * num_experts
    own = jnp.where((own >= 0) & (own < num_experts), own, num_experts)
    out_XD = experts(x, own, weights)
    if shard.data > 1:
        out_XD = jax.lax.psum_scatter(out_XD, DATA, scatter_dimension=0, tiled=True)
    return out_XD


def all_over_data(is_true: jax.Array, shard: Shard | None) -> jax.Array:
    """Returns whether a bool[] is true on every device of a mesh with `data`, which leave a loop together."""
    if shard is None or shard.data == 1:
        return is_true
    return jax.lax.pmin(is_true.astype(jnp.int32), AXES) > 0
