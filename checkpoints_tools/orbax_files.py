"""GGUF file -> orbax checkpoint and back, byte by byte.

The folder is an orbax checkpoint of the tree {"params": ..., "unread": [...]}: the parameters as the network
takes them, quantised ones as the bytes of their blocks (and row headers), and the bytes of the tensors that
the network does not read. Beside it `gguf.json` has `config`, `keys` with their exact bytes, `table`, the
tensors in the order of the file, `files`, the sha256 of everything in the folder, and `sha256`, its own.

Unlike the other tools this one holds the whole model in memory, once, as orbax takes trees and not streams;
beside it what is on its way to or from the disk, some times the largest array or 1 GB.
"""

import base64
import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from checkpoints_tools import folders, hparams, json_file, layout, names
from checkpoints_tools.ggml_types import TYPES
from checkpoints_tools.gguf_file import GGUFError, TensorInfo, opened
from checkpoints_tools.gguf_metadata import Field, Metadata
from checkpoints_tools.load import Checkpoint, UnreadTensor, load_gguf
from checkpoints_tools.progress import Progress
from checkpoints_tools.save import save_gguf
from mla_jax import quant
from mla_jax.quant import QuantizedTensor

_FORMAT = "mla-jax checkpoint 1"
_SETTLE_SECONDS = 1.0  # after a failure, in which threads of tensorstore may still make files
_ABOUT = "gguf.json"
_PLAIN_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def to_orbax(gguf: str | os.PathLike, folder: str | os.PathLike, progress: Progress | None = None) -> None:
    """Writes a deepseek2 GGUF file as an orbax checkpoint; the folder is there whole or not at all.

    Args:
      gguf: the file, or the first part of a split one.
      folder: it must not exist, or be empty.
      progress: as for `load_gguf`.

    Raises:
      GGUFError: for a file that is no sound deepseek2 GGUF of types that can be decoded.
      ValueError: if the folder is in use.
      OSError: if it cannot be written.
    """
    with folders.creating(folder) as temporary:
        checkpoint = load_gguf(gguf, progress)
        tree = {"params": checkpoint.params, "unread": [kept.data for kept in checkpoint.unread.values()]}
        _save_tree(temporary, tree, os.fspath(folder))
        about = _about(checkpoint) | {"files": _files(temporary)}
        with open(os.path.join(temporary, _ABOUT), "w") as file:
            json.dump(about | {"sha256": _digest(about)}, file)


def from_orbax(folder: str | os.PathLike, gguf: str | os.PathLike) -> None:
    """Writes what `to_orbax` wrote as the GGUF file that it came from, byte by byte; split files become one.

    Args:
      folder: the checkpoint.
      gguf: the file; one that is there is replaced, and kept as it was if anything fails.

    Raises:
      GGUFError: if the folder is not as it was written, or is no such folder.
      OSError: if the file cannot be written.
    """
    save_gguf(gguf, load_orbax(folder))


def load_orbax(folder: str | os.PathLike) -> Checkpoint:
    """Loads what `to_orbax` wrote.

    Args:
      folder: the checkpoint.

    Returns:
      The checkpoint that `load_gguf` gives for the file, its parameters on the default device.

    Raises:
      GGUFError: if the folder is not as it was written, or is no such folder.
    """
    folder = os.fspath(folder)
    try:
        return _load(folder)
    except (GGUFError, MemoryError):
        raise
    except Exception as error:  # of which orbax raises some itself, beside whatever a wrong JSON leads to
        what = type(error).__name__
        raise GGUFError(
            f"{folder}: must be a whole checkpoint as of a GGUF file, got {what} reading it."
        ) from error


def _save_tree(temporary: str, tree: Any, folder: str) -> None:
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    if shutil.disk_usage(temporary).free < num_bytes:  # orbax itself leaves threads behind that still write
        raise OSError(errno.ENOSPC, f"it needs {num_bytes:,} bytes, and the disk has less", folder)
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)  # of one error orbax logs the traceback of each of its threads
    try:
        with ocp.Checkpointer(_handler(tree)) as checkpointer:
            checkpointer.save(os.path.abspath(temporary), args=ocp.args.StandardSave(tree), force=True)
    except Exception as error:  # a full disk is a ValueError of tensorstore
        time.sleep(_SETTLE_SECONDS)
        match = re.search(r"os_error_code='(\d+)'", str(error))
        if match is None:
            raise
        raise OSError(int(match[1]), os.strerror(int(match[1])), folder) from error
    finally:
        logging.set_verbosity(verbosity)


