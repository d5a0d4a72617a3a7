"""Describes a GGUF file as text: any architecture, any known tensor type."""

import math
import os
from collections.abc import Iterable
from typing import Any

from checkpoints_tools import hparams
from checkpoints_tools.gguf_file import GGUFError, GGUFFile, open_gguf
from checkpoints_tools.gguf_metadata import Field
from checkpoints_tools.model_file import check_model
from mla_jax.cache import bytes_per_token
from mla_jax.config import ModelConfig, RunConfig

_MAX_ELEMENTS = 6  # of an array that are shown
_MAX_TEXT = 60


def describe(path: str | os.PathLike) -> str:
    """Returns a description of a GGUF file: sizes, cache per token, key-values and tensors.

    Args:
      path: the file, or the first part of a split one. No tensor data is read.

    Returns:
      Text of many lines, without a newline at the end. For a file that cannot be run, the reason is in it.

    Raises:
      GGUFError: if the container itself is not sound.
    """
    file = open_gguf(path)
    parts = [_summary(file), _keys(file), _tensors(file)]
    return "\n\n".join(parts)


def _summary(file: GGUFFile) -> str:
    num_weights = sum(math.prod(info.shape) for info in file.tensors.values())
    num_bytes = sum(info.num_bytes for info in file.tensors.values())
    rows = [
        ("file", file.path),
        ("architecture", short(file.metadata.get("general.architecture"))),
        ("name", short(file.metadata.get("general.name"))),
        ("tensors", f"{len(file.tensors)}, {num_weights:,} weights, {num_bytes:,} bytes"),
        ("bits per weight", f"{8 * num_bytes / num_weights:.2f}" if num_weights else "-"),
        ("types", _type_counts(file)),
    ]
    try:
        config, _ = check_model(file)
        rows += [*_sizes(config), ("memory", _memory(config, num_bytes))]
        hparams.vocabulary(file.metadata, config, file.path)
    except GGUFError as error:
        rows.append(("cannot be run", str(error).removeprefix(f"{file.path}: ")))
    return columns(rows)


def _type_counts(file: GGUFFile) -> str:
    counts: dict[str, int] = {}
    for info in file.tensors.values():
        counts[info.type_name] = counts.get(info.type_name, 0) + 1
    return ", ".join(f"{count} x {name}" for name, count in counts.items()) or "-"


def _sizes(config: ModelConfig) -> list[tuple[str, str]]:
    mla, moe = config.mla, config.moe
    latent, heads = (bytes_per_token(config, RunConfig(mla=mode)) for mode in (3, 0))
    compression = "no" if mla.q_lora_rank is None else mla.q_lora_rank
    sizes = [
        ("layers", f"{config.num_layers}, {config.num_dense_layers} of them dense"),
        ("embedding", f"{config.embed_dim}, vocabulary {config.vocab_size}"),
        ("context", f"{config.context_length}, rope scaling {config.rope.scaling} x {config.rope.factor:g}"),
        (
            "attention",
            f"{mla.num_heads} heads of {mla.qk_nope_head_dim} + {mla.qk_rope_head_dim} rotary, values "
            f"{mla.v_head_dim}, latent {mla.kv_lora_rank}, query compression {compression}",
        ),
    ]
    if moe is not None:
        groups = f", best {moe.num_groups_used} of {moe.num_groups} groups" if moe.num_groups > 1 else ""
        sizes.append(
            (
                "experts",
                f"{moe.num_experts_per_token} of {moe.num_experts} by {moe.gating}{groups}, "
                f"{moe.num_shared_experts} shared, hidden {moe.expert_hidden_dim}",
            )
        )
    return [
        *sizes,
        (
            "cache per token",
            f"{latent:,} bytes of latent in f16 (mla 1 to 3), {heads:,} bytes of keys and values (mla 0)",
        ),
    ]


def _memory(config: ModelConfig, num_bytes: int) -> str:
    cache = bytes_per_token(config, RunConfig()) * config.context_length
    return (
        f"{num_bytes / 2**20:,.1f} MiB of weights, {cache / 2**20:,.1f} MiB of cache for all "
        f"{config.context_length:,} tokens"
    )


def _keys(file: GGUFFile) -> str:
    rows = [(short(key), field.type_name, show_field(field)) for key, field in file.metadata.fields.items()]
    return columns([("key", "type", "value"), *rows])


def _tensors(file: GGUFFile) -> str:
    rows = [
        (plain(info.name), " x ".join(map(str, info.shape)), info.type_name, f"{info.num_bytes:,}")
        for info in file.tensors.values()
    ]
    return columns([("tensor", "shape", "type", "bytes"), *rows])


def show_field(field: Field) -> str:
    """Returns the value of a key as text, shortened."""
    if field.count is None:
        return short(field.value())
    shown = [short(element) for element in field.value(limit=_MAX_ELEMENTS)]
    more = ["..."] if field.count > len(shown) else []
    return f"[{', '.join(shown + more)}] ({field.count})"


def short(value: Any) -> str:
    """Returns a value as text, shortened, as a terminal shows it."""
    if value is None:
        return "-"
    text = f"{value:.7g}" if isinstance(value, float) else plain(value)
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 3] + "..."


def plain(value: Any) -> str:
    """Returns text that a terminal shows as it is: control characters are escaped."""
    is_odd = isinstance(value, str) and (not value.isprintable() or value != value.strip() or not value)
    return repr(value) if is_odd else str(value)


def columns(rows: Iterable[tuple[str, ...]]) -> str:
    """Lays rows of cells out as a table, each column as wide as its longest cell."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
