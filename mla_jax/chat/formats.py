"""How models of each family write tool calls, and which tokens that takes.

    deepseek-v3    function SEPARATOR NAME, then the arguments as JSON in a fence of backticks
    deepseek-v3.1  NAME SEPARATOR ARGUMENTS
    kimi-k2        functions.NAME:0 SEPARATOR ARGUMENTS; what is before the separator is the id of the call
    glm-4.5        NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>...
    json           {"name": NAME, "arguments": ARGUMENTS}

each between the markers of a call, and all calls between those of a section where there are such. The last is
what models are asked for whose template knows no tools.
"""

import dataclasses
from collections.abc import Container

from mla_jax.chat import templates
from mla_jax.tokenizer import CONTROL, UNKNOWN, Tokenizer

THINK = "<think>"  # before reasoning
END_OF_THINK = "</think>"  # and after it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """The markers of a format, in the order in which they come; None where it has no such marker.

    Attributes:
      calls_begin: before the first call.
      call_begin: before each call.
      separator: between name and arguments.
      call_end: after each call.
      calls_end: after the last call.
      others: further markers.
    """

    calls_begin: str | None = None
    call_begin: str
    separator: str | None = None
    call_end: str
    calls_end: str | None = None
    others: tuple[str, ...] = ()

    @property
    def markers(self) -> frozenset[str]:
        """All of them."""
        all_markers = (self.calls_begin, self.call_begin, self.separator, self.call_end, self.calls_end)
        return frozenset(filter(None, (*all_markers, *self.others)))


_DEEPSEEK = Format(
    calls_begin="<｜tool▁calls▁begin｜>",
    call_begin="<｜tool▁call▁begin｜>",
    separator="<｜tool▁sep｜>",
    call_end="<｜tool▁call▁end｜>",
    calls_end="<｜tool▁calls▁end｜>",
)
FORMATS = {
    "deepseek-v3": _DEEPSEEK,
    "deepseek-v3.1": _DEEPSEEK,
    "kimi-k2": Format(
        calls_begin="<|tool_calls_section_begin|>",
        call_begin="<|tool_call_begin|>",
        separator="<|tool_call_argument_begin|>",
        call_end="<|tool_call_end|>",
        calls_end="<|tool_calls_section_end|>",
    ),
    "glm-4.5": Format(
        call_begin="<tool_call>",
        call_end="</tool_call>",
        others=("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    ),
    "json": Format(call_begin="<tool_call>", call_end="</tool_call>"),
}


def answer_format(source: str | Container[str]) -> str:
    """Returns the name of the format, a key of `FORMATS`, in which a model writes tool calls.

    Args:
      source: a chat template, or the tokens of a vocabulary, which stand for their built-in template.
    """
    template = source if isinstance(source, str) else templates.builtin_template(source)
    if _DEEPSEEK.separator in template:
        return "deepseek-v3" if "```json" in template else "deepseek-v3.1"
    if FORMATS["kimi-k2"].separator in template:
        return "kimi-k2"
    return "glm-4.5" if "<arg_key>" in template else "json"


def shown_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """Returns the ids of control tokens that `Answer` must see the text of: markers of calls and of thinking.

    Decoding leaves control tokens out; the text that an `Answer` is fed has to show these.
    """
    markers = {THINK, END_OF_THINK}.union(*(form.markers for form in FORMATS.values()))
    kinds = zip(tokenizer.vocabulary.tokens, tokenizer.token_types, strict=True)
    return frozenset(
        token_id
        for token_id, (text, kind) in enumerate(kinds)
        if text in markers and kind in (CONTROL, UNKNOWN)
    )
