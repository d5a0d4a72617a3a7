"""Weights laid out in panels for the CPU kernels while they are read: the same bytes in another order.

Embeddings, of which rows are read, stay in blocks; so do weights of other formats, and where not all 16 rows
of a panel are of one matrix. The up-projection of the latent is applied in two ways, which some of the
formats have kernels for; files that have it in two parts keep both in blocks, as one is decoded for prompts.
"""

from collections.abc import Iterable

import jax
import numpy as np
from absl import logging

import cpu_kernels
from cpu_kernels import panels
from mla_jax.config import ModelConfig
from mla_jax.quant import PanelTensor, QuantizedTensor, dispatch

_IN_BLOCKS = ("token_embd.", "attn_k_b.", "attn_v_b.")


def formats(*, transposed: bool = False) -> frozenset[str]:
    """Returns the formats whose weights are read out of panels: none if XLA computes everything.

    Args:
      transposed: those alone that are read so in both directions.
    """
    is_used = jax.default_backend() == "cpu" and cpu_kernels.available() and not dispatch.is_exact()
    return cpu_kernels.panel_formats(transposed=transposed) if is_used else frozenset()


def lay_out(
    name: str, weight: np.ndarray | QuantizedTensor, config: ModelConfig
) -> np.ndarray | QuantizedTensor | PanelTensor:
    """Returns the weight of a GGUF name in panels if the kernels read it out of them, in the same memory."""
    is_up = "attn_kv_b." in name
    if not isinstance(weight, QuantizedTensor) or any(part in name for part in _IN_BLOCKS):
        return weight
    *lead, rows, per_row, size = weight.blocks.shape
    if weight.format not in formats(transposed=is_up) or rows == 0 or rows % panels.ROWS:
        return weight
    # Of matrices in one weight each must begin a panel: gates and ups, keys and values of each head.
    sizes = [rows // 2] if "gate_up" in name else []
    sizes += [config.mla.qk_nope_head_dim, config.mla.v_head_dim] if is_up else []
    if any(part % panels.ROWS for part in sizes):
        return weight
    found = panels.pack(weight.blocks.reshape(-1, per_row, size), format=weight.format)
    found = found.reshape(*lead, rows // panels.ROWS, *found.shape[1:])
    return PanelTensor(panels=found, header=weight.header, format=weight.format)


def tell(path: str, weights: Iterable, *, is_asked: bool | None) -> None:
    """Logs how many weights of a file were laid out in panels, and why none was if that was asked for."""
    laid_out = [weight for weight in weights if isinstance(weight, PanelTensor)]
    num_bytes = sum(weight.panels.size for weight in laid_out)
    if laid_out:
        text = "%s: %d weights lie in panels of 16 rows, %.1f MiB in all"
        logging.info(text, path, len(laid_out), num_bytes / 2**20)
    elif is_asked and not formats():
        reason = "these are for kernels with AVX-512 VNNI, which do not compute here"
        logging.info("%s: no weights lie in panels: %s", path, reason)
    elif is_asked:
        logging.info("%s: no weights lie in panels: none of those read has a format and rows for it", path)
