"""Which code computes: kernels where they lower, are there and are wanted, XLA otherwise.

The CPU kernels round activations to 8 bits before they meet quantised weights. Who wants float32 products,
to compare or to differentiate twice, asks JAX for them, and XLA computes everything:

    with jax.default_matmul_precision("highest"): ...
"""

import functools

import jax
import jax.numpy as jnp

import cpu_kernels
from mla_jax.quant import codebooks, tensor
from pallas_kernels import dispatch as gpu_kernels

_EXACT = ("highest", "float32")


def has_kernel(*weights: tensor.Weight) -> bool:
    """Whether kernels multiply by these weights as they are."""
    return all(_format(weight) in cpu_kernels.formats() for weight in weights)


def operands(weight: tensor.Weight) -> tuple[tuple[jax.Array, jax.Array], str]:
    """Returns (blocks or panels, header) and the format of a weight; one without kernels is decoded first."""
    if not has_kernel(weight):
        weight = tensor.decode(weight)
    if not isinstance(weight, tensor.QuantizedTensor | tensor.PanelTensor):
        return (weight, jnp.zeros((0,), jnp.uint8)), _format(weight)
    _set_codebooks()
    header = jnp.zeros((0,), jnp.uint8) if weight.header is None else weight.header
    return (weight.panels if isinstance(weight, tensor.PanelTensor) else weight.blocks, header), weight.format


def for_gpu(wanted: bool | None) -> bool:
    """Whether to trace the kernels of GPUs: as `wanted`, or, with None, if JAX's device has them."""
    return gpu_kernels.on_gpu() if wanted is None else wanted


def is_exact() -> bool:
    """Whether JAX is asked for float32 products, as XLA computes them."""
    return jax.config.jax_default_matmul_precision in _EXACT


def run(*args, weights=(), cpu=None, cuda=None, default):
    """Returns what kernels give where the code lowers for their device and they are wanted, else `default`.

    Derivatives are those of `default`, at the same arguments. With float32 weights, which are those that are
    trained, the result is its too where derivatives are asked for: they need most of it in any case.

    Args:
      *args: pytrees of arrays: all the arrays that the functions read.
      weights: those of `args` that must have kernels on the CPU.
      cpu: the way with kernels of the CPU, or None.
      cuda: the way with kernels of an NVIDIA GPU, or None.
      default: the same in plain JAX.
    """
    ways = {} if cuda is None else {"cuda": cuda}
    if cpu is not None and cpu_kernels.available() and has_kernel(*weights):
        ways["cpu"] = cpu
    if not ways or is_exact():
        return default(*args)

    @jax.custom_jvp
    def compute(*args):
        return jax.lax.platform_dependent(*args, **ways, default=default)

    @compute.defjvp
    def _(primals, tangents):
        result, slope = jax.jvp(default, primals, tangents)
        is_trained = any(_format(weight) == "f32" for weight in weights)
        return result if is_trained else compute(*primals), slope

    return compute(*args)


@functools.cache
def _set_codebooks():
    for name in codebooks.NAMES:
        cpu_kernels.set_codebook(name, codebooks.codebook(name))


def _format(weight):
    if isinstance(weight, tensor.QuantizedTensor | tensor.PanelTensor):
        return weight.format
    if isinstance(weight, tensor.PlanarTensor | tensor.LoraTensor):
        return None  # the CPU has kernels for blocks
    return {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}.get(weight.dtype.name)