def _load(folder: str) -> Checkpoint:
    about = _checked_about(folder)
    metadata = Metadata({key: Field(kind, base64.b64decode(raw)) for key, kind, raw in about["keys"]})
    infos = {name: _info(name, tuple(shape), kind, folder) for name, shape, kind in about["table"]}
    config = hparams.model_config(metadata, infos, folder)
    plan = layout.check_layout(config, infos, folder)
    wanted = _abstract(infos, plan)
    with ocp.Checkpointer(_handler(wanted)) as checkpointer:
        tree = checkpointer.restore(os.path.abspath(folder), args=ocp.args.StandardRestore(wanted))
    unread = {
        name: UnreadTensor(shape=infos[name].shape, ggml_type=infos[name].ggml_type, data=np.asarray(data))
        for name, data in zip(plan.unread, tree["unread"], strict=True)
    }
    return Checkpoint(
        config=config,
        params=tree["params"],
        metadata=metadata,
        unread=unread,
        file_tensors=infos,
        path=folder,
    )


def _handler(tree: Any) -> ocp.StandardCheckpointHandler:
    """Limits what is on its way at a time, which must have room for the largest array."""
    sizes = [math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)]
    limit_gb = math.ceil(max(sizes) / 1e9)
    return ocp.StandardCheckpointHandler(save_concurrent_gb=limit_gb, restore_concurrent_gb=limit_gb)


def _checked_about(folder: str) -> dict[str, Any]:
    """Reads what is told about the arrays and compares every file with it, before orbax opens any."""
    about = json_file.read_object(os.path.join(folder, _ABOUT))
    if about.get("format") != _FORMAT:
        raise GGUFError(f"{folder}: must be of format {_FORMAT!r}, got {about.get('format')!r:.80}.")
    if about.pop("sha256", None) != _digest(about):
        raise GGUFError(f"{folder}: must be as it was written, but {_ABOUT} is not.")
    found, wanted = _files(folder), about["files"]
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise GGUFError(f"{folder}: must be as it was written, but {name!r:.80} is not.")
    return about


def _about(checkpoint: Checkpoint) -> dict[str, Any]:
    fields, infos = checkpoint.metadata.fields, checkpoint.file_tensors.values()
    return {
        "format": _FORMAT,
        "config": dataclasses.asdict(checkpoint.config),
        "keys": [[key, field.type, base64.b64encode(field.raw).decode()] for key, field in fields.items()],
        "table": [[info.name, list(info.shape), info.ggml_type] for info in infos],
    }


def _digest(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _files(folder: str) -> dict[str, str]:
    """Returns the sha256 of every file by its path within the folder, `gguf.json` left out."""
    digests = {}
    for parent, _, names_here in os.walk(folder):
        for path in (os.path.join(parent, name) for name in names_here):
            with opened(path) as file:
                digests[os.path.relpath(path, folder)] = hashlib.file_digest(file, "sha256").hexdigest()
    digests.pop(_ABOUT, None)
    return digests


def _info(name: str, shape: tuple[int, ...], ggml_type: int, folder: str) -> TensorInfo:
    return TensorInfo(name, shape, ggml_type, 0, TYPES[ggml_type].num_bytes(shape), folder)


def _abstract(infos: Mapping[str, TensorInfo], plan: layout.Layout) -> dict[str, Any]:
    """Returns the tree of shapes that the arrays must have, each to be put on the default device."""
    sharding = jax.device_put(0).sharding
    array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def weight(name: str, shape: tuple[int, ...]) -> Any:
        format_name = layout.FORMAT_NAMES[infos[name].ggml_type]
        if format_name in _PLAIN_DTYPES:
            return array(shape, _PLAIN_DTYPES[format_name])
        block = quant.FORMATS[format_name]
        header = array((*shape[:-1], block.header_bytes), "uint8") if block.header_bytes else None
        blocks = array((*shape[:-1], shape[-1] // block.block_size, block.block_bytes), "uint8")
        return QuantizedTensor(blocks=blocks, header=header, format=block.name)

    leaves = {name: weight(name, plan.shapes[name]) for name in infos if name in plan.shapes}
    unread = [array((infos[name].num_bytes,), "uint8") for name in plan.unread]
    return {"params": names.unflatten(leaves), "unread": unread}
