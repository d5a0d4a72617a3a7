"""Finds the compiled library, registers its handlers with XLA, and chooses the instruction set."""

import ctypes
import functools
import hashlib
import importlib.metadata
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

_FILE = "cpu_kernels.so"
_ROOT = pathlib.Path(__file__).parent
_HANDLERS = (
    "mla_matmul",
    "mla_head_matmul",
    "mla_head_transposed",
    "mla_expert_ffn",
    "mla_latent_append",
    "mla_latent_attention",
    "mla_latent_prefill",
    "mla_rms_norm",
    "mla_select_experts",
    "mla_split_queries",
)
_codebooks: dict[str, np.ndarray] = {}  # what the library points to


@functools.cache
def _load():
    """Returns the library, and why there is none."""
    path = _find()
    if path is None:
        return None, "the package is not installed, or was built without them (`pip install -v` says why)"
    try:
        library = ctypes.CDLL(str(path))
        for function in (library.mla_available, library.mla_format, library.mla_sources):
            function.restype = ctypes.c_char_p
        if reason := _misfit(library):
            return None, f"{path} was built {reason}"
        for name in _HANDLERS:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    except (OSError, AttributeError, RuntimeError, TypeError) as error:
        return None, f"{path} does not fit this package, machine or jax (install anew): {error}"
    return library, ""


def _find():
    # An editable install keeps the sources where they are and installs what it builds.
    installed = [
        pathlib.Path(distribution.locate_file(f"cpu_kernels/{_FILE}"))
        for distribution in importlib.metadata.distributions(name="mla-jax")
    ]
    return next((path for path in (_ROOT / _FILE, *installed) if path.is_file()), None)


def _misfit(library):
    if (_ROOT / "src").is_dir() and library.mla_sources().decode() != _digest():
        return f"from other sources than {_ROOT / 'src'} has now: install anew (`pip install -e .`)"
    built, found = (library.mla_ffi_major(), library.mla_ffi_minor()), _ffi_version()
    if built > found:  # jax would find out too late: no CPU backend would start
        return (
            f"for version {built[0]}.{built[1]} of XLA's FFI, and jax {jax.__version__} has "
            f"{found[0]}.{found[1]}: install anew, or take a newer jax"
        )
    return ""


def _digest():
    """Returns the digest of the sources that CMakeLists.txt gives to the library."""
    sources = (_ROOT / "CMakeLists.txt", *_ROOT.glob("src/*.h"), *_ROOT.glob("src/*.cc"))
    digests = (hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(sources))
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _ffi_version():
    """Returns (major, minor) of the FFI that the installed jax understands; older ones it takes as well."""
    header = pathlib.Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h").read_text()
    major, minor = (re.search(rf"define XLA_FFI_API_{part} (\d+)", header)[1] for part in ("MAJOR", "MINOR"))
    return int(major), int(minor)


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


@functools.cache
def block_bytes() -> dict[str, int]:
    """Returns the bytes of a block of each of `formats`, or of a number of a plain one."""
    library = _load()[0]
    return {name: library.mla_block_bytes(i) for i, name in enumerate(_names(library.mla_format))}


def panel_formats(*, transposed: bool = False) -> frozenset[str]:
    """Returns those of `formats` whose weights may lie in panels: none with most instruction sets.

    Args:
      transposed: those alone whose panels `head_transposed` reads too.
    """
    library = _load()[0]
    names = list(_names(library.mla_format)) if library else []
    if not names:
        return frozenset()
    has_kernel = library.mla_transposes_panels if transposed else library.mla_reads_panels
    return frozenset(name for i, name in enumerate(names) if has_kernel(i))


def to_panels(blocks: np.ndarray, panels: int, scale: int) -> None:
    """Lays u8[rows, n, bytes] out in panels where they are; `scale` is its place in a block, -1 for none."""
    sizes = map(ctypes.c_int64, (panels, *blocks.shape[1:], scale))
    _load()[0].mla_to_panels(ctypes.c_void_p(blocks.ctypes.data), *sizes)


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


def set_codebook(name: str, weights: np.ndarray) -> None:
    """Gives the kernels the codebook of a format; products with such weights are refused without it.

    Args:
      name: "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s" or "iq1", of iq1_s, iq1_m and their rows.
      weights: int8[codes, weights of a code], magnitudes, in "iq1" -1, 0 and 1. Kept, not copied.

    Raises:
      ValueError: if there is no codebook of this name and size.
    """
    weights = np.ascontiguousarray(weights, np.int8)
    place, size = ctypes.c_void_p(weights.ctypes.data), ctypes.c_int64(weights.size)
    if not _load()[0].mla_set_codebook(name.encode(), place, size):
        raise ValueError(f"name and weights must be those of a codebook, got {name!r} and {weights.shape}.")
    _codebooks[name] = weights


def call(handler: str, shape: tuple[int, ...]):
    """Returns what calls a handler with arrays and attributes, for f32[shape]; under vmap it loops."""
    return jax.ffi.ffi_call(handler, jax.ShapeDtypeStruct(shape, jnp.float32), vmap_method="sequential")


def write(handler: str, arrays: tuple[jax.Array, ...], targets: tuple[jax.Array, ...], **attributes):
    """Calls a handler that writes to `targets`, and returns them; in place where nobody else needs them."""
    shapes = [jax.ShapeDtypeStruct(target.shape, target.dtype) for target in targets]
    aliases = {len(arrays) + i: i for i in range(len(targets))}
    handle = jax.ffi.ffi_call(handler, shapes, vmap_method="sequential", input_output_aliases=aliases)
    return handle(*arrays, *targets, **attributes)


def _names(function):
    index = 0
    while (name := function(index)) is not None:
        yield name.decode()
        index += 1
