"""The product with a frozen weight as a linear map that JAX can transpose without a dense copy of the weight.

A product that JAX derives itself keeps the decoded weight from the forward pass to the backward one. Here
the map is a primitive: its transpose is another product with the same blocks, decoded some rows at a time.
Forward mode, reverse mode, both on top of each other and `vmap` go through it.
"""

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mla_jax.quant import tensor

# Weights that are decoded at a time by a transposed product: 16 MiB. It is in a loop that they are: XLA would
# decode the weights of many products before the first of them begins, as nothing else has to come before.
_DECODED = 1 << 22


def apply(x: jax.Array, weight: tensor.Weight) -> jax.Array:
    """Returns `x @ weight.T` f32[..., out] of x f32[..., in], computed by XLA; linear in x alone."""
    leaves, structure = jax.tree.flatten(weight)
    return _product_p.bind(x, *leaves, structure=structure, is_transposed=False)


def multiply(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns `x @ weight.T` f32[..., out] of float32 x [..., in] and weight [out, in]."""
    contract_last = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, contract_last, preferred_element_type=jnp.float32)


def _compute(x, *leaves, structure, is_transposed):
    weight = jax.tree.unflatten(structure, leaves)
    return _multiply_transposed(x, weight) if is_transposed else multiply(x, tensor.decode(weight))


def _multiply_transposed(x, weight):
    """Returns `x @ weight` of x [..., out], a piece of the weight's rows after the other."""
    weight = tensor.in_blocks(weight)  # here, for what is kept from the forward pass is the panels themselves
    rows, columns = weight.shape
    size = max(1, min(rows // 2, _DECODED // columns))  # a loop of one step is none, see `_DECODED`

    def piece(start, size):
        part = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, size), weight)
        of_part = jax.lax.dynamic_slice_in_dim(x, start, size, axis=-1)
        contract = (((x.ndim - 1,), (0,)), ((), ()))
        return jax.lax.dot_general(of_part, tensor.decode(part), contract, preferred_element_type=jnp.float32)

    total = jnp.zeros((*x.shape[:-1], columns), jnp.float32)
    total = jax.lax.fori_loop(0, rows // size, lambda i, total: total + piece(i * size, size), total)
    return total + piece(rows - rows % size, rows % size) if rows % size else total


def _shape(x, *leaves, structure, is_transposed):
    rows, columns = jax.tree.unflatten(structure, leaves).shape
    return jax.core.ShapedArray((*x.shape[:-1], columns if is_transposed else rows), jnp.float32)


def _jvp(primals, tangents, **settings):
    slope, *of_leaves = tangents
    if not all(isinstance(part, ad.Zero) or part.dtype == jax.dtypes.float0 for part in of_leaves):
        raise ValueError("a quantised weight must be held fixed: its blocks have no gradient.")
    return _product_p.bind(*primals, **settings), _product_p.bind(slope, *primals[1:], **settings)


def _transpose(cotangent, x, *leaves, structure, is_transposed):
    if isinstance(cotangent, ad.Zero):
        return (ad.Zero(x.aval), *(None for _ in leaves))
    back = _product_p.bind(cotangent, *leaves, structure=structure, is_transposed=not is_transposed)
    return (back, *(None for _ in leaves))


def _batch(operands, axes, **settings):
    """Puts a batch of x in front, where any axes may be; a batch of weights is gone through in turn."""
    x, *leaves = operands
    if all(axis is None for axis in axes[1:]):
        return _product_p.bind(jnp.moveaxis(x, axes[0], 0), *leaves, **settings), 0
    size = next(part.shape[axis] for part, axis in zip(operands, axes, strict=True) if axis is not None)
    front = lambda part, axis: (
        jnp.broadcast_to(part, (size, *part.shape)) if axis is None else jnp.moveaxis(part, axis, 0)
    )
    return jax.lax.map(
        lambda parts: _product_p.bind(*parts, **settings), tuple(map(front, operands, axes))
    ), 0


_product_p = Primitive("product_with_frozen_weight")
_product_p.def_impl(jax.jit(_compute, static_argnames=("structure", "is_transposed")))
_product_p.def_abstract_eval(_shape)
mlir.register_lowering(_product_p, mlir.lower_fun(_compute, multiple_results=False))
ad.primitive_jvps[_product_p] = _jvp
ad.primitive_transposes[_product_p] = _transpose
batching.primitive_batchers[_product_p] = _batch
