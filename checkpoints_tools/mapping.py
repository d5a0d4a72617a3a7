"""Weights that stay in their file: the system reads pages when they are used and drops them in need.

So a file may be larger than memory, at the speed of the disk. A file that fits is read instead: its weights
lie in huge pages then and do not depend on the file any more. One that is truncated while it is mapped ends
the process (SIGBUS), which nothing can catch; a file that takes the place of a mapped one does no harm.
Nothing can be written through a mapping.
"""

import os
import shlex
import time
from collections.abc import Iterable, Mapping

import numpy as np
from absl import logging

from checkpoints_tools import gguf_file, layout, memory
from checkpoints_tools.buffers import BUFFER_ALIGNMENT
from checkpoints_tools.gguf_file import GGUFFile, TensorInfo
from mla_jax.config import ModelConfig

MOST_OF_MEMORY = 0.8
"""Share of the memory at hand that tensors may take before they are mapped."""

_MEASURED_TENSORS = 4
_MEASURED_BYTES = 16 << 20  # of each
_PAGE_BYTES = 4096


def views(
    file: GGUFFile,
    config: ModelConfig,
    *,
    arrays: Iterable[str],
    kept: Iterable[str],
    mmap: bool | None,
) -> dict[str, np.ndarray]:
    """Maps what need not be read of a file, and logs what that came to and how fast it can be.

    Args:
      file: the container, opened.
      config: the model in it.
      arrays: names of tensors that become arrays in the memory of this machine.
      kept: names of tensors that the network does not read.
      mmap: whether to map; None: if these tensors take more than `MOST_OF_MEMORY` of what is at hand.

    Returns:
      GGUF name -> uint8[bytes] that cannot be written, of all of `kept`, and of those of `arrays` that JAX
      can use as they lie in the file: none if nothing is to be mapped.

    Raises:
      GGUFError: if the file cannot be mapped, or is not the one that was opened any more.
    """
    arrays, kept = ([file.tensors[name] for name in names] for names in (arrays, kept))
    at_hand, num_bytes = memory.available_memory(), _size([*arrays, *kept])
    is_large = at_hand is not None and num_bytes > MOST_OF_MEMORY * at_hand
    if mmap and not arrays:
        logging.info("%s: is not mapped, for none of its weights lies in host memory", file.path)
    if not arrays or not (is_large if mmap is None else mmap):
        return {}
    whole = [info for info in arrays if not layout.is_taken_apart(info)]
    placed = [info for info in whole if info.offset % BUFFER_ALIGNMENT == 0]
    mapped = [*kept, *placed]
    parts = file.map_parts() if mapped else {}
    found = {info.name: parts[info.path][info.offset : info.offset + info.num_bytes] for info in mapped}
    rest = [info for info in arrays if info.name not in found]
    share = f", more than {MOST_OF_MEMORY:.0%} of the {_told(at_hand)} of memory at hand" if is_large else ""
    text = (
        f"tensors take {_told(num_bytes)}{share}: {len(mapped)} of {len(mapped) + len(rest)} stay in the "
        f"file, to be read when they are used, and {_told(_size(rest))} is read now"
    )
    if is_large and _size(rest) > at_hand:
        text += ", which is more than there is"
    logging.info("%s: %s", file.path, text)
    _tell_misplaced(file.path, [info for info in whole if info.name not in found])
    if is_large:
        _tell_speed(file.path, config, placed, found, at_hand - _size(rest))
    return found


def bytes_from_disk(config: ModelConfig, infos: Iterable[TensorInfo], room: int) -> tuple[int, int]:
    """Returns the bytes of mapped tensors that a token uses, and about how many of them come from disk.

    Args:
      config: the model. Its experts count as equally likely.
      infos: the mapped tensors.
      room: bytes of memory for their pages. What every token uses comes first, and if not even that has room
        each page is gone before it is used again.
    """
    infos = [info for info in infos if info.name != "token_embd.weight"]  # of which one row is used
    experts = _size(info for info in infos if "_exps." in info.name)
    always = _size(infos) - experts
    used = experts * config.moe.num_experts_per_token // config.moe.num_experts if experts else 0
    if room < always:
        return always + used, always + used
    missing = max(0, experts - (room - always))
    return always + used, used * missing // max(1, experts)


def _tell_misplaced(path: str, infos: list[TensorInfo]) -> None:
    if infos:
        command = f"mla-jax merge {shlex.quote(path)} OUT --alignment {BUFFER_ALIGNMENT}"
        text = (
            f"{len(infos)} tensors of {_told(_size(infos))} cannot be mapped, for they begin at no multiple "
            f"of {BUFFER_ALIGNMENT} bytes; `{command}` writes a copy in which they do"
        )
        logging.info("%s: %s", path, text)


def _tell_speed(
    path: str, config: ModelConfig, infos: list[TensorInfo], found: Mapping[str, np.ndarray], room: int
) -> None:
    used, from_disk = bytes_from_disk(config, infos, room)
    speed = _disk_speed(infos, found) if from_disk else None
    if speed is not None:
        text = (
            f"a token uses {_told(used)} of what is mapped, about {_told(from_disk)} of it from a disk that "
            f"gave {speed / 1e9:.2f} GB/s just now: at most {speed / from_disk:.3g} tokens/s"
        )
        logging.info("%s: %s", path, text)


def _disk_speed(infos: list[TensorInfo], found: Mapping[str, np.ndarray]) -> float | None:
    """Returns the bytes per second that come of using mapped tensors whose pages are not in memory."""
    if not hasattr(os, "posix_fadvise"):
        return None
    num_bytes = seconds = 0
    for info in sorted(infos, key=lambda info: info.num_bytes)[-_MEASURED_TENSORS:]:
        view = found[info.name][:_MEASURED_BYTES]
        with gguf_file.opened(info.path) as part:
            os.posix_fadvise(part.fileno(), info.offset, view.size, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        view[::_PAGE_BYTES].max(initial=0)
        seconds += time.perf_counter() - start
        num_bytes += view.size
    return num_bytes / max(seconds, 1e-9)


def _size(infos: Iterable[TensorInfo]) -> int:
    return sum(info.num_bytes for info in infos)


def _told(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"
