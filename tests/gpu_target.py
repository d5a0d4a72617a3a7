"""Lowers for a GPU on a machine that has none."""

import contextlib

import jax
import pytest

needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU here")


def lowered_for_gpu(function, *args, kind="NVIDIA H200", **kwargs) -> str:
    """Returns the text of `function`, jitted or not, lowered for `kind`; shapes will do for arguments."""
    jitted = function if hasattr(function, "trace") else jax.jit(function)
    with _target(kind):
        return jitted.trace(*args, **kwargs).lower(lowering_platforms=("cuda",)).as_text()


def _target(kind):
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

    device = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    return use_abstract_mesh(AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device))
