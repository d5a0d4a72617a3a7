"""The contiguous cache: token t of a sequence lies in slot t. Letters as in `mla_jax.nn`.

A slot at or past a sequence's length may hold anything, NaN included: readers mask it.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mla_jax.cache import codec
from mla_jax.cache.codec import Stored
from mla_jax.config import MLAMode, ModelConfig, RunConfig

SLOT_MULTIPLE = 256  # capacities are rounded up to it, so that chunks of slots never run past the end


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentRows:
    """One layer's latents, 71 times smaller than DeepSeek-V3's keys and values per head.

    Attributes:
      latent: [B, S, R] normalised latent, plain or quantised.
      rope: [B, S, P] rotated key part, shared by the heads.
    """

    latent: Stored
    rope: Stored

    @property
    def num_slots(self) -> int:
        """Capacity S in tokens."""
        return self.latent.shape[1]

    def append(self, latent: jax.Array, rope: jax.Array, slots: jax.Array) -> "LatentRows":
        """Returns rows with `latent` [B, T, R], `rope` [B, T, P] at `slots` i32[B, T]; slot S is dropped."""
        return LatentRows(latent=_write(self.latent, latent, slots), rope=_write(self.rope, rope, slots))

    def read(self, start, size: int, length: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
        """Returns latent [B, C, R] and rope [B, C, P] of `size` slots; zeros past `length` i32[B]."""
        return _read(self.latent, start, size, length, dtype), _read(self.rope, start, size, length, dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadRows:
    """One layer's keys [B, S, N, A] and values [B, S, N, V] per head: the cache without MLA (mode 0)."""

    key: Stored
    value: Stored

    @property
    def num_slots(self) -> int:
        """Capacity S in tokens."""
        return self.key.shape[1]

    def append(self, key: jax.Array, value: jax.Array, slots: jax.Array) -> "HeadRows":
        """Returns rows with `key` [B, T, N, A], `value` [B, T, N, V] at `slots` i32[B, T]; S is dropped."""
        return HeadRows(key=_write(self.key, key, slots), value=_write(self.value, value, slots))

    def read(self, start, size: int, length: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
        """Returns key [B, C, N, A] and value [B, C, N, V] of `size` slots; zeros past `length` i32[B]."""
        return _read(self.key, start, size, length, dtype), _read(self.value, start, size, length, dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """The rows of every layer, and how many tokens each sequence has.

    Attributes:
      layers: one `LatentRows` or `HeadRows` per layer. Not stacked: a slice of a stack would be copied.
      length: i32[B].
    """

    layers: tuple[LatentRows | HeadRows, ...]
    length: jax.Array


def init_cache(config: ModelConfig, run: RunConfig, *, batch: int, ctx_size: int) -> Cache:
    """Returns an empty cache for `batch` sequences of at most `ctx_size` tokens (rounded up to 256).

    Raises:
      ValueError: if a row is no whole number of blocks of its type or of its rotation.
    """
    num_slots = -(-ctx_size // SLOT_MULTIPLE) * SLOT_MULTIPLE
    empty = lambda name, *widths: codec.empty((batch, num_slots, *widths), name)
    mla, kind = config.mla, run.cache_type
    _check_rotation(config, run)

    def rows():
        if run.mla == MLAMode.EXPANDED:
            heads = mla.num_heads
            return HeadRows(key=empty(kind, heads, mla.qk_head_dim), value=empty(kind, heads, mla.v_head_dim))
        rope = empty(run.rope_type, mla.qk_rope_head_dim)
        return LatentRows(latent=empty(kind, mla.kv_lora_rank), rope=rope)

    layers = tuple(rows() for _ in range(config.num_layers))
    return Cache(layers=layers, length=jnp.zeros((batch,), jnp.int32))


def bytes_per_token(config: ModelConfig, run: RunConfig) -> int:
    """Returns the cache bytes that one token takes in all layers."""
    cache = jax.eval_shape(lambda: init_cache(config, run, batch=1, ctx_size=1))
    leaves = jax.tree.leaves(cache.layers)
    return sum(leaf.size // leaf.shape[1] * leaf.dtype.itemsize for leaf in leaves)


def _check_rotation(config, run):
    mla = config.mla
    is_expanded = run.mla == MLAMode.EXPANDED
    widths = [(mla.qk_head_dim if is_expanded else mla.kv_lora_rank, run.latent_rotation)]
    widths += [] if is_expanded else [(mla.qk_rope_head_dim, run.rope_rotation)]
    for width, size in widths:
        if size is not None and width % size:
            raise ValueError(f"a rotated row must be a multiple of hadamard_size {size} wide, got {width}.")


def _write(pool, new, slots):
    rows = jnp.arange(pool.shape[0], dtype=jnp.int32)[:, None]
    set_part = lambda part, new_part: part.at[rows, slots].set(new_part, mode="drop")
    return jax.tree.map(set_part, pool, codec.encode(new, codec.type_of(pool)))


def _read(pool, start, size, length, dtype):
    chunk = jax.tree.map(lambda part: jax.lax.dynamic_slice_in_dim(part, start, size, axis=1), pool)
    live = start + jnp.arange(size, dtype=jnp.int32)[None] < length[:, None]
    live = live.reshape(live.shape + (1,) * (pool.ndim - 2))
    return jnp.where(live, codec.decode(chunk, dtype), jnp.zeros((), dtype))
