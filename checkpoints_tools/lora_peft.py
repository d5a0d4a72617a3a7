"""LoRA adapters in folders of PEFT: `adapter_config.json` and `adapter_model.safetensors`.

Names are those of transformers' DeepSeek-V2 and -V3, `base_model.model.` before a module and `.lora_A.weight`
or `.lora_B.weight` after it. Rows and columns are those of GGUF files, see `convert`. Routed experts are
written as modules of their own, `mlp.experts.7.gate_proj`, which PEFT turns into what its transformers has;
read are also the stacks that PEFT writes with transformers 5, `mlp.experts` and `mlp.experts.base_layer`.
"""

import collections
import json
import math
import os
import re
from collections.abc import Container, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy
from absl import logging

from checkpoints_tools import folders, hf_names, json_file, layout, lora_forms, safetensors_file
from checkpoints_tools.gguf_file import GGUFError
from checkpoints_tools.safetensors_file import SafetensorsFolder, StoredTensor
from mla_jax import lora as lora_lib
from mla_jax.config import ModelConfig
from mla_jax.lora import Adapter, Lora

CONFIG_NAME, TENSORS_NAME = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model."
_PARTS = ("lora_A", "lora_B")
_TENSOR = re.compile(rf"{re.escape(_PREFIX)}(.+)\.(lora_[AB])\.weight")
_BASE = re.compile(rf"{re.escape(_PREFIX)}(lm_head|model\.embed_tokens)\.base_layer\.weight")
_STACK = re.compile(r"(model\.layers\.(0|[1-9][0-9]{0,8})\.mlp\.experts)(?:\.base_layer)?")
_PATTERN = re.compile(r"(?:\^|\.\*\\?\.)?((?:[A-Za-z0-9_]|\\?\.)+)\$?")  # names, no more of expressions
_IS_LOST = re.compile(r"\.mlp\.(shared_experts\.)?(gate|up|down)_proj$")
_DTYPES = ("F32", "F16", "BF16")
_INITIAL = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # others change the model's weights

_REFUSED = (  # keys of what changes the result, and is not done here
    "alora_invocation_tokens",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)


class _Place(NamedTuple):
    """Where the factors of a module belong.

    Attributes:
      name: GGUF name.
      expert: which one of a stack of experts; None for the whole tensor.
      is_flat: the factors of all experts are rows or columns of one matrix.
      module: its name for the patterns of the config.
    """

    name: str
    expert: int | None
    is_flat: bool
    module: str


def save_peft(folder: str | os.PathLike, lora: Lora, config: ModelConfig, *, base_model: str = "") -> None:
    """Writes an adapter in float32; the folder is there whole or not at all.

    Args:
      folder: it must not exist, or be empty.
      lora: the adapter. What is of `attn_k_b` and `attn_v_b`, or of merged experts, is written as of the
        published modules; where heads have factors of their own its rank grows by their number.
      config: the model.
      base_model: its name or folder, for PEFT.

    Raises:
      ValueError: if the folder is in use, or for what `lora_forms.check_savable` refuses.
      OSError: if it cannot be written.
    """
    lora_forms.check_savable(lora.adapters, lora.alpha)
    host = {name: Adapter(a=np.asarray(part.a), b=np.asarray(part.b)) for name, part in lora.adapters.items()}
    published = layout.expected_shapes(config, ())
    modules, fitted = {}, lora_forms.fit(host, config, published)
    lora_forms.check_savable(fitted, lora.alpha)
    for name, adapter in fitted.items():
        experts = range(len(adapter.a)) if hf_names.is_stack(name) else [None]
        for expert in experts:
            part = adapter if expert is None else Adapter(a=adapter.a[expert], b=adapter.b[expert])
            modules[hf_names.to_hf(name, expert).removesuffix(".weight")] = part
    tensors = {}
    for module, adapter in modules.items():
        for part, values in zip(_PARTS, (adapter.a, adapter.b), strict=True):
            tensors[f"{_PREFIX}{module}.{part}.weight"] = np.ascontiguousarray(values, np.float32)
    if any(_IS_LOST.search(module) for module in modules):
        logging.warning(
            "%s: PEFT with transformers 5 leaves adapters of dense FFNs and shared experts out.", folder
        )
    with folders.creating(folder) as temporary:
        with open(os.path.join(temporary, TENSORS_NAME), "wb") as file:  # else only its owner may read it
            file.write(safetensors.numpy.save(tensors, {"format": "pt"}))
        with open(os.path.join(temporary, CONFIG_NAME), "w", encoding="utf-8") as out:
            json.dump(_config(modules, lora.alpha, published, base_model), out, indent=2)


