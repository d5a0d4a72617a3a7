"""Chooses the implementation of an op, and hands kernels to a GPU. The only file that knows backends.

Kernels reach the GPU through the Triton backend of Pallas, which JAX deprecates from 0.11 on in favour of
Mosaic GPU. `launch` is the one function that names it. For a Mosaic GPU body an op adds a second body and
`launch` chooses by the device: it takes tiles in shared memory (`plgpu.SMEM` scratch, copied by TMA on Hopper
and by `cp.async` on Ampere, waited for at barriers), accumulators by `wgmma` or `mma`, and a grid of warp
groups in place of `num_warps` and `num_stages`. References, costs and public ops stay as they are.
"""

import functools
import re
from collections.abc import Callable

import jax
from absl import logging
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

NAMES = ("reference", "triton", "interpret")

OLDEST_CAPABILITY = (8, 0)  # Ampere: bfloat16 products and asynchronous copies


def launch(body: Callable, *operands, name: str, grid, out_shape, config, interpret: bool, aliases=None):
    """Runs `body` once for each point of `grid`.

    Args:
      body: takes a ref of each whole operand, then of each result, all left in device memory.
      *operands: arrays.
      name: what profilers show.
      grid: sizes, static.
      out_shape: `jax.ShapeDtypeStruct`s.
      config: has `num_warps` and `num_stages`.
      interpret: computes with plain JAX instead, on any machine.
      aliases: operand -> result that takes its memory.

    Returns:
      Arrays of `out_shape`.
    """
    return pl.pallas_call(
        body,
        name=name,
        grid=grid,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        input_output_aliases=aliases or {},
        interpret=interpret,
    )(*operands)


def run(name: str | None, *args, unsupported: str | None, kernel: Callable, reference: Callable):
    """Runs an op as `name` says; with None by the kernel where the code lowers for CUDA, else the reference.

    The choice is made at lowering, so one traced program serves both backends.

    Args:
      name: None or one of `NAMES`.
      *args: pytrees of arrays: all the arrays that the functions read.
      unsupported: why the kernel cannot take these shapes and types, or None.
      kernel: takes `args` and `interpret`.
      reference: takes `args`.

    Raises:
      ValueError: for an unknown `name`.
      NotImplementedError: if the kernel is asked for and cannot run.
    """
    if name is not None and name not in NAMES:
        raise ValueError(f"implementation must be None or one of {NAMES}, got {name!r}.")
    if name in ("triton", "interpret"):
        if unsupported:
            raise NotImplementedError(unsupported)
        return kernel(*args, interpret=name == "interpret")
    if name == "reference" or unsupported or (jax.default_backend() == "gpu" and not on_gpu()):
        return reference(*args)
    triton = functools.partial(kernel, interpret=False)
    return jax.lax.platform_dependent(*args, cuda=triton, default=reference)


def unaddressable(**arrays: jax.Array) -> str | None:
    """Says which array the kernels would read at wrong addresses, or returns None.

    Triton counts elements with 32 signed bits in arrays of up to 4 GiB, so bytes beyond 2 GiB need two-byte
    elements.
    """
    for name, array in arrays.items():
        if array.dtype.itemsize == 1 and 2**31 < array.size <= 2**32:
            return f"{name} must have at most 2**31 or more than 2**32 one-byte elements, got {array.size}."
    return None


def shared_memory() -> int:
    """Returns the bytes that a program may take on the GPU, or on an H100 if there is no GPU."""
    default = 227 << 10
    if jax.default_backend() != "gpu":
        return default
    return getattr(jax.devices()[0], "shared_memory_per_block_optin", default)


@functools.cache
def on_gpu() -> bool:
    """Whether JAX's device is an NVIDIA GPU that is new enough; says so once if it is too old."""
    if jax.default_backend() != "gpu":
        return False
    device = jax.devices()[0]
    found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    capability = tuple(map(int, found.groups())) if found else (0, 0)
    if capability >= OLDEST_CAPABILITY:
        return True
    logging.warning(
        "%s has compute capability %d.%d: the kernels need 8.0 (Ampere), so XLA computes everything.",
        device.device_kind,
        *capability,
    )
    return False
