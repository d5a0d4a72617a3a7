"""GPUs that are not here: whether there is a compiler for them, and how JAX is told of one."""

import contextlib
import importlib.util

import jax


def has_compiler() -> bool:
    """Whether both packages of the CUDA plugin of JAX are installed."""
    try:
        return all(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_plugins.xla_cuda12")))
    except ModuleNotFoundError:
        return False


def target(kind: str):
    """Returns a context in which JAX lowers for a GPU such as "NVIDIA H200"; before 0.11 it needs none."""
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

    device = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    return use_abstract_mesh(AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device))