def load_peft(folder: str | os.PathLike, config: ModelConfig, names: Container[str]) -> Lora:
    """Reads an adapter.

    Args:
      folder: with what `save_pretrained` of PEFT wrote.
      config: the model.
      names: GGUF names of its tensors, see `lora_forms.fit`.

    Returns:
      The adapter, float32, on the default device.

    Raises:
      GGUFError: for a folder that holds no sound adapter of this model, or one that is more than LoRA.
    """
    settings = _Settings(os.path.join(folder, CONFIG_NAME))
    file = safetensors_file.open_file(os.path.join(folder, TENSORS_NAME))
    shapes = lora_forms.known_shapes(config)
    adapters, stacks = {}, collections.defaultdict(dict)
    for module, infos in _modules(file).items():
        place = _place(module, *infos, shapes)
        adapter = _read(file, place, *infos, shapes)
        adapter = lora_forms.scaled(adapter, settings.factor(place.module, adapter.rank))
        if place.expert is None:
            adapters[place.name] = adapter
        else:
            stacks[place.name][place.expert] = adapter
    try:
        for name, experts in stacks.items():
            if name in adapters:
                raise ValueError(f"{name!r} must be adapted as a whole or by experts, it is both.")
            adapters[name] = _stacked(name, experts, shapes[name][0])
        fitted = lora_forms.fit(adapters, config, names)
        lora_forms.check_finite(fitted)
    except ValueError as error:
        raise GGUFError(f"{file.path}: {error}") from None
    return Lora(adapters=jax.device_put(fitted), alpha=settings.alpha)


class _Settings:
    """What `adapter_config.json` says of the scale of updates.

    Attributes:
      alpha: of modules that no pattern is about.
    """

    def __init__(self, path: str):
        values = json_file.read_object(path)
        if values.get("peft_type") != "LORA":
            raise GGUFError(f"{path}: key 'peft_type' must be 'LORA', got {values.get('peft_type')!r:.80}.")
        if values.get("bias", "none") != "none":
            raise GGUFError(f"{path}: key 'bias' must be 'none', got {values['bias']!r:.80}.")
        for key in _REFUSED:
            if values.get(key):
                raise GGUFError(
                    f"{path}: key {key!r} must not be set, as it makes more than plain LoRA of it."
                )
        initial = values.get("init_lora_weights")
        if (initial.lower() if isinstance(initial, str) else initial) not in _INITIAL:
            raise GGUFError(
                f"{path}: key 'init_lora_weights' must be true, false, {', '.join(_INITIAL[3:])} or null, "
                f"as all else changes the model's own weights, got {initial!r:.80}."
            )
        self.alpha = _alpha(path, "key 'lora_alpha'", values.get("lora_alpha"))
        self._by_root = values.get("use_rslora", False)
        if not isinstance(self._by_root, bool):
            raise GGUFError(f"{path}: key 'use_rslora' must be true or false, got {self._by_root!r:.80}.")
        patterns = values.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise GGUFError(f"{path}: key 'alpha_pattern' must be an object, got {patterns!r:.80}.")
        self._alphas: dict[str, tuple[int, float]] = {}  # with their order: the first that fits counts
        for index, (pattern, alpha) in enumerate(patterns.items()):
            match = _PATTERN.fullmatch(pattern)
            if match is None:
                raise GGUFError(
                    f"{path}: key 'alpha_pattern' must have names of modules, got {pattern!r:.80}."
                )
            found = index, _alpha(path, f"pattern {pattern!r:.80} of key 'alpha_pattern'", alpha)
            self._alphas.setdefault(match[1].replace("\\", ""), found)

    def factor(self, module: str, rank: int) -> float:
        """Returns what the update of a module is multiplied by besides `self.alpha / rank`."""
        words = module.split(".")
        ends = (".".join(words[start:]) for start in range(len(words)))
        found = [self._alphas[end] for end in ends if end in self._alphas]
        factor = min(found)[1] / self.alpha if found else 1.0
        return factor * math.sqrt(rank) if self._by_root else factor


def _alpha(path: str, where: str, value: Any) -> float:
    if type(value) not in (int, float) or not lora_lib.is_alpha(value):
        raise GGUFError(f"{path}: {where} must be a number {lora_lib.ALPHAS}, got {value!r:.80}.")
    return float(value)


def _modules(file: SafetensorsFolder) -> dict[str, list[StoredTensor]]:
    """Returns both factors of each module."""
    found = collections.defaultdict(dict)
    for name, info in file.tensors.items():
        if match := _TENSOR.fullmatch(name):
            found[match[1]][match[2]] = info
        elif not _BASE.fullmatch(name):  # a weight of the model, which PEFT writes beside its adapter
            raise info.fail(f"must be named {_PREFIX}MODULE.lora_A.weight or .lora_B.weight")
    if not found:
        raise GGUFError(f"{file.path}: must hold the tensors of an adapter, it holds none.")
    for module, infos in found.items():
        for part in _PARTS:
            if part not in infos:
                raise GGUFError(f"{file.path}: tensor '{_PREFIX}{module:.160}.{part}.weight' is missing.")
    return {module: [infos[part] for part in _PARTS] for module, infos in found.items()}


