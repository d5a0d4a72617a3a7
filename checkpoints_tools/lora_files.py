"""LoRA adapters on disk, in either of their formats: a GGUF file, or a folder of PEFT."""

import os
import pathlib
from collections.abc import Container, Sequence
from typing import Any

from checkpoints_tools import lora_forms, lora_gguf, lora_peft
from checkpoints_tools import names as names_lib
from checkpoints_tools.load import Checkpoint
from mla_jax import lora as lora_lib
from mla_jax.config import ModelConfig
from mla_jax.lora import Lora

AdapterSource = str | pathlib.Path | Lora
"""An adapter, or where it is on disk."""


def load_lora(path: str | os.PathLike, config: ModelConfig, names: Container[str]) -> Lora:
    """Reads an adapter.

    Args:
      path: a GGUF file, or a folder that PEFT wrote.
      config: the model.
      names: GGUF names of its tensors. An adapter of `attn_kv_b` becomes two of `attn_k_b` and `attn_v_b`
        where the model has these, and the other way round; likewise for experts with gate and up in one.

    Returns:
      The adapter, float32, on the default device.

    Raises:
      GGUFError: if it is no sound adapter of this model.
    """
    load = lora_peft.load_peft if os.path.isdir(path) else lora_gguf.load_gguf
    return load(path, config, names)


def save_lora(path: str | os.PathLike, lora: Lora, config: ModelConfig) -> None:
    """Writes an adapter in float32, whole or not at all.

    Args:
      path: ends in ".gguf" for a GGUF file, which replaces one that is there; else a folder for PEFT, which
        must not exist, or be empty.
      lora: the adapter.
      config: the model.

    Raises:
      ValueError: if the folder is in use, or for what could not be loaded: no adapters, an alpha or a rank
        out of range, or a number that is not finite.
      OSError: if it cannot be written.
    """
    if os.fspath(path).endswith(".gguf"):
        lora_gguf.save_gguf(path, lora, name=os.path.basename(path).removesuffix(".gguf"))
    else:
        lora_peft.save_peft(path, lora, config)


def adapted(
    checkpoint: Checkpoint, adapters: Sequence[AdapterSource | tuple[AdapterSource, float]]
) -> dict[str, Any]:
    """Returns the weights of a checkpoint with LoRA adapters beside them, whose updates add up.

    Args:
      checkpoint: the model.
      adapters: `Lora`s, GGUF files or folders of PEFT, each alone or in a pair with what multiplies its
        updates.

    Raises:
      ValueError: for one that is not in a list, what is no sound adapter of this model, or a scale that is
        not finite or makes factors of what is not.
    """
    if isinstance(adapters, AdapterSource):
        raise ValueError(f"adapters must be in a list, got {adapters!r:.80} alone.")
    params, at_hand = checkpoint.params, names_lib.flatten(checkpoint.params)
    for source, strength in [_pair(adapter) for adapter in adapters]:
        if not isinstance(source, Lora):
            source = load_lora(source, checkpoint.config, at_hand)
        lora_forms.check_strength(source, strength)
        params = lora_lib.attach(params, source, strength)
    return params


def _pair(adapter):
    pair = (adapter, 1.0) if isinstance(adapter, AdapterSource) else adapter
    if not isinstance(pair, Sequence) or len(pair) != 2 or not isinstance(pair[0], AdapterSource):
        raise ValueError(f"adapters must be files, folders or `Lora`s, or pairs, got {adapter!r:.80}.")
    return pair
