"""W_uk and W_uv, from the latent to keys and values per head, in either layout that files have."""

import dataclasses

import jax

from mla_jax import quant
from mla_jax.quant.tensor import Weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class UpProjections:
    """Both weights as the file has them, so that nothing is rounded twice: `kv`, or `k` and `v`.

    Attributes:
      kv: [N * (H + V), R], of each head its W_uk, then its W_uv.
      k: [N, R, H], W_uk transposed.
      v: [N, V, R], W_uv.
      num_heads: N; static under jit.
      value_size: V; static under jit.
    """

    kv: Weight | None = None
    k: Weight | None = None
    v: Weight | None = None
    num_heads: int = dataclasses.field(metadata=dict(static=True))
    value_size: int = dataclasses.field(metadata=dict(static=True))

    @property
    def key_size(self) -> int:
        """Width H of a key without its rotary part."""
        if self.kv is None:
            return self.k.shape[-1]
        return self.kv.shape[0] // self.num_heads - self.value_size

    @property
    def rank(self) -> int:
        """Width R of a latent."""
        return (self.v if self.kv is None else self.kv).shape[-1]

    def decode(self) -> tuple[jax.Array, jax.Array]:
        """Returns W_uk f32[N, H, R] and W_uv f32[N, V, R]."""
        if self.kv is None:
            return quant.decode(self.k).swapaxes(1, 2), quant.decode(self.v)
        kv = quant.decode(self.kv).reshape(self.num_heads, -1, self.rank)
        return kv[:, : self.key_size], kv[:, self.key_size :]