def _place(module: str, a: StoredTensor, b: StoredTensor, shapes: Mapping[str, layout.Shape]) -> _Place:
    if match := _STACK.fullmatch(module):
        block, sizes = f"blk.{match[2]}.ffn_", (*b.shape[:1], *a.shape[1:])
        for kind, parameter in (("gate_up_exps.weight", "gate_up_proj"), ("down_exps.weight", "down_proj")):
            if sizes == shapes.get(block + kind, ())[1:]:
                return _Place(block + kind, None, True, f"{match[1]}.{parameter}")
        raise a.fail(f"must be of gate_up_proj or down_proj, got {list(a.shape)} and {list(b.shape)}")
    found = hf_names.to_gguf(f"{module}.weight")
    if found is None or found.name not in shapes:
        raise a.fail("must be of a linear module of this model")
    if found.expert is not None and found.expert >= shapes[found.name][0]:
        raise a.fail(f"must be of one of {shapes[found.name][0]} experts")
    return _Place(found.name, found.expert, False, module)


def _read(
    file: SafetensorsFolder,
    place: _Place,
    a: StoredTensor,
    b: StoredTensor,
    shapes: Mapping[str, layout.Shape],
) -> Adapter:
    shape, shape_a, shape_b = shapes[place.name], a.shape, b.shape
    if place.expert is not None:
        shape = shape[1:]
    if place.is_flat:
        rank, rest = divmod(a.shape[0], shape[0])
        if rest or b.shape[1:] != a.shape[:1]:
            raise a.fail(f"must have as many rows for each of {shape[0]} experts as lora_B has columns")
        shape_a, shape_b = (shape[0], rank, *shape_a[1:]), (shape[0], shape_b[0], rank)
    lora_forms.check_shapes(file.path, place.name, shape_a, shape_b, {place.name: shape})
    factors = []
    for info in (a, b):
        if info.dtype not in _DTYPES:
            raise info.fail(f"must be one of {', '.join(_DTYPES)}, got {info.dtype}")
        factors.append(file.read(info.name).astype(np.float32))
        if not np.isfinite(factors[-1]).all():
            raise info.fail("must be finite, it is not")
    if place.is_flat:  # experts are the slow axis of rows, and the fast one of columns
        by_expert = factors[1].reshape(shape_b[1], shape_b[2], shape[0])
        factors = [factors[0].reshape(shape_a), np.moveaxis(by_expert, -1, 0)]
    return Adapter(a=factors[0], b=factors[1])


def _stacked(name: str, experts: Mapping[int, Adapter], num_experts: int) -> Adapter:
    """Returns the adapter of a stack; experts that have none get zeros."""
    some = next(iter(experts.values()))
    if any(adapter.rank != some.rank for adapter in experts.values()):
        raise ValueError(f"the adapters of all experts in {name!r} must have one rank, they have several.")
    part = lambda which: np.stack([which(experts.get(index)) for index in range(num_experts)])
    return Adapter(
        a=part(lambda adapter: np.zeros_like(some.a) if adapter is None else adapter.a),
        b=part(lambda adapter: np.zeros_like(some.b) if adapter is None else adapter.b),
    )


def _config(
    modules: Mapping[str, Adapter], alpha: float, published: Mapping[str, layout.Shape], base_model: str
) -> dict[str, Any]:
    rank = collections.Counter(adapter.rank for adapter in modules.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "rank_pattern": {module: part.rank for module, part in modules.items() if part.rank != rank},
        "lora_alpha": alpha,
        "alpha_pattern": {},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": _targets(modules, published),
    }


def _targets(modules: Mapping[str, Adapter], published: Mapping[str, layout.Shape]) -> list[str]:
    """Returns names that PEFT finds these modules by and no others: the last word if that is enough."""
    word = lambda module: module.rpartition(".")[2]
    counts = collections.Counter()
    for name, shape in published.items():
        is_stack = hf_names.is_stack(name)
        if len(shape) > 1:
            module = hf_names.to_hf(name, 0 if is_stack else None).removesuffix(".weight")
            counts[word(module)] += shape[0] if is_stack else 1
    own = collections.Counter(map(word, modules))
    complete = [found for found in own if own[found] == counts[found]]
    return complete + [module for module in modules if word(module) not in complete]
