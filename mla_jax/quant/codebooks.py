"""Codebooks of the i-quants: what the codes of 4 or 8 neighbouring weights stand for.

Kept in the package as `codebooks.npz`. Source: ggml-common.h of ggml.
"""

import functools
import importlib.resources

import numpy as np

NAMES = ("iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq1")


@functools.cache
def codebook(name: str) -> np.ndarray:
    """Returns one codebook.

    Args:
      name: one of `NAMES`.

    Returns:
      int8[codes, weights], read once, not writable: magnitudes, but in "iq1" -1, 0 and 1.
    """
    with importlib.resources.files(__package__).joinpath("codebooks.npz").open("rb") as file:
        values = np.load(file)[name]
    values.setflags(write=False)
    return values
