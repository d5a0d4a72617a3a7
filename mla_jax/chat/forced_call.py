"""The grammar of an answer that calls tools and says nothing else, in a model's own format of calls."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mla_jax.chat import tool_text
from mla_jax.chat.formats import FORMATS

FORMS = tuple(form for form in FORMATS if form != "glm-4.5")  # whose arguments are tags and not JSON
_BETWEEN = {"deepseek-v3": "\n", "json": "\n"}
_NO_PARAMETERS = {"properties": {}, "additionalProperties": False}


def grammar(
    tools: Sequence[Mapping[str, Any]], form: str, control: Mapping[str, int], *, is_single: bool
) -> str:
    """Returns the grammar as JSON of {"lark": text, "arguments": [{"schema", "is_strict"}, ...]}.

    The Lark text names the arguments of the tool at index i `@arguments_i`, and control tokens by their ids.
    What a schema says beyond what can be followed is left out, unless its tool is strict.

    Args:
      tools: that may be called, see `messages.checked_tools`; at least one.
      form: one of `FORMS`.
      control: ids of those markers that are control tokens; others are written as text.
      is_single: one call, else one or more.
    """
    markers = FORMATS[form]
    begin, end = markers.calls_begin or "", markers.calls_end or ""
    call = tool_text.CALLS[form].removeprefix(begin).removesuffix(end)
    written = lambda text: f"<[{control[text]}]>" if text in control else json.dumps(text)
    cuts = sorted(markers.markers | {"FUNCTION_NAME", "ARGUMENTS", ":0"}, key=len, reverse=True)
    parts = [part for part in re.split(f"({'|'.join(map(re.escape, cuts))})", call) if part]
    calls = " | ".join(f"call_{index}" for index in range(len(tools)))
    between = written(_BETWEEN[form]) if form in _BETWEEN else ""
    more = "" if is_single else f"({between} call)*"
    lines = [
        f"start: {written(begin) if begin else ''} call {more} {written(end) if end else ''}",
        f"call: {calls}",
    ]
    for index, tool in enumerate(tools):
        name = tool["function"]["name"]
        special = {
            "FUNCTION_NAME": json.dumps(json.dumps(name) if form == "json" else name),
            "ARGUMENTS": f"@arguments_{index}",
            ":0": "/:[0-9]{1,3}/",  # which call it is
        }
        lines.append(f"call_{index}: {' '.join(special.get(part) or written(part) for part in parts)}")
    arguments = [_arguments(tool["function"]) for tool in tools]
    return json.dumps({"lark": "\n".join(lines), "arguments": arguments}, ensure_ascii=False)


def _arguments(function):
    parameters = function.get("parameters")
    schema = {**(_NO_PARAMETERS if parameters is None else parameters), "type": "object"}
    return {"schema": schema, "is_strict": bool(function.get("strict"))}
