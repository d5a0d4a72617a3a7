"""LoRA adapters on disk, in either of their formats: a GGUF file, or a folder of PEFT."""

import os
from collections.abc import Container

from checkpoints_tools import lora_gguf, lora_peft
from mla_jax.config import ModelConfig
from mla_jax.lora import Lora


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
