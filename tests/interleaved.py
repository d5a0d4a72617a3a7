"""Rows of the interleaved types, and small models that have every one of them."""

import numpy as np
from synthetic import write_deepseek2

from checkpoints_tools import gguf_file, interleave, layout
from checkpoints_tools.ggml_types import IDS, TYPES
from checkpoints_tools.gguf_writer import TensorData, write_gguf
from checkpoints_tools.interleaved_layouts import LAYOUTS
from mla_jax import quant

GROUPS, SIZE = 3, 768
SIZES = dict(embed=256, q_lora=256, kv_lora=256, nope=32, v=128, ff=256, ff_exp=256)
SUPPORTED = [name for name in interleave.BASES if IDS[name] in layout.FORMAT_NAMES]


def random_data(name, num_groups=GROUPS, size=SIZE, seed=0):
    """Returns random bytes of whole groups."""
    num_bytes = num_groups * interleave.BASES[name].rows * TYPES[IDS[name]].row_bytes(size)
    return np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)


def sane_data(name, num_groups=GROUPS, size=SIZE, seed=0):
    """Returns random bytes of whole groups whose scales are finite."""
    rows = interleave.deinterleave(name, random_data(name, num_groups, size, seed), size)
    rng, base, fields = np.random.default_rng(seed), interleave.BASES[name], LAYOUTS[name].base_fields
    blocks = rows[:, base.header_bytes :].reshape(len(rows), -1, base.block_bytes)
    if base.header_bytes:
        dtype = np.float16 if base.header_bytes == 2 else np.float32
        scales = rng.uniform(-0.1, 0.1, (len(rows), 1)).astype(dtype).view(np.uint8)
        rows[:, : scales.shape[1]] = scales
    for start in fields["d"][:, 0] // 8 if "d" in fields else ():
        scales = rng.uniform(-0.1, 0.1, (*blocks.shape[:2], 1)).astype(np.float16)
        blocks[..., start : start + 2] = scales.view(np.uint8)
    if "exponent" in fields:
        blocks[..., 0] = rng.integers(110, 140, blocks.shape[:2])
    if base.name == "bf16":
        rows[:, 1::2] &= 0xBF
    return interleave.interleave(name, rows, size)


def decoded(name, data, size=SIZE):
    """Returns float32[rows, size], taken apart and decoded."""
    rows, base = interleave.deinterleave(name, data, size), interleave.BASES[name]
    blocks = rows[:, base.header_bytes :].reshape(len(rows), -1, base.block_bytes)
    header = rows[:, : base.header_bytes] if base.header_bytes else None
    return np.asarray(quant.decode(quant.QuantizedTensor(blocks=blocks, header=header, format=base.name)))


def write_twins(folder, **options):
    """Writes a model of random weights as packed.gguf, and as single.gguf with the rows taken apart.

    Returns:
      GGUF name -> interleaved type. Tensors of the types whose rows have no type of their own are interleaved
      in both files.
    """
    write_deepseek2(folder / "f32.gguf", **dict(sizes=SIZES, alignment=None, experts=2, used=1) | options)
    file = gguf_file.open_gguf(folder / "f32.gguf")
    single, packed, chosen = [], [], {}
    for name, info in file.tensors.items():
        tensor = TensorData(name, info.shape, info.ggml_type, file.read(name))
        twins = tensor, tensor
        if len(info.shape) > 1 and "ffn_gate_inp" not in name:
            fitting = [kind for kind in SUPPORTED if _fits(kind, info.shape)]
            chosen[name] = min(fitting, key=list(chosen.values()).count)
            twins = _twins(name, chosen[name], info.shape)
        single.append(twins[0])
        packed.append(twins[1])
    write_gguf(folder / "single.gguf", file.metadata, single)
    write_gguf(folder / "packed.gguf", file.metadata, packed)
    return chosen


def _fits(kind, shape):
    base = interleave.BASES[kind]
    return shape[-2] % base.rows == 0 and shape[-1] % base.block_size == 0


def _twins(name, kind, shape):
    base = interleave.BASES[kind]
    data = sane_data(kind, int(np.prod(shape[:-1])) // base.rows, shape[-1])
    packed = TensorData(name, shape, IDS[kind], data)
    if base.name in interleave.BASES:
        return packed, packed
    return TensorData(name, shape, IDS[base.name], interleave.deinterleave(kind, data, shape[-1])), packed
