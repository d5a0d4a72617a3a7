"""Goes through a tensor some rows at a time, so that memory does not depend on its size."""

import math
from collections.abc import Iterator

import jax
import numpy as np

from checkpoints_tools.gguf_file import GGUFFile
from checkpoints_tools.load import read_weight
from mla_jax import quant
from mla_jax.quant import QuantizedTensor

CHUNK_WEIGHTS = 1 << 22  # at a time: 16 MiB when decoded
_GROUP = 16  # rows that interleaved types may have together

decoded = jax.jit(quant.decode)  # of a chunk; all tools share what was compiled


def row_chunks(file: GGUFFile, name: str) -> Iterator[tuple[int, np.ndarray | QuantizedTensor]]:
    """Yields a tensor that can be decoded, seen as a matrix as by `read_weight`.

    All chunks have one shape, for one compiled function: the last may begin with rows of the one before.

    Args:
      file: an opened file.
      name: key of `file.tensors`.

    Yields:
      The first row, and the rows from there on.

    Raises:
      GGUFError: if the type cannot be decoded, or the file cannot be read.
    """
    shape = file.tensors[name].shape or (1,)
    num_rows = math.prod(shape[:-1])
    step = min(num_rows, max(1, CHUNK_WEIGHTS // _GROUP // shape[-1]) * _GROUP)
    for start in range(0, num_rows, step):
        first = min(start, num_rows - step)
        yield first, read_weight(file, name, first, first + step)
