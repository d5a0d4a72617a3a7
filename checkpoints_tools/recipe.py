"""Which type each tensor of a requantised file gets: by name of the type, by rules, and as its rows allow."""

import collections
import dataclasses
import re
from collections.abc import Iterable

from checkpoints_tools.ggml_types import IDS, TYPES
from checkpoints_tools.gguf_file import TensorInfo
from checkpoints_tools.layout import FORMAT_NAMES
from mla_jax import quant

QUANTIZATION_VERSION = 2  # of the block formats, see ggml.h

# Of more bits in half of the layers, as llama-quantize's mixtures have it for dense models.
_EVEN_LAYERS = r"^blk\.\d*[02468]\.(attn_kv_b|attn_v_b|ffn_down|ffn_down_exps|ffn_down_shexp)\.weight$"
_OUTPUT = r"^output\.weight$"
_MIXTURES = {
    "Q4_K_S": ("q4_K", {_OUTPUT: "q6_K"}),
    "Q4_K_M": ("q4_K", {_OUTPUT: "q6_K", _EVEN_LAYERS: "q6_K"}),
    "Q5_K_S": ("q5_K", {_OUTPUT: "q6_K"}),
    "Q5_K_M": ("q5_K", {_OUTPUT: "q6_K", _EVEN_LAYERS: "q6_K"}),
}

_FALLBACKS = ("iq4_nl", "q5_0", "q6_0", "q8_0", "f16")  # from few to many bits; f16 fits every row

# Values of `general.file_type`; types that are absent here have none. Source: llama.h of ik_llama.cpp.
_FILE_TYPES = dict(f32=0, f16=1, q4_0=2, q4_1=3, q8_0=7, q5_0=8, q5_1=9, q2_K=10, q3_K=11, q6_K=18, bf16=32)
_FILE_TYPES |= dict(q4_K_s=14, q4_K_m=15, q5_K_s=16, q5_K_m=17, q4_K=14, q5_K=16, iq4_nl=25, iq4_xs=30)
_FILE_TYPES |= dict(iq2_xxs=19, iq2_xs=20, iq3_xxs=23, iq1_s=24, iq3_s=26, iq2_s=28, iq1_m=31, mxfp4=38)
_FILE_TYPES |= dict(q6_0=135, iq1_bn=136, iq2_bn=137, iq2_k=138, iq3_k=139, iq4_k=140, iq5_k=141, iq6_k=142)
_FILE_TYPES |= dict(iq4_ks=145, iq2_ks=147, iq4_kss=148, q8_KV=149, iq5_ks=150, iq2_kt=151, iq3_kt=152)
_FILE_TYPES |= dict(iq4_kt=153, iq3_ks=154, iq2_kl=155, iq1_kt=156)
_FILE_TYPES = {name.lower(): number for name, number in _FILE_TYPES.items()}

_RULE = re.compile(r"\s*(.+?)\s*=\s*(\w+)\s*(?:,|$)")  # a comma within an expression does not end it


@dataclasses.dataclass(frozen=True)
class Rule:
    """Tensors whose name `pattern` is found in get `type_name`."""

    pattern: re.Pattern
    type_name: str


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Types by tensor name.

    Attributes:
      type_name: of tensors that no rule is about.
      rules: the first that is about a tensor counts.
      file_type: value of `general.file_type`, or None if the type has none.
      num_custom: how many of the rules, from the first, were given by the user.
    """

    type_name: str
    rules: tuple[Rule, ...]
    file_type: int | None
    num_custom: int

    @classmethod
    def of(cls, type_name: str, custom: Iterable[str] = ()) -> "Recipe":
        """Reads a type or a mixture, and rules.

        Args:
          type_name: as llama-quantize spells it, in any case: a type, or Q4_K_S, Q4_K_M, Q5_K_S or Q5_K_M.
          custom: "REGEX=TYPE", or several of them with commas between; they go before those of a mixture.

        Raises:
          ValueError: if a type is not known or has no encoder, or a rule cannot be read.
        """
        mixture, rules = _MIXTURES.get(type_name.upper(), (None, {}))
        own = [rule for text in custom for rule in _parse_rules(text)]
        mixed = [Rule(re.compile(pattern), name) for pattern, name in rules.items()]
        return cls(
            type_name=mixture or _type_name(type_name, "type", _MIXTURES),
            rules=(*own, *mixed),
            file_type=_FILE_TYPES.get(type_name.lower()),
            num_custom=len(own),
        )

    def wanted(self, name: str) -> str:
        """Returns the type that the tensor `name` should have if its rows fit it."""
        found = (rule.type_name for rule in self.rules if rule.pattern.search(name))
        return next(found, self.type_name)

    def unused(self, names: Iterable[str]) -> list[str]:
        """Returns the patterns of custom rules that are about none of the tensors `names`."""
        names, own = list(names), self.rules[: self.num_custom]
        return [rule.pattern.pattern for rule in own if not any(map(rule.pattern.search, names))]


def is_weight_matrix(info: TensorInfo) -> bool:
    """Whether a tensor is to be quantised: norms, routers, biases, vectors and integers are not."""
    is_matrix = len(info.shape) > 1 and info.name.endswith(".weight")
    is_kept = "ffn_gate_inp" in info.name or "_norm." in info.name
    return is_matrix and info.ggml_type in FORMAT_NAMES and not is_kept


def fitting(wanted: str, row_size: int) -> str:
    """Returns `wanted` if rows of `row_size` weights are whole blocks of it, else a type that fits them.

    That is the smallest of a few types that takes at least as many bits a weight.
    """
    if row_size % TYPES[IDS[wanted]].block_size == 0:
        return wanted
    for name in _FALLBACKS:
        is_possible = name in quant.ENCODABLE and row_size % TYPES[IDS[name]].block_size == 0
        if is_possible and _bits(name) >= _bits(wanted):
            return name
    return _FALLBACKS[-1]


def misfits(types: Iterable[tuple[str, str]]) -> list[str]:
    """Returns a sentence for each pair of types (wanted, given) that differ, with the number of tensors."""
    return [
        f"{count} tensors become {given}, because their rows are no whole number of blocks of {wanted}"
        for (wanted, given), count in collections.Counter(types).items()
        if wanted != given
    ]


def _bits(name: str) -> float:
    entry = TYPES[IDS[name]]
    return 8 * entry.block_bytes / entry.block_size


def _type_name(written: str, what: str, others: Iterable[str] = ()) -> str:
    for name in quant.ENCODABLE:
        if name.lower() == written.lower():
            return name
    raise ValueError(f"{what} must be one of {', '.join((*quant.ENCODABLE, *others))}, got {written!r}.")


def _parse_rules(text: str) -> Iterable[Rule]:
    at = 0
    while at < len(text):
        match = _RULE.match(text, at)
        if match is None:
            raise ValueError(f"a custom rule must be REGEX=TYPE, got {text[at:]!r}.")
        at = match.end()
        try:
            pattern = re.compile(match[1])
        except re.error as error:
            raise ValueError(
                f"a custom rule must begin with a regular expression, got {match[1]!r}: {error}."
            ) from None
        yield Rule(pattern, _type_name(match[2], f"the type of custom rule {match[1]!r}"))
