"""`x @ weight.T` for every kind of weight leaf.

On the CPU a kernel, where `dispatch` finds one. XLA has two ways, chosen by the number of rows:

few rows   multiply and reduce: decoding fuses into the sum, no float32 copy is written to memory, but for
           decoders that look values up in a table
many rows  decode, then dot: one decoded copy, made inside jit and freed after use, serves all rows

Measured with XLA on two CPU cores, [4096, 256] and [2048, 2048]: with one row of Q8_0 or bfloat16 the first
takes 0.2 to 0.4 of the time of the second, with two rows 0.35 to 1, with four 0.8 to 1.4. Float32 has
nothing to decode, and float16 converts so slowly inside a sum that the dot is faster. At 512 rows of
Q8_0, decoding adds a tenth to a quarter to the time of the dot.
"""

import functools
import math

import jax
import jax.numpy as jnp

import cpu_kernels
from mla_jax.quant import dispatch, linear_map, quantisers, tensor
from pallas_kernels import grouped_matmul

_FEW_ROWS = 2  # a decode step; 2 is included because one row is often padded to two


def matmul(x: jax.Array, weight: tensor.Weight, *, keeps_rest: bool = False) -> jax.Array:
    """Returns `x @ weight.T`; a weight that is not float32 is decoded inside the surrounding jit.

    Args:
      x: [..., in], any float type.
      weight: [out, in], in any form. The result has derivatives in `x`, in arrays and in what a `LoraTensor`
        adds; blocks are held fixed, see `linear_map`.
      keeps_rest: whether kernels that round `x` to 8 bits multiply by what that leaves out too, and so by
        about 15 bits, at the price of twice the products.

    Returns:
      float32[..., out], sums in float32; products as `dispatch` says.

    Raises:
      ValueError: if the shapes do not fit.
    """
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x [..., in] must fit weight [out, in], got {x.shape} and {weight.shape}.")
    x = x.astype(jnp.float32)
    if isinstance(weight, tensor.LoraTensor):
        update = linear_map.multiply(linear_map.multiply(x, weight.a), weight.b)
        return matmul(x, weight.base, keeps_rest=keeps_rest) + update
    is_plain = getattr(weight, "format", None) in tensor.PLAIN  # 16 bits in planes have derivatives too
    in_blocks = isinstance(weight, tensor.QuantizedTensor | tensor.PanelTensor | tensor.PlanarTensor)
    is_frozen = in_blocks and not is_plain
    return _by_frozen(x, weight, keeps_rest) if is_frozen else _dispatch(x, weight)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _by_frozen(x, weight, keeps_rest):
    return _dispatch(x, weight, keeps_rest)


@_by_frozen.defjvp
def _(keeps_rest, primals, tangents):
    return _by_frozen(*primals, keeps_rest), linear_map.apply(tangents[0], primals[1])


def _dispatch(x, weight, keeps_rest=False):
    cuda = _matmul_on_gpu if isinstance(weight, tensor.PlanarTensor) else None
    cpu = _matmul_with_rest if keeps_rest else _matmul_on_cpu
    return dispatch.run(x, weight, weights=[weight], cpu=cpu, cuda=cuda, default=_matmul)


def _matmul_on_cpu(x, weight):
    arrays, name = dispatch.operands(weight)
    return cpu_kernels.matmul(x, *arrays, format=name)


def _matmul_with_rest(x, weight):
    """Multiplies by numbers that the kernel's rounding leaves as they are, and by what they lack of `x`."""
    codes, scale, _ = quantisers.q8_0(x.reshape(*x.shape[:-1], -1, 32))
    rounded = (codes * scale[..., None]).reshape(x.shape)
    whole, rest = _matmul_on_cpu(jnp.stack([rounded, x - rounded]), weight)
    return whole + rest


def _matmul_on_gpu(x, weight):
    tile, planes = x.reshape(1, -1, x.shape[-1]), jax.tree.map(lambda leaf: leaf[None], weight.planes)
    out = grouped_matmul.grouped_matmul(tile, planes, jnp.zeros((1,), jnp.int32), format=weight.format)
    return out.reshape(*x.shape[:-1], weight.shape[0])


def _matmul(x, weight):
    weight = tensor.in_blocks(weight)
    fuses = isinstance(weight, tensor.QuantizedTensor) or weight.dtype == jnp.bfloat16
    if fuses and math.prod(x.shape[:-1]) <= _FEW_ROWS:
        return _multiply_and_reduce(x, weight)
    return linear_map.multiply(x, tensor.decode(weight))


def _multiply_and_reduce(x: jax.Array, weight: tensor.Weight) -> jax.Array:
    """Sums over blocks and the weights of a block; merging the two axes first would slow decoding down."""
    if isinstance(weight, tensor.QuantizedTensor):
        values = tensor.decode_blocks(weight)
    else:
        values = weight.astype(jnp.float32)[:, None, :]
    rows = x.reshape(-1, 1, *values.shape[1:])
    return jnp.sum(values[None] * rows, axis=(-2, -1)).reshape(*x.shape[:-1], weight.shape[0])
