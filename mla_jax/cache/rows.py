"""Cached tokens, in a pool of pages. Letters as in `mla_jax.nn`.

A pool [Z, G, ...] has Z pages of G slots. Slot s of sequence b lies in page pages[b, s // G] at place s % G;
`pages` i32[B, M] is an argument of each step, and the host keeps it (`pages.PageTable`). Without it the cache
is contiguous: a page as long as the context for each sequence, in order.

A place that no token has may hold anything, NaN included: readers mask it. A number that is no page, such as
Z or -1, is none: what goes there is dropped, and zeros are read from it.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mla_jax.cache import codec
from mla_jax.cache.codec import Stored
from mla_jax.config import MLAMode, ModelConfig, RunConfig

SLOT_MULTIPLE = 256  # contiguous capacities are rounded up to it, so that chunks never run past the end
PAGE_SIZE = 64  # tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rows:
    pages: jax.Array | None = None

    @property
    def page_size(self) -> int:
        """Slots G of a page."""
        return self._parts[0].shape[1]

    @property
    def num_slots(self) -> int:
        """Capacity S of a sequence in tokens."""
        return self.page_size if self.pages is None else self.pages.shape[1] * self.page_size

    def at(self, pages: jax.Array | None):
        """Returns the rows with `pages` i32[B, M] for `append` and `read` to go by."""
        return dataclasses.replace(self, pages=pages)

    def read(self, start, size: int, length: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
        """Returns both parts [B, C, ...] of `size` slots from `start` on; zeros past `length` i32[B].

        The smaller of `size` and the page size must divide the larger, and `start`.
        """
        pages = self.table(length.shape[0])
        first, second = (_read(pool, pages, start, size, length, dtype) for pool in self._parts)
        return first, second

    def _write(self, pool, new, slots):
        pages = self.table(slots.shape[0]) if self.pages is None else self.pages
        num_pages, page_size = pool.shape[0], jnp.int32(pool.shape[1])
        # What does not change in the loop that decodes, such as which pages are negative, XLA takes out of it
        # for each layer and part, and then does not see that these places are the same for all of them.
        page = jnp.take_along_axis(
            pages, jax.lax.div(slots, page_size), axis=1, mode="fill", fill_value=num_pages
        )
        page, place = jnp.where(page < 0, num_pages, page), jax.lax.rem(slots, page_size)
        set_part = lambda part, new_part: part.at[page, place].set(new_part, mode="drop")
        return jax.tree.map(set_part, pool, codec.encode(new, codec.type_of(pool)))

    def table(self, batch: int) -> jax.Array:
        """Returns the pages i32[B, M] of each sequence; the number of pages stands for none."""
        if self.pages is None:
            return jnp.arange(batch, dtype=jnp.int32)[:, None]
        return jnp.where(self.pages < 0, self._parts[0].shape[0], self.pages)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentRows(_Rows):
    """One layer's latents, 71 times smaller than DeepSeek-V3's keys and values per head.

    Attributes:
      latent: [Z, G, R] normalised latent, plain or quantised.
      rope: [Z, G, P] rotated key part, shared by the heads.
      pages: i32[B, M] within a step on a paged cache, else None.
    """

    latent: Stored
    rope: Stored

    @property
    def _parts(self):
        return self.latent, self.rope

    def append(self, latent: jax.Array, rope: jax.Array, slots: jax.Array) -> "LatentRows":
        """Returns rows with `latent` [B, T, R], `rope` [B, T, P] at `slots` i32[B, T]; slot S is dropped."""
        latent, rope = self._write(self.latent, latent, slots), self._write(self.rope, rope, slots)
        return dataclasses.replace(self, latent=latent, rope=rope)

    def append_by(self, kernel, kv, norm, cos, sin, slots, **settings) -> "LatentRows":
        """Returns rows to which a kernel has appended what the down-projection gives of new tokens.

        Args:
          kernel: from `kv` to `sin`, pages, `slots` and the arrays and types of both parts to their arrays.
          kv: f32[B, T, R + P], the latent not normalised and the rotary part not rotated yet.
          norm: f32[R] weight of the norm of latents.
          cos: f32[B, T, P / 2] of the angle of each pair.
          sin: like `cos`.
          slots: i32[B, T]; slot S is dropped.
          **settings: of the kernel.
        """
        kinds = codec.type_of(self.latent), codec.type_of(self.rope)
        pools = kernel(
            *(kv, norm, cos, sin, self.table(slots.shape[0]), slots),
            codec.parts(self.latent),
            codec.parts(self.rope),
            latent_type=kinds[0],
            rope_type=kinds[1],
            **settings,
        )
        latent, rope = (codec.from_parts(pool, kind) for pool, kind in zip(pools, kinds, strict=True))
        return dataclasses.replace(self, latent=latent, rope=rope)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadRows(_Rows):
    """One layer's keys [Z, G, N, A] and values [Z, G, N, V] per head: the cache without MLA (mode 0)."""

    key: Stored
    value: Stored

    @property
    def _parts(self):
        return self.key, self.value

    def append(self, key: jax.Array, value: jax.Array, slots: jax.Array) -> "HeadRows":
        """Returns rows with `key` [B, T, N, A], `value` [B, T, N, V] at `slots` i32[B, T]; S is dropped."""
        key, value = self._write(self.key, key, slots), self._write(self.value, value, slots)
        return dataclasses.replace(self, key=key, value=value)


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
    """Returns an empty contiguous cache for `batch` sequences of at most `ctx_size` tokens (to the next 256).

    Raises:
      ValueError: if a row is no whole number of blocks of its type or of its rotation.
    """
    num_slots = -(-ctx_size // SLOT_MULTIPLE) * SLOT_MULTIPLE
    return _init(config, run, batch, num_pages=batch, page_size=num_slots)


def init_pool(
    config: ModelConfig, run: RunConfig, *, batch: int, num_pages: int, page_size: int = PAGE_SIZE
) -> Cache:
    """Returns an empty paged cache of `num_pages` pages for `batch` sequences; each step needs `pages`.

    Raises:
      ValueError: as `init_cache`, or if `page_size` does not divide 256 or there is no page.
    """
    if num_pages < 1:
        raise ValueError(f"num_pages must be at least 1, got {num_pages}.")
    if page_size < 1 or SLOT_MULTIPLE % page_size:
        raise ValueError(f"page_size must divide {SLOT_MULTIPLE}, got {page_size}.")
    return _init(config, run, batch, num_pages=num_pages, page_size=page_size)


def copy_pages(cache: Cache, sources: jax.Array, targets: jax.Array) -> Cache:
    """Returns the cache with pages `sources` i32[n] copied over `targets` i32[n]; target Z is dropped.

    All sources are read before any target is written.
    """
    copy = lambda part: part.at[targets].set(jnp.take(part, sources, axis=0, mode="clip"), mode="drop")
    return dataclasses.replace(cache, layers=jax.tree.map(copy, cache.layers))


def take_pages(cache: Cache, pages: jax.Array):
    """Returns the layers of the cache with pages i32[n] alone, in this order; zeros for what is no page."""
    take = lambda part: jnp.take(part, pages, axis=0, mode="fill", fill_value=0)
    return jax.tree.map(take, cache.layers)


def put_pages(cache: Cache, pages: jax.Array, layers) -> Cache:
    """Returns the cache with pages i32[n] as `take_pages` had them; what is no page is dropped."""
    put = lambda part, new: part.at[pages].set(new, mode="drop")
    return dataclasses.replace(cache, layers=jax.tree.map(put, cache.layers, layers))


def bytes_per_token(config: ModelConfig, run: RunConfig) -> int:
    """Returns the cache bytes that one token takes in all layers."""
    cache = jax.eval_shape(lambda: init_cache(config, run, batch=1, ctx_size=1))
    leaves = jax.tree.leaves(cache.layers)
    return sum(leaf.size // leaf.shape[1] * leaf.dtype.itemsize for leaf in leaves)


def _init(config, run, batch, *, num_pages, page_size):
    empty = lambda name, *widths: codec.empty((num_pages, page_size, *widths), name)
    mla, kind = config.mla, run.cache_type
    _check_rotation(config, run)

    def rows():
        if run.mla == MLAMode.EXPANDED:
            num_parts = 1 if run.shard is None else run.shard.group_size
            heads = run.sizes(config).num_heads * num_parts
            return HeadRows(key=empty(kind, heads, mla.qk_head_dim), value=empty(kind, heads, mla.v_head_dim))
        rope = empty(run.rope_type, mla.qk_rope_head_dim)
        return LatentRows(latent=empty(kind, mla.kv_lora_rank), rope=rope)

    layers = tuple(rows() for _ in range(config.num_layers))
    return Cache(layers=layers, length=jnp.zeros((batch,), jnp.int32))


def _check_rotation(config, run):
    mla = config.mla
    is_expanded = run.mla == MLAMode.EXPANDED
    widths = [(mla.qk_head_dim if is_expanded else mla.kv_lora_rank, run.latent_rotation)]
    widths += [] if is_expanded else [(mla.qk_rope_head_dim, run.rope_rotation)]
    for width, size in widths:
        if size is not None and width % size:
            raise ValueError(f"a rotated row must be a multiple of hadamard_size {size} wide, got {width}.")


def _read(pool, pages, start, size, length, dtype):
    chunk = jax.tree.map(lambda part: _take_slots(part, pages, start, size), pool)
    slots, (num_pages, page_size, *_) = start + jnp.arange(size, dtype=jnp.int32), pool.shape
    page = jnp.take(pages, slots // page_size, axis=1, mode="fill", fill_value=num_pages)
    live = (slots[None] < length[:, None]) & (page < num_pages)
    live = live.reshape(live.shape + (1,) * (pool.ndim - 2))
    return jnp.where(live, codec.decode(chunk, dtype), jnp.zeros((), dtype))


def _take_slots(part, pages, start, size):
    """Gathers [B, size, ...] out of [Z, G, ...], in windows that each lie within one page."""
    page_size, *widths = part.shape[1:]
    window = min(size, page_size)
    starts = start + jnp.arange(0, size, window, dtype=jnp.int32)
    page = jnp.take(pages, starts // page_size, axis=1, mode="clip")
    origin, shape = (jnp.int32(0),) * len(widths), (1, window, *widths)
    take = lambda page, place: jax.lax.dynamic_slice(part, (page, place, *origin), shape)[0]
    windows = jax.vmap(jax.vmap(take), in_axes=(0, None))(page, starts % page_size)
    return windows.reshape(pages.shape[0], size, *widths)
