import jax
import pytest

import cpu_kernels


@pytest.fixture(autouse=True)
def kernels_compute():
    """Lets the kernels run, which the tests of everything else leave out."""
    if not cpu_kernels.available():
        pytest.skip(f"the CPU kernels are not there: {cpu_kernels.unavailable_because()}")
    with jax.default_matmul_precision("default"):
        yield


def _use(name):
    if name not in cpu_kernels.instruction_sets():
        pytest.skip(f"this machine has no {name}")
    cpu_kernels.use_instruction_set(name)
    yield name
    cpu_kernels.use_instruction_set(cpu_kernels.instruction_sets()[0])


@pytest.fixture(params=["amx", "avx512bf16", "avx512", "avx2", "generic"])
def instruction_set(request):
    yield from _use(request.param)


@pytest.fixture(params=["amx", "avx512bf16", "avx512"])
def panel_set(request):
    """The instruction sets whose kernels read weights out of panels."""
    yield from _use(request.param)


@pytest.fixture
def tiles():
    """The instruction set with tile registers."""
    yield from _use("amx")
