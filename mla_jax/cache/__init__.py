"""What is remembered of the tokens so far: `LatentRows` in modes 1 to 3, `HeadRows` in mode 0."""

from mla_jax.cache.hadamard import rotate
from mla_jax.cache.pages import PageTable, PoolExhausted
from mla_jax.cache.rows import (
    PAGE_SIZE,
    Cache,
    HeadRows,
    LatentRows,
    bytes_per_token,
    copy_pages,
    init_cache,
    init_pool,
    put_pages,
    take_pages,
)
from mla_jax.cache.saved import fingerprint, load, save

__all__ = [
    "PAGE_SIZE",
    "Cache",
    "HeadRows",
    "LatentRows",
    "PageTable",
    "PoolExhausted",
    "bytes_per_token",
    "copy_pages",
    "fingerprint",
    "init_cache",
    "init_pool",
    "load",
    "put_pages",
    "rotate",
    "save",
    "take_pages",
]
