"""Finds the compiled library, registers its handlers with XLA, and chooses the instruction set."""

import ctypes
import functools
import importlib.metadata
import pathlib

import jax
import jax.numpy as jnp

_FILE = "cpu_kernels.so"
_HANDLERS = (
    "mla_matmul",
    "mla_head_matmul",
    "mla_head_transposed",
    "mla_expert_ffn",
    "mla_latent_attention",
    "mla_latent_prefill",
)


@functools.cache
def _load():
    """Returns the library, and why there is none."""
    path = _find()
    if path is None:
        return None, "there was no C++ compiler when the package was installed"
    try:
        library = ctypes.CDLL(str(path))
        for name in _HANDLERS:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    except (OSError, AttributeError, RuntimeError) as error:
        return None, f"{path} does not fit this machine or jax {jax.__version__} (install anew): {error}"
    for function in (library.mla_available, library.mla_format):
        function.restype = ctypes.c_char_p
    return library, ""


def _find():
    beside = pathlib.Path(__file__).with_name(_FILE)
    # An editable install keeps the sources where they are and installs what it builds.
    installed = [
        pathlib.Path(distribution.locate_file(f"cpu_kernels/{_FILE}"))
        for distribution in importlib.metadata.distributions(name="mla-jax")
    ]
    return next((path for path in (beside, *installed) if path.is_file()), None)


def available() -> bool:
    """Whether the kernels are there to be called."""
    return _load()[0] is not None


def unavailable_because() -> str:
    """Returns why the kernels are not there, or an empty string."""
    return _load()[1]


@functools.cache
def formats() -> frozenset[str]:
    """Returns the weight formats that have kernels; "f32", "f16" and "bf16" are plain arrays."""
    return frozenset(_names(_load()[0].mla_format)) if available() else frozenset()


def instruction_sets() -> tuple[str, ...]:
    """Returns those that this machine has, the best first."""
    return tuple(_names(_load()[0].mla_available)) if available() else ()


def use_instruction_set(name: str) -> None:
    """Makes all kernels of this process use one of `instruction_sets`; the best is used without this.

    Raises:
      ValueError: if this machine does not have it.
    """
    names = instruction_sets()
    if name not in names:
        raise ValueError(f"name must be one of {', '.join(names)}, got {name!r}.")
    _load()[0].mla_use(names.index(name))


def call(handler: str, shape: tuple[int, ...]):
    """Returns what calls a handler with arrays and attributes, for f32[shape]; under vmap it loops."""
    return jax.ffi.ffi_call(handler, jax.ShapeDtypeStruct(shape, jnp.float32), vmap_method="sequential")


def _names(function):
    index = 0
    while (name := function(index)) is not None:
        yield name.decode()
        index += 1
