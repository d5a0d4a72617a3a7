"""LoRA adapters in GGUF files, as llama.cpp and ik_llama.cpp read them with `--lora`.

Tensors `NAME.lora_a` [..., r, in] and `NAME.lora_b` [..., out, r] stand for `alpha / r * b @ a`, which is
added to the tensor NAME of the model; those of experts are stacked.
"""

import os
from collections.abc import Container, Mapping

import jax
import numpy as np

from checkpoints_tools import hparams, lora_forms
from checkpoints_tools.ggml_types import IDS
from checkpoints_tools.gguf_file import GGUFError, GGUFFile, open_gguf
from checkpoints_tools.gguf_header import shown
from checkpoints_tools.gguf_writer import TensorData, write_gguf
from checkpoints_tools.load import read_weight
from checkpoints_tools.row_chunks import decoded
from mla_jax import lora as lora_lib
from mla_jax import quant
from mla_jax.config import ModelConfig
from mla_jax.lora import Adapter, Lora

_KIND = {"general.type": "adapter", "adapter.type": "lora"}
_ALPHA = "adapter.lora.alpha"
_INVOKED = "adapter.alora.invocation_tokens"  # of adapters that begin within a prompt
_PARTS = (".lora_a", ".lora_b")
_RANKS = 8  # ik_llama.cpp reads so many numbers of a row at a time, beyond its end if there are fewer


def save_gguf(path: str | os.PathLike, lora: Lora, *, name: str = "lora") -> None:
    """Writes an adapter in float32; the file is there whole or not at all.

    Args:
      path: the file; one that is there is replaced.
      lora: the adapter, of tensors as its model has them. Zeros make ranks multiples of 8.
      name: of the adapter, for those who look into the file.

    Raises:
      ValueError: for what `lora_forms.check_savable` refuses.
      OSError: if the file cannot be written.
    """
    lora_forms.check_savable(lora.adapters, lora.alpha)
    padded = {tensor: _padded(adapter) for tensor, adapter in lora.adapters.items()}
    lora_forms.check_savable(padded, lora.alpha)
    tensors = []
    for tensor, adapter in padded.items():
        for part, values in zip(_PARTS, (adapter.a, adapter.b), strict=True):
            tensors.append(TensorData(tensor + part, values.shape, IDS["f32"], values))
    about = {
        "general.architecture": hparams.ARCHITECTURE,
        **_KIND,
        "general.name": name,
        "general.alignment": hparams.NEW_FILE_ALIGNMENT,
        _ALPHA: float(lora.alpha),
    }
    write_gguf(path, about, tensors)


def _padded(adapter: Adapter) -> Adapter:
    """Returns an adapter of a rank that is a multiple of 8, and the update of which is the same."""
    more = -adapter.rank % _RANKS
    none = [(0, 0)] * (adapter.a.ndim - 2)
    a = np.pad(np.asarray(adapter.a, np.float32), [*none, (0, more), (0, 0)])
    b = np.pad(np.asarray(adapter.b, np.float32), [*none, (0, 0), (0, more)])
    return lora_forms.scaled(Adapter(a=a, b=b), (adapter.rank + more) / adapter.rank)


def load_gguf(path: str | os.PathLike, config: ModelConfig, names: Container[str]) -> Lora:
    """Reads an adapter.

    Args:
      path: the file; its tensors may have any type that can be decoded.
      config: the model.
      names: GGUF names of its tensors, see `lora_forms.fit`.

    Returns:
      The adapter, float32, on the default device.

    Raises:
      GGUFError: for a file that is no sound adapter of this model.
    """
    file = open_gguf(path)
    _check_kind(file)
    shapes = lora_forms.known_shapes(config)
    adapters = {name: _read(file, name, shapes) for name in _tensors(file)}
    alpha = _alpha(file)
    if alpha == 0:  # which says that the factors are scaled already
        alpha = 1.0
        adapters = {name: lora_forms.scaled(part, part.b.shape[-1]) for name, part in adapters.items()}
    try:
        fitted = lora_forms.fit(adapters, config, names)
        lora_forms.check_finite(fitted)
    except ValueError as error:
        raise GGUFError(f"{file.path}: {error}") from None
    return Lora(adapters=jax.device_put(fitted), alpha=alpha)


def _check_kind(file: GGUFFile) -> None:
    for key, wanted in {"general.architecture": hparams.ARCHITECTURE, **_KIND}.items():
        found = file.metadata.get(key)
        if found != wanted:
            raise GGUFError(f"{file.path}: key {key!r} of an adapter must be {wanted!r}, got {shown(found)}.")
    if _INVOKED in file.metadata:
        raise GGUFError(f"{file.path}: key {_INVOKED!r} must not be there: adapters act on all tokens here.")


def _alpha(file: GGUFFile) -> float:
    alpha = file.metadata.get(_ALPHA, 0.0)
    if type(alpha) is not float or not (alpha == 0 or lora_lib.is_alpha(alpha)):
        raise GGUFError(
            f"{file.path}: key {_ALPHA!r} must be 0 or a float {lora_lib.ALPHAS}, got {shown(alpha)}."
        )
    return alpha


def _tensors(file: GGUFFile) -> list[str]:
    """Returns the names of the model's tensors that the file has both factors for."""
    names = dict.fromkeys(name.removesuffix(_PARTS[0]).removesuffix(_PARTS[1]) for name in file.tensors)
    if not names:
        raise GGUFError(f"{file.path}: must hold the tensors of an adapter, it holds none.")
    for name in names:
        if name in file.tensors:
            raise GGUFError(f"{file.path}: tensor {name!r} must end in .lora_a or .lora_b.")
        missing = next((name + part for part in _PARTS if name + part not in file.tensors), None)
        if missing is not None:
            raise GGUFError(f"{file.path}: tensor {missing!r} is missing.")
    return list(names)


def _read(file: GGUFFile, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    infos = [file.tensors[name + part] for part in _PARTS]
    lora_forms.check_shapes(file.path, name, *(info.shape for info in infos), shapes)
    factors = []
    for info in infos:
        rows = read_weight(file, info.name)
        values = decoded(rows) if isinstance(rows, quant.QuantizedTensor) else rows
        factors.append(np.asarray(values, np.float32).reshape(info.shape))
        if not np.isfinite(factors[-1]).all():
            raise GGUFError(f"{file.path}: tensor {info.name!r} must be finite, it is not.")
    return Adapter(a=factors[0], b=factors[1])
