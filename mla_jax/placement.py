"""What of a model lies where on one machine: a table from units to devices, by flags or by free memory.

A unit is computed in one piece on one device, and its weights lie there: a layer's attention with its norms,
router, shared expert and cached rows (`attn.3`), its routed experts (`experts.3`) or its dense FFN (`ffn.3`),
the embedding (`embed`), and the output with its norm (`output`).
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from checkpoints_tools import names
from mla_jax.cache import PAGE_SIZE, bytes_per_token
from mla_jax.config import ModelConfig, RunConfig
from mla_jax.nn.transformer import lay_out

CPU = "cpu"
ALL_LAYERS = 1 << 20  # more than any model has
FIT_MARGIN = 1024  # MiB that `--fit` leaves free unless told otherwise
_PLACE = re.compile(r"(?i:(cpu)|gpu(?::(\d{1,3}))?|cuda(\d{1,3}))")
_LOGIT_ROWS = 16  # sequences of a step at most


def gpu(index: int) -> str:
    """Returns the name of a GPU's place, "gpu:0" for the first."""
    return f"gpu:{index}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """What flags ask for.

    Attributes:
      gpu_layers: so many of the last layers are on the GPU; the output counts as the last of all, and the
        embedding is there if everything is.
      overrides: (pattern, place): tensors with the pattern in their GGUF name lie there, the first counts.
      cpu_experts: the experts of so many of the first layers are on the CPU; overrides go before it.
      main_gpu: which GPU "the GPU" is.
    """

    gpu_layers: int = 0
    overrides: tuple[tuple[str, str], ...] = ()
    cpu_experts: int = 0
    main_gpu: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """Where each unit of a model lies.

    Attributes:
      of_unit: unit -> "cpu", "gpu:0", "gpu:1", ..., in the order in which units run.
    """

    of_unit: Mapping[str, str]

    @property
    def places(self) -> tuple[str, ...]:
        """The places that have something, the CPU first."""
        return tuple(sorted(set(self.of_unit.values())))

    def of_tensor(self, name: str) -> str:
        """Returns where the tensor of a GGUF name lies."""
        return self.of_unit[unit_of(name)]

    def describe(self) -> str:
        """Returns the table in words, such as "cpu: embed, experts 1-26; gpu:0: attn 0-26, ffn 0, output"."""
        parts = []
        for place in self.places:
            units = [unit for unit, where in self.of_unit.items() if where == place]
            parts.append(f"{place}: {', '.join(_in_words(units))}")
        return "; ".join(parts)


def units(config: ModelConfig) -> list[str]:
    """Returns the units of a model in the order in which they run."""
    found = ["embed"]
    for layer in range(config.num_layers):
        found += [f"attn.{layer}", f"{'ffn' if config.is_dense(layer) else 'experts'}.{layer}"]
    return [*found, "output"]


@functools.cache  # asked of every tensor for each way to place them
def unit_of(name: str) -> str:
    """Returns the unit that the tensor of a GGUF name belongs to."""
    path = names.to_path(name)
    if not path[0].startswith("layers_"):
        return "embed" if path[0] == "embed" else "output"
    kind = "attn"
    if path[1] == "ffn" and path[2] not in ("router", "shared"):
        kind = "experts" if path[2] == "experts" else "ffn"
    return f"{kind}.{path[0].removeprefix('layers_')}"


def parse_overrides(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Reads `REGEX=PLACE` pairs, several of them with commas, a place being cpu, gpu, gpu:1 or CUDA1.

    Returns:
      (pattern, place) in order, for `Rules`; a gpu without a number is the first.

    Raises:
      ValueError: for what is no such pair, or no regular expression.
    """
    found = []
    for text in itertools.chain.from_iterable(text.split(",") for text in texts):
        pattern, _, written = text.rpartition("=")
        match = _PLACE.fullmatch(written)
        if not pattern or not match:
            raise ValueError(
                "--override-tensor must be REGEX=PLACE with a place of cpu, gpu, gpu:N or CUDAN, "
                f"got {text!r}."
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"--override-tensor must have regular expressions, got {pattern!r}: {error}."
            ) from None
        found.append((pattern, CPU if match[1] else gpu(int(match[2] or match[3] or 0))))
    return tuple(found)


def arrange(config: ModelConfig, tensors: Sequence[str], rules: Rules) -> Placement:
    """Returns where units lie by some rules.

    Args:
      config: the model.
      tensors: GGUF names of the tensors that the network reads.
      rules: what is asked for.

    Raises:
      ValueError: for an override that is about no tensor, or overrides that would take a unit apart.
    """
    for pattern, _ in rules.overrides:
        if not any(re.search(pattern, name) for name in tensors):
            raise ValueError(
                f"--override-tensor must have patterns of tensors that the model has, got {pattern!r}."
            )
    of_unit: dict[str, str] = {}
    first: dict[str, str] = {}
    for name in tensors:
        unit = unit_of(name)
        place = _place_of(config, name, unit, rules)
        if of_unit.setdefault(unit, place) != place:
            raise ValueError(
                f"--override-tensor must not take apart what is computed in one piece, got {name} on {place} "
                f"and {first[unit]} on {of_unit[unit]}."
            )
        first.setdefault(unit, name)
    return Placement(of_unit={unit: of_unit[unit] for unit in units(config)})


