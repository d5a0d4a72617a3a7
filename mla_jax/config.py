"""What a model is (`ModelConfig`) and how it is run (`RunConfig`): frozen, hashable, static under jit."""

import dataclasses
import enum
import fnmatch
from collections.abc import Callable

# Far beyond any published model, and still nothing that is computed from them overflows float32.
_MIN_FACTOR, _MAX_FACTOR = 1e-3, 1e3  # of scores and of what experts add
_MAX_ROPE_BASE = 1e12
_MAX_ROPE_RATIO = 1e6  # of context lengths, and of YaRN's turns; 1 / this is the least
_MIN_EPSILON = 1e-30


class MLAMode(enum.IntEnum):
    """How attention is computed, with the numbers of ik_llama.cpp's `-mla`.

    mode  cache                  prefill    decode
    0     keys, values per head  expanded   expanded
    1     latent                 absorbed   absorbed
    2     latent                 expanded   absorbed, whole score matrix
    3     latent                 expanded   absorbed, flash
    """

    EXPANDED = 0
    ABSORBED = 1
    MIXED = 2
    FLASH_MIXED = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Sizes of multi-head latent attention, named as in the DeepSeek-V2 paper's configs."""

    num_heads: int
    q_lora_rank: int | None  # None: queries are not compressed (V2-Lite)
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    def __post_init__(self):
        _require_positive(self, "num_heads", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
        if self.q_lora_rank is not None:
            _require_positive(self, "q_lora_rank")
        if self.qk_rope_head_dim < 2 or self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim must be even and positive, got {self.qk_rope_head_dim}.")

    @property
    def qk_head_dim(self) -> int:
        """Width of one expanded query or key head: the part without position, then the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Sizes and routing rule of the mixture-of-experts layers, beside their names in published configs."""

    num_experts: int  # n_routed_experts
    num_experts_per_token: int  # num_experts_per_tok
    expert_hidden_dim: int  # moe_intermediate_size
    num_shared_experts: int  # n_shared_experts
    gating: str  # scoring_func: "softmax" or "sigmoid"
    has_selection_bias: bool = False  # e_score_correction_bias: added to what selects, not to the weights
    normalize_weights: bool = False  # norm_topk_prob
    weights_scale: float = 1.0  # routed_scaling_factor
    num_groups: int = 1  # n_group: experts are selected within the best groups
    num_groups_used: int = 1  # topk_group

    def __post_init__(self):
        _require_positive(self, "num_experts", "num_experts_per_token", "expert_hidden_dim")
        _require_positive(self, "num_groups", "num_groups_used")
        if self.num_shared_experts < 0:
            raise ValueError(f"num_shared_experts must be at least 0, got {self.num_shared_experts}.")
        if self.gating not in ("softmax", "sigmoid"):
            raise ValueError(f"gating must be 'softmax' or 'sigmoid', got {self.gating!r}.")
        if self.num_experts % self.num_groups or self.num_groups_used > self.num_groups:
            raise ValueError(
                f"num_groups must divide num_experts and be at least num_groups_used, got {self.num_experts} "
                f"experts, {self.num_groups} groups, {self.num_groups_used} used."
            )
        if self.num_experts_per_token > self.num_experts // self.num_groups * self.num_groups_used:
            raise ValueError(
                f"num_experts_per_token must be at most the experts of the used groups, "
                f"got {self.num_experts_per_token} of {self.num_experts}."
            )
        if not _MIN_FACTOR <= self.weights_scale <= _MAX_FACTOR:
            raise ValueError(
                f"weights_scale must be in [{_MIN_FACTOR:g}, {_MAX_FACTOR:g}], got {self.weights_scale}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions, with linear or YaRN scaling to longer contexts."""

    base: float = 10000.0
    scaling: str = "none"  # "none", "linear" or "yarn"
    factor: float = 1.0  # new context length / trained context length
    original_context_length: int = 0  # trained context length; read by YaRN alone
    yarn_log_multiplier: float = 0.0  # 0.1 * mscale_all_dim of the published configs
    beta_fast: float = 32.0  # turns within the trained context from which on YaRN keeps a pair as it is
    beta_slow: float = 1.0  # turns up to which YaRN stretches a pair in full
    attention_factor: float = (
        1.0  # `rope.scaling.attn_factor`: multiplies queries and keys, so squared in scores
    )

    def __post_init__(self):
        if self.scaling not in ("none", "linear", "yarn"):
            raise ValueError(f"scaling must be 'none', 'linear' or 'yarn', got {self.scaling!r}.")
        if not 1 < self.base <= _MAX_ROPE_BASE:
            raise ValueError(f"base must be in (1, {_MAX_ROPE_BASE:g}], got {self.base}.")
        for name in ("factor", "beta_fast", "beta_slow"):
            if not 1 / _MAX_ROPE_RATIO <= getattr(self, name) <= _MAX_ROPE_RATIO:
                low, high = 1 / _MAX_ROPE_RATIO, _MAX_ROPE_RATIO
                raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {getattr(self, name)}.")
        if not _MIN_FACTOR <= self.attention_factor <= _MAX_FACTOR:
            raise ValueError(
                f"attention_factor must be in [{_MIN_FACTOR:g}, {_MAX_FACTOR:g}], "
                f"got {self.attention_factor}."
            )
        if not 0 <= self.yarn_log_multiplier <= _MAX_FACTOR:
            raise ValueError(
                f"yarn_log_multiplier must be in [0, {_MAX_FACTOR:g}], got {self.yarn_log_multiplier}."
            )
        if self.beta_slow > self.beta_fast:
            raise ValueError(f"beta_slow must be at most beta_fast = {self.beta_fast}, got {self.beta_slow}.")
        if self.scaling == "yarn" and self.original_context_length <= 0:
            raise ValueError(
                f"original_context_length must be positive with YaRN, got {self.original_context_length}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of what devices may share out among them: of the whole network, or of one device's part."""

    num_heads: int
    dense_hidden_dim: int
    num_experts: int
    expert_hidden_dim: int
    shared_hidden_dim: int
    vocab_size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Every size and constant of a deepseek2 model, and nothing about how it runs."""

    vocab_size: int
    context_length: int
    embed_dim: int
    num_layers: int
    num_dense_layers: int  # the first layers have one wide FFN instead of experts
    dense_hidden_dim: int
    norm_epsilon: float
    mla: MLAConfig
    moe: MoEConfig | None  # None: every layer is dense
    rope: RopeConfig = RopeConfig()

    def __post_init__(self):
        _require_positive(self, "vocab_size", "context_length", "embed_dim", "num_layers")
        if not 0 <= self.num_dense_layers <= self.num_layers:
            raise ValueError(
                f"num_dense_layers must be in [0, {self.num_layers}], got {self.num_dense_layers}."
            )
        if self.num_dense_layers:
            _require_positive(self, "dense_hidden_dim")
        if self.moe is None and self.num_dense_layers < self.num_layers:
            raise ValueError("moe must be given when some layers are not dense, got None.")
        if not _MIN_EPSILON <= self.norm_epsilon < 1:
            raise ValueError(f"norm_epsilon must be in [{_MIN_EPSILON:g}, 1), got {self.norm_epsilon}.")

    @property
    def sizes(self) -> Sizes:
        """Sizes of the whole network."""
        moe = self.moe
        return Sizes(
            num_heads=self.mla.num_heads,
            dense_hidden_dim=self.dense_hidden_dim,
            num_experts=moe.num_experts if moe else 0,
            expert_hidden_dim=moe.expert_hidden_dim if moe else 0,
            shared_hidden_dim=moe.expert_hidden_dim * moe.num_shared_experts if moe else 0,
            vocab_size=self.vocab_size,
        )

    def is_dense(self, layer: int) -> bool:
        """Whether the FFN of `layer` is one wide FFN and not a mixture of experts."""
        return layer < self.num_dense_layers


PLAIN_CACHE_TYPES = ("f32", "f16", "bf16")
QUANTISED_CACHE_TYPES = ("q8_0", "q8_KV", "q6_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl", "fp8_e4m3")
CACHE_TYPES = PLAIN_CACHE_TYPES + QUANTISED_CACHE_TYPES
HADAMARD_SIZES = (64, 128, 256, 512)
ROPE_HADAMARD_SIZE = 64  # of the rotary part, and of keys per head


@dataclasses.dataclass(frozen=True, kw_only=True)
class Taps:
    """What is recorded and edited inside the network, by names of `mla_jax.nn.taps.PLACES` and their layers.

    A name may be a pattern: `"resid.*"` is that of all layers, `"*.3"` all of layer 3.

    Attributes:
      record: names of values to record.
      edits: names and functions from (value, positions i32[B, T]) to a value of the same shape and dtype,
        applied in this order. Functions are compared by identity: another one compiles anew.
    """

    record: tuple[str, ...] = ()
    edits: tuple[tuple[str, Callable], ...] = ()

    def __post_init__(self):
        if not isinstance(self.record, tuple) or not all(isinstance(name, str) for name in self.record):
            raise ValueError(f"record must be a tuple of names, got {self.record!r}.")
        for name, function in self.edits:
            if not isinstance(name, str) or not callable(function):
                raise ValueError(f"edits must be names and functions, got {name!r} and {function!r}.")

    def records(self, name: str) -> bool:
        """Whether the value `name` is recorded."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.record)

    def edits_of(self, name: str) -> list[Callable]:
        """Returns the functions to apply to the value `name`."""
        return [function for pattern, function in self.edits if fnmatch.fnmatchcase(name, pattern)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """What one device of a mesh has of a model; `mla_jax.sharding` says which axis shares out what.

    Attributes:
      data: devices along the axis of that name, each with sequences of its own.
      expert: devices among which experts, heads and the like are shared out.
      model: devices among which each expert is cut, heads and the like are shared out.
      splits_cache: whether each page of a latent cache is cut among the devices of its sequences.
      sizes: of one device's part, padding included.
    """

    data: int = 1
    expert: int = 1
    model: int = 1
    splits_cache: bool = False
    sizes: Sizes

    @property
    def group_size(self) -> int:
        """Devices that work on the same sequences."""
        return self.expert * self.model

    @property
    def mesh(self) -> str:
        """The mesh as users write it, such as "data=2,expert=4,model=1"."""
        return f"data={self.data},expert={self.expert},model={self.model}"

    @property
    def num_devices(self) -> int:
        """Devices of the mesh."""
        return self.data * self.group_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How a model is run: speed and memory, and results only by rounding, `group_routing` apart."""

    mla: MLAMode = MLAMode.FLASH_MIXED
    flash: bool = True  # attend to the cache chunk by chunk, never holding the whole score matrix
    cache_type: str = "f16"
    cache_type_rope: str | None = None  # of the rotated key part; None: as `cache_type`
    hadamard_size: int | None = None  # numbers of a latent rotated together before they are quantised
    attention_max_batch: int = 256  # MiB for the scores, keys and values of some heads at a time; 0: no limit
    group_routing: bool = True  # False: ignore expert groups, as ik_llama.cpp does
    gpu_kernels: bool | None = None  # whether to trace them, which takes time; None: if JAX's device is a GPU
    taps: Taps | None = None  # values to record and edits; without any, None costs nothing
    remat: bool = False  # under grad compute each layer again in the backward pass, to hold one at a time
    shard: Shard | None = None  # this device's part of the model; None: all of it

    def __post_init__(self):
        if self.mla not in list(MLAMode):
            raise ValueError(f"mla must be 0, 1, 2 or 3, got {self.mla!r}.")
        object.__setattr__(self, "mla", MLAMode(self.mla))
        for name in ("cache_type", "cache_type_rope"):
            value = getattr(self, name)
            if value not in CACHE_TYPES and not (name == "cache_type_rope" and value is None):
                raise ValueError(f"{name} must be one of {', '.join(CACHE_TYPES)}, got {value!r}.")
        if self.cache_type_rope is not None and self.mla == MLAMode.EXPANDED:
            raise ValueError(
                f"cache_type_rope must not be given with mla 0, whose keys are cached whole, "
                f"got {self.cache_type_rope!r}."
            )
        if self.attention_max_batch < 0:
            raise ValueError(f"attention_max_batch must be at least 0, got {self.attention_max_batch}.")
        if self.hadamard_size not in (None, *HADAMARD_SIZES):
            sizes = ", ".join(map(str, HADAMARD_SIZES))
            raise ValueError(f"hadamard_size must be one of {sizes}, or None, got {self.hadamard_size!r}.")
        if self.shard is not None and self.taps is not None:
            raise ValueError("taps must be None on a mesh of devices, got some.")
        if self.shard is not None and self.shard.splits_cache and self.mla == MLAMode.EXPANDED:
            raise ValueError("a cache that devices split must hold latents, so mla must not be 0.")

    def sizes(self, config: ModelConfig) -> Sizes:
        """Returns the sizes of this device's part of the network."""
        return config.sizes if self.shard is None else self.shard.sizes

    @property
    def rope_type(self) -> str:
        """Cache type of the rotated key part."""
        return self.cache_type_rope or self.cache_type

    @property
    def latent_rotation(self) -> int | None:
        """Block size of the Hadamard rotation of latents (keys per head in mode 0), None for none.

        Only what is quantised is rotated: otherwise nothing is gained by it.
        """
        if self.cache_type not in QUANTISED_CACHE_TYPES or self.hadamard_size is None:
            return None
        return ROPE_HADAMARD_SIZE if self.mla == MLAMode.EXPANDED else self.hadamard_size

    @property
    def rope_rotation(self) -> int | None:
        """Block size of the Hadamard rotation of the rotary part, None for none."""
        is_rotated = self.rope_type in QUANTISED_CACHE_TYPES and self.hadamard_size is not None
        return ROPE_HADAMARD_SIZE if is_rotated else None


def _require_positive(config, *names):
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}.")
