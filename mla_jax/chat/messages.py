"""What a conversation, its tools and further variables of a template must be."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")  # of a function

# What the caller says otherwise, and names that jinja2 or the renderer gives a template.
_RESERVED = frozenset(
    "add_generation_prompt bos_token chat_template cycler dict eos_token joiner lipsum loop messages "
    "namespace raise_exception range self strftime_now tokenize tools".split()
)
_VARIABLE = re.compile(r"[a-z][a-z0-9_]{0,63}")
_MAX_STRINGS = 4096  # in further variables: special tokens are looked for in each


def normalised(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns messages as templates expect them.

    Args:
      messages: each a mapping with "role", one of `ROLES`, and "content": a string, a list of parts
        {"type": "text", "text": string}, or null in an assistant's message with "tool_calls". "tool_calls"
        is a list of {"id", "type": "function", "function": {"name", "arguments"}}, the arguments the text of
        a JSON object, or the object. "reasoning_content", "name" and "tool_call_id" are strings. Other
        entries are handed to the template.

    Returns:
      Messages with developers as systems, parts joined by a line break, arguments as text, no null entries
      but content beside tool calls.

    Raises:
      ValueError: a message is not as above; the sentence names the field.
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise ValueError("messages must not be empty, and must be a list.")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message, where):
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} must have a string 'role', got {message!r:.80}.")
    role = message.get("role")
    if not isinstance(role, str):
        raise ValueError(f"{where} must have a string 'role', got {message!r:.80}.")
    if role not in ROLES:
        raise ValueError(f"{where}.role must be one of {', '.join(ROLES)}, got {role!r:.60}.")
    clean = {key: value for key, value in message.items() if value is not None}
    clean["role"] = "system" if role == "developer" else role
    for key in ("reasoning_content", "name", "tool_call_id"):
        if key in clean and not isinstance(clean[key], str):
            raise ValueError(f"{where}.{key} must be a string, got {clean[key]!r:.60}.")
    calls = clean.pop("tool_calls", None)
    if calls is not None:
        if role != "assistant":
            raise ValueError(f"{where}.tool_calls must be of an assistant, got role {role!r}.")
        if not isinstance(calls, list | tuple):
            raise ValueError(f"{where}.tool_calls must be a list, got {calls!r:.60}.")
        if calls:
            entries = [_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
            clean["tool_calls"] = entries
    clean["content"] = _content(message.get("content"), where, may_be_null="tool_calls" in clean)
    return clean


def _content(content, where, may_be_null):
    if isinstance(content, str) or (content is None and may_be_null):
        return content
    is_text = lambda part: (
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )
    if isinstance(content, list | tuple) and content and all(map(is_text, content)):
        return "\n".join(part["text"] for part in content)
    raise ValueError(
        f"{where} must have a string 'content' or a list of parts of type 'text', got {content!r:.80}."
    )


def _tool_call(call, where):
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or call.get("type", "function") != "function":
        raise ValueError(f"{where} must be of type 'function' and have a 'function', got {call!r:.80}.")
    name, arguments = function.get("name"), function.get("arguments", "{}")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"{where}.function.name must match {NAME.pattern}, got {name!r:.80}.")
    if isinstance(arguments, Mapping):
        arguments = to_json(arguments, f"{where}.function.arguments")
    if not isinstance(arguments, str):
        raise ValueError(f"{where}.function.arguments must be a string of JSON, got {arguments!r:.60}.")
    identifier = call.get("id")
    if identifier is not None and not isinstance(identifier, str):
        raise ValueError(f"{where}.id must be a string, got {identifier!r:.60}.")
    entry = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return entry if identifier is None else {"id": identifier, **entry}


def checked_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Returns the tools as a list of new dicts.

    Args:
      tools: each {"type": "function", "function": {"name", "description", "parameters"}}; None for none.

    Raises:
      ValueError: a tool is not as above, its name does not match `NAME` or was given twice.
    """
    if tools is None:
        return []
    if not isinstance(tools, list | tuple):
        raise ValueError(f"tools must be a list, got {tools!r:.60}.")
    names = set()
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type") != "function":
            raise ValueError(f"tools[{index}] must be of type 'function' and have one, got {tool!r:.80}.")
        name = function.get("name")
        if not isinstance(name, str) or not NAME.fullmatch(name) or name in names:
            raise ValueError(
                f"tools[{index}].function.name must match {NAME.pattern} and be given once, got {name!r:.80}."
            )
        for key, kind, what in (("description", str, "a string"), ("parameters", Mapping, "a JSON schema")):
            entry = function.get(key)
            if entry is not None and not isinstance(entry, kind):
                raise ValueError(f"tools[{index}].function.{key} must be {what}, got {entry!r:.60}.")
        names.add(name)
    return [dict(tool) for tool in tools]


def checked_kwargs(kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the further variables of a template.

    Templates know one thing as `enable_thinking` or as `thinking`: who gives one gives both.

    Raises:
      ValueError: a key is no variable's name, or one that is not to be given this way; or the values hold
        too many strings.
    """
    if kwargs is None:
        return {}
    if not isinstance(kwargs, Mapping):
        raise ValueError(f"chat_template_kwargs must be an object, got {kwargs!r:.60}.")
    for key in kwargs:
        if not isinstance(key, str) or not _VARIABLE.fullmatch(key) or key in _RESERVED:
            raise ValueError(
                f"chat_template_kwargs must not hold the key {key!r:.60}; keys match {_VARIABLE.pattern} and "
                "are not what a request says elsewhere."
            )
    if _num_strings(kwargs) > _MAX_STRINGS:
        raise ValueError(f"chat_template_kwargs must hold at most {_MAX_STRINGS} strings, got more.")
    variables = dict(kwargs)
    for key, other in (("enable_thinking", "thinking"), ("thinking", "enable_thinking")):
        if key in kwargs:
            variables.setdefault(other, kwargs[key])
    return variables


def _num_strings(value):
    """Returns how many strings a JSON value holds, keys included."""
    count, left = 0, [value]
    while left:
        inner = left.pop()
        if isinstance(inner, Mapping):
            count += len(inner)
            left += inner.values()
        elif isinstance(inner, list | tuple):
            left += inner
        else:
            count += isinstance(inner, str)
    return count


def to_json(value: Any, what: str) -> str:
    """Returns `value` as JSON. Raises ValueError, naming `what`, where it is none."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} must be JSON values: {error}.") from None
