"""A weight kept in its GGUF blocks, or in what kernels read in their place; read whole or by rows."""

import dataclasses

import jax
import jax.numpy as jnp

from cpu_kernels import panels as panels_lib
from mla_jax.quant import formats
from pallas_kernels import weight_tiles


class _Stored:
    """What is alike of every form of a weight that is no array; each has a `shape`."""

    @property
    def ndim(self) -> int:
        """Number of axes of the decoded weight."""
        return len(self.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """Type that the weight decodes to."""
        return jnp.dtype(jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedTensor(_Stored):
    """A weight kept as the bytes of its GGUF blocks: exact on the way in, byte-equal on the way out.

    Attributes:
      blocks: uint8[..., blocks per row, bytes per block].
      header: uint8[..., bytes], what formats with a scale per row have in front of each; None for the others.
      format: key of `formats.FORMATS`; static under jit.
    """

    blocks: jax.Array
    header: jax.Array | None = None
    format: str = dataclasses.field(metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded weight."""
        *lead, count, _ = self.blocks.shape
        return (*lead, count * formats.FORMATS[self.format].block_size)

    def __getitem__(self, index) -> "QuantizedTensor":
        """Selects along leading axes, for example experts or rows; a row itself is never cut."""
        parts = index if isinstance(index, tuple) else (index,)
        if len(parts) >= self.ndim or any(part is None or part is Ellipsis for part in parts):
            raise ValueError(
                f"a QuantizedTensor of shape {self.shape} takes at most {self.ndim - 1} indices, "
                f"without None and Ellipsis, so that its rows of blocks stay whole, got {index}."
            )
        return jax.tree.map(lambda leaf: leaf[index], self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanarTensor(_Stored):
    """A weight whose blocks are taken apart for a GPU: the same numbers, see `pallas_kernels.weight_tiles`.

    Attributes:
      planes: arrays [..., columns].
      format: key of `formats.FORMATS`; static under jit.
    """

    planes: tuple[jax.Array, ...]
    format: str = dataclasses.field(metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded weight."""
        return (*self.planes[0].shape[:-1], weight_tiles.num_columns(self.planes, self.format))

    def __getitem__(self, index) -> "PlanarTensor":
        """Selects along the first axis, for example an expert."""
        return jax.tree.map(lambda leaf: leaf[index], self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PanelTensor(_Stored):
    """A weight whose blocks lie in panels of 16 rows for the CPU: the same bytes, see `cpu_kernels.panels`.

    Attributes:
      panels: uint8[..., rows / 16, blocks per row, 16 * bytes per block].
      header: as of a `QuantizedTensor`.
      format: key of `formats.FORMATS`; static under jit.
    """

    panels: jax.Array
    header: jax.Array | None = None
    format: str = dataclasses.field(metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded weight."""
        *lead, panels, count, _ = self.panels.shape
        return (*lead, panels * panels_lib.ROWS, count * formats.FORMATS[self.format].block_size)

    def __getitem__(self, index) -> "PanelTensor":
        """Selects along leading axes, for example an expert; a matrix is never cut."""
        if len(index if isinstance(index, tuple) else (index,)) > self.ndim - 2:
            raise ValueError(
                f"a PanelTensor of shape {self.shape} takes at most {self.ndim - 2} indices; "
                "quant.in_blocks(weight) can be indexed by rows."
            )
        return jax.tree.map(lambda leaf: leaf[index], self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraTensor(_Stored):
    """The weight `base + b @ a`: a weight with the low-rank update of an adapter beside it.

    Attributes:
      base: [..., out, in], in any form.
      a: f32[..., r, in].
      b: f32[..., out, r], scaled already.

    Source: LoRA (arXiv:2106.09685), section 4.1.
    """

    base: "Weight"
    a: jax.Array
    b: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.base.shape

    def __getitem__(self, index) -> "LoraTensor":
        """Selects along leading axes, for example an expert; a matrix is never cut."""
        if len(index if isinstance(index, tuple) else (index,)) > self.ndim - 2:
            raise ValueError(f"a LoraTensor of shape {self.shape} takes at most {self.ndim - 2} indices.")
        return LoraTensor(base=self.base[index], a=self.a[index], b=self.b[index])


Weight = jax.Array | QuantizedTensor | PlanarTensor | PanelTensor | LoraTensor

PLAIN = ("f16", "bf16")  # formats of planes that are the numbers themselves

_repack = jax.jit(weight_tiles.repack, static_argnames="format")  # fused: 4 bytes a code are never held


def to_planes(weight: Weight) -> Weight:
    """Returns a weight as a `PlanarTensor` where kernels of a GPU are to read it, any other as it is.

    Those are weights in some formats, and experts of 16 bits: dense ones are served by XLA's product.
    """
    if isinstance(weight, LoraTensor):
        return dataclasses.replace(weight, base=to_planes(weight.base))
    weight = in_blocks(weight)
    if not isinstance(weight, QuantizedTensor):
        name = {"float16": "f16", "bfloat16": "bf16"}.get(weight.dtype.name)
        return PlanarTensor(planes=(weight,), format=name) if name and weight.ndim == 3 else weight
    if weight.format not in weight_tiles.LAYOUTS:
        return weight
    planes = _repack(weight.blocks, weight.header, weight.format)
    return PlanarTensor(planes=planes, format=weight.format)


def in_blocks(weight: Weight) -> Weight:
    """Returns a weight in panels as the `QuantizedTensor` that it was, any other as it is."""
    if not isinstance(weight, PanelTensor):
        return weight
    blocks = panels_lib.unpack(weight.panels, format=weight.format)
    return QuantizedTensor(blocks=blocks, header=weight.header, format=weight.format)


def decode_blocks(weight: QuantizedTensor) -> jax.Array:
    """Returns the weight as float32[..., blocks per row, weights in a block]."""
    decode_format = formats.FORMATS[weight.format].decode
    if weight.header is None:
        return decode_format(weight.blocks)
    return decode_format(weight.blocks, weight.header)


def decode(weight: Weight, dtype=jnp.float32) -> jax.Array:
    """Returns the whole weight as a plain array.

    Args:
      weight: of shape [...], in any form.
      dtype: type of the result; blocks are decoded in float32 first.

    Returns:
      dtype[...], the weight.
    """
    if isinstance(weight, LoraTensor):
        update = jnp.matmul(weight.b, weight.a, precision="highest")
        return (decode(weight.base) + update).astype(dtype)
    if isinstance(weight, PlanarTensor):
        return weight_tiles.decode(weight.planes, weight.format).astype(dtype)
    weight = in_blocks(weight)
    if not isinstance(weight, QuantizedTensor):
        return jnp.asarray(weight).astype(dtype)
    return decode_blocks(weight).reshape(weight.shape).astype(dtype)


def take_rows(weight: Weight, ids: jax.Array) -> jax.Array:
    """Returns some rows of a weight, for example the embeddings of tokens; only these rows are decoded.

    Args:
      weight: [rows, size], an array or in blocks; panels, which no embedding lies in, are undone first.
      ids: int[...], each in [0, rows): the caller has checked them.

    Returns:
      float32[..., size].
    """
    take = lambda part: jax.tree.map(lambda leaf: jnp.take(leaf, ids, axis=0, mode="clip"), in_blocks(part))
    if isinstance(weight, LoraTensor):
        return decode(take(weight.base)) + jnp.matmul(take(weight.b), weight.a, precision="highest")
    return decode(take(weight))