def unit_bytes(weights: Mapping[str, Any], run: RunConfig) -> Callable[[str, str], int]:
    """Returns a function from a unit and a place to the bytes that its weights take there.

    Args:
      weights: by GGUF name, arrays or `ShapeDtypeStruct`s in any form.
      run: `gpu_kernels` says whether a GPU reads weights in planes; None is taken for yes.
    """
    for_gpu = dataclasses.replace(run, gpu_kernels=run.gpu_kernels is not False)
    laid_out = jax.eval_shape(lambda params: lay_out(params, for_gpu), names.unflatten(weights))
    totals: dict[tuple[str, bool], int] = {}
    for tree, is_cpu in ((weights, True), (names.flatten(laid_out), False)):
        for name, weight in tree.items():
            key = unit_of(name), is_cpu
            size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weight))
            totals[key] = totals.get(key, 0) + size
    return lambda unit, place: totals[unit, place == CPU]


def row_bytes(config: ModelConfig, run: RunConfig, *, ctx_size: int) -> int:
    """Returns the bytes of one layer's rows in a pool of `ctx_size` tokens."""
    num_slots = -(-ctx_size // PAGE_SIZE) * PAGE_SIZE
    return bytes_per_token(config, run) // config.num_layers * num_slots


def workspace_bytes(config: ModelConfig, run: RunConfig, *, ubatch: int) -> int:
    """Returns about how many bytes a step takes on its device beside weights and rows.

    An estimate from above: of `ubatch` tokens the hidden states, queries and what FFN and experts hold, all
    in float32; scores, keys and values of attention twice; and logits, four times.
    """
    mla, moe, D = config.mla, config.moe, config.embed_dim
    per_token = 6 * D + mla.num_heads * (3 * mla.qk_head_dim + 2 * mla.v_head_dim) + mla.kv_lora_rank
    ffn = 3 * config.dense_hidden_dim
    if moe is not None:
        ffn = max(ffn, moe.num_experts_per_token * (2 * D + 3 * moe.expert_hidden_dim))
    logits = 4 * 4 * _LOGIT_ROWS * config.vocab_size
    return 4 * ubatch * (per_token + ffn) + (2 * run.attention_max_batch << 20) + logits


def fit(
    config: ModelConfig,
    tensors: Sequence[str],
    size: Callable[[str, str], int],
    *,
    room: int,
    gpu_layers: int = ALL_LAYERS,
    main_gpu: int = 0,
) -> Rules:
    """Returns the rules under which what is on the GPU fits its memory, with as much there as possible.

    Experts of the first layers go to the CPU first, as few as will do, then whole layers.

    Args:
      config: the model.
      tensors: GGUF names of the tensors that the network reads.
      size: from a unit and a place to the bytes that it takes there.
      room: bytes that there are on the GPU.
      gpu_layers: as in `Rules`, at most.
      main_gpu: as in `Rules`.
    """
    place, most = gpu(main_gpu), min(gpu_layers, config.num_layers + 1)
    num_moved = 0 if config.moe is None else config.num_layers
    candidates = [(most, count) for count in range(num_moved + 1)]
    candidates += [(count, num_moved) for count in range(most - 1, 0, -1)]
    for count, cpu_experts in candidates:
        rules = Rules(gpu_layers=count, cpu_experts=cpu_experts, main_gpu=main_gpu)
        of_unit = arrange(config, tensors, rules).of_unit
        if sum(size(unit, place) for unit, where in of_unit.items() if where == place) <= room:
            return rules
    return Rules(main_gpu=main_gpu)


def _place_of(config, name, unit, rules):
    for pattern, place in rules.overrides:
        if re.search(pattern, name):
            return place
    kind, _, layer = unit.partition(".")
    if kind == "experts" and int(layer) < rules.cpu_experts:
        return CPU
    if kind == "embed":
        is_on_gpu = rules.gpu_layers > config.num_layers
    else:
        index = int(layer) if layer else config.num_layers
        is_on_gpu = index >= config.num_layers + 1 - rules.gpu_layers
    return gpu(rules.main_gpu) if is_on_gpu else CPU


def _in_words(units_of_place):
    """Yields each kind of unit with the ranges of its layers."""
    kinds: dict[str, list[int]] = {}
    for unit in units_of_place:
        kind, _, layer = unit.partition(".")
        kinds.setdefault(kind, []).extend([int(layer)] if layer else [])
    for kind, layers in kinds.items():
        runs = [
            [layer for _, layer in group]
            for _, group in itertools.groupby(enumerate(layers), lambda pair: pair[1] - pair[0])
        ]
        spans = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
        yield " ".join([kind, *spans])
