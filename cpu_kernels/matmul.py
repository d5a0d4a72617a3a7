"""Products of activations with a weight, whole or a matrix per head."""

import jax
import numpy as np

from cpu_kernels.library import call
from cpu_kernels.panels import num_rows


def matmul(x: jax.Array, blocks: jax.Array, header: jax.Array, *, format: str) -> jax.Array:
    """Returns `x @ weight.T`.

    Args:
      x: f32[..., in].
      blocks: u8[out, blocks of a row, bytes], panels of them (see `panels`), or numbers [out, in] of a plain
        format.
      header: u8[out, bytes], what the format has in front of a row; u8[0] for none.
      format: one of `formats`.

    Returns:
      f32[..., out]. What a row gives does not depend on the others.
    """
    return call("mla_matmul", (*x.shape[:-1], num_rows(blocks.shape, format)))(
        x, blocks, header, format=format
    )


def head_matmul(
    x: jax.Array, blocks: jax.Array, header: jax.Array, *, format: str, out: int, stride: int, first: int
) -> jax.Array:
    """Returns each head's `x @ weight[head].T`.

    Args:
      x: f32[X, N, in].
      blocks: u8[..., rows, blocks of a row, bytes], panels of them where each head begins a panel and has
        whole ones, or numbers; leading axes count as rows.
      header: as in `matmul`.
      format: one of `formats`.
      out: rows of a head.
      stride: rows from a head to the next.
      first: row at which the first head begins.

    Returns:
      f32[X, N, out].
    """
    attributes = dict(format=format, stride=np.int64(stride), first=np.int64(first))
    return call("mla_head_matmul", (*x.shape[:-1], out))(x, blocks, header, **attributes)


def head_transposed(
    x: jax.Array, blocks: jax.Array, header: jax.Array, *, format: str, size: int, stride: int
) -> jax.Array:
    """Returns each head's `x @ weight[head]`: f32[X, N, size] of x f32[X, N, in].

    Of the weight, [rows, size], head n has the `in` rows from n * stride on; else as in `head_matmul`. What
    is in blocks is met in float32 throughout; panels meet x times the scales of their rows, which of 32
    columns and 256 rows becomes 16 bits with one scale.
    """
    attributes = dict(format=format, stride=np.int64(stride))
    return call("mla_head_transposed", (*x.shape[:-1], size))(x, blocks, header, **attributes)
