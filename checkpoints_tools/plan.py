"""What a model takes in memory, told from the header of its file or from a preset: no weight is read."""

import dataclasses
import os

from checkpoints_tools.gguf_file import open_gguf
from checkpoints_tools.inspect import columns
from checkpoints_tools.model_file import check_model
from mla_jax import presets
from mla_jax.cache import bytes_per_token
from mla_jax.config import CACHE_TYPES, ModelConfig, RunConfig


def plan(model: str | os.PathLike, *, ctx_size: int | None, run: RunConfig) -> str:
    """Describes the memory of weights and of the cache in every type.

    Args:
      model: a GGUF file, or the name of a preset.
      ctx_size: tokens of context; None or 0 for as many as the model was made for.
      run: its mode and `cache_type_rope` count.

    Returns:
      Text of some lines, without a newline at the end.

    Raises:
      GGUFError: for a file that is no sound deepseek2 GGUF.
    """
    if is_preset(model):
        config = presets.PRESETS[str(model)]
        weights = f"{presets.parameter_count(config) / 1e9:.2f} billion"
    else:
        config, weights = _read(model)
    ctx_size = ctx_size or config.context_length
    head = [("model", str(model)), ("weights", weights), ("context", f"{ctx_size:,} tokens")]
    table = [("cache", "bytes per token", "MiB in all")]
    for name in CACHE_TYPES:
        table.append((name, *_cache_sizes(config, dataclasses.replace(run, cache_type=name), ctx_size)))
    return columns(head) + "\n\n" + columns(table)


def is_preset(model: str | os.PathLike) -> bool:
    """Whether a model is the name of a preset, and no file."""
    return str(model) in presets.PRESETS and not os.path.exists(model)


def _read(path):
    file = open_gguf(path)
    config, _ = check_model(file)
    num_bytes = sum(info.num_bytes for info in file.tensors.values())
    return config, f"{num_bytes / 2**20:,.1f} MiB in {len(file.tensors)} tensors"


def _cache_sizes(config: ModelConfig, run: RunConfig, ctx_size: int) -> tuple[str, str]:
    try:
        size = bytes_per_token(config, run)
    except ValueError:  # its rows are no whole number of blocks
        return "-", "-"
    return f"{size:,}", f"{size * ctx_size / 2**20:,.1f}"
