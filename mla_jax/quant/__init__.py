"""Weights in GGUF block formats: the table of formats, the leaf that holds them, and products with them."""

from mla_jax.quant.encode import ENCODABLE, encode
from mla_jax.quant.formats import FORMATS, Format
from mla_jax.quant.matmul import matmul
from mla_jax.quant.tensor import (
    LoraTensor,
    PanelTensor,
    PlanarTensor,
    QuantizedTensor,
    decode,
    in_blocks,
    take_rows,
    to_planes,
)

__all__ = [
    "ENCODABLE",
    "FORMATS",
    "Format",
    "LoraTensor",
    "PanelTensor",
    "PlanarTensor",
    "QuantizedTensor",
    "decode",
    "encode",
    "in_blocks",
    "matmul",
    "take_rows",
    "to_planes",
]
