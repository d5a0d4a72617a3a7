"""Files and folders of adapters as others write them, good or not."""

import json

import numpy as np
import safetensors.numpy

from checkpoints_tools import TensorData, lora_files, names, write_gguf
from checkpoints_tools.ggml_types import IDS
from checkpoints_tools.save import file_rows
from mla_jax import quant

O_PROJ = "model.layers.0.self_attn.o_proj"
ABOUT = {"general.architecture": "deepseek2", "general.type": "adapter", "adapter.type": "lora"}
_SETTINGS = dict(peft_type="LORA", r=4, lora_alpha=6, target_modules=["o_proj"])


def load(path, model):
    """Returns the adapter of a checkpoint."""
    return lora_files.load_lora(path, model.config, names.flatten(model.params))


def write_file(path, adapters, keys=(), kind="f32"):
    """Writes a file of adapters by tensor; `keys` go before those of a sound one, None for none."""
    tensors = []
    for name, adapter in adapters.items():
        for part, values in ((".lora_a", adapter.a), (".lora_b", adapter.b)):
            values = np.asarray(values)
            data = values if kind == "f32" else file_rows(quant.encode(values, kind))
            tensors.append(TensorData(name + part, values.shape, IDS[kind], data))
    values = ABOUT | {"adapter.lora.alpha": 6.0} | dict(keys)
    write_gguf(path, {key: value for key, value in values.items() if value is not None}, tensors)


def write_folder(folder, tensors, **settings):
    """Writes a folder of PEFT; `settings` go before those of a sound one."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(_SETTINGS | settings))
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def factors(module, a, b):
    """Returns the tensors of a module by their names in a folder."""
    parts = {"lora_A": np.asarray(a), "lora_B": np.asarray(b)}
    return {f"base_model.model.{module}.{part}.weight": np.ascontiguousarray(x) for part, x in parts.items()}


def o_proj(rank=4, seed=0, dtype=np.float32):
    """Draws factors of an update [64, 64]."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in ((rank, 64), (64, rank))]
