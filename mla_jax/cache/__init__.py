"""What is remembered of the tokens so far: `LatentRows` in modes 1 to 3, `HeadRows` in mode 0."""

from mla_jax.cache.contiguous import Cache, HeadRows, LatentRows, bytes_per_token, init_cache
from mla_jax.cache.hadamard import rotate

__all__ = ["Cache", "HeadRows", "LatentRows", "bytes_per_token", "init_cache", "rotate"]
