"""Lowers for a GPU on a machine that has none."""

import jax
import pytest
from jaxlib.mlir import ir

from benchmarks import abstract_gpu

needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU here")


def lowered_for_gpu(function, *args, kind="NVIDIA H200", **kwargs) -> str:
    """Returns the text of `function`, jitted or not, lowered for `kind`; shapes will do for arguments.

    Its kernels are read as a GPU's compiler reads them, which checks them: to write them down does not.
    """
    jitted = function if hasattr(function, "trace") else jax.jit(function)
    with abstract_gpu.target(kind):
        lowered = jitted.trace(*args, **kwargs).lower(lowering_platforms=("cuda",))
    lowered.compiler_ir("stablehlo").operation.walk(_check_kernel)
    return lowered.as_text()


def _check_kernel(operation):
    if "__gpu$xla.gpu.triton" in str(operation.attributes.get("call_target_name", "")):
        from jax._src.pallas.triton import lowering  # of which there is no public part

        kernel = ir.StringAttr(operation.attributes["mhlo.backend_config"]["ir"]).value_bytes
        with lowering._new_ir_context():
            ir.Module.parse(kernel)
    return ir.WalkResult.ADVANCE
