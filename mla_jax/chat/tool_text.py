"""Tools for templates that do not know them: said in words, where the template has a place for text.

Also DeepSeek-V3's own template leaves it to the caller to say which tools there are, though it writes calls
and their results.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

CALLS = {  # by format; `forced_call` makes its grammars of them
    "deepseek-v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>FUNCTION_NAME\n"
    "```json\nARGUMENTS\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek-v3.1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>FUNCTION_NAME<｜tool▁sep｜>ARGUMENTS"
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "kimi-k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.FUNCTION_NAME:0"
    "<|tool_call_argument_begin|>ARGUMENTS<|tool_call_end|><|tool_calls_section_end|>",
    "glm-4.5": "<tool_call>FUNCTION_NAME\n<arg_key>NAME</arg_key>\n<arg_value>VALUE</arg_value>\n"
    "</tool_call>",
    "json": '<tool_call>\n{"name": FUNCTION_NAME, "arguments": ARGUMENTS}\n</tool_call>',
}


def declared(
    messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], template: str, form: str
) -> list[dict[str, Any]]:
    """Returns messages that say in words what the template would not say about tools.

    Args:
      messages: as `messages.normalised` returns them.
      tools: what may be called; with a template that does not mention `tools` the system message says it.
      template: with one that does not mention `tool_calls`, calls and results become text of the turns.
      form: name of the format of tool calls, see `formats.FORMATS`.
    """
    if "tool_calls" not in template:
        messages = [_plain(message) for message in messages]
    if not tools or re.search(r"\btools\b", template):
        return list(messages)
    text = _declaration(tools, form)
    first, rest = messages[0], messages[1:]
    if first["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    return [first | {"content": f"{first['content']}\n\n{text}"}, *rest]


def _declaration(tools, form):
    lines = ["## Tools", "These functions may be called:"]
    for tool in tools:
        function = tool["function"]
        parameters = json.dumps(function.get("parameters") or {}, ensure_ascii=False)
        lines.append(
            f"### {function['name']}\n{function.get('description') or ''}\nArguments, as a JSON schema: "
            f"{parameters}"
        )
    lines.append(
        "To call one, write exactly this, with the function's name, and its arguments as JSON:\n"
        + CALLS[form]
    )
    return "\n\n".join(lines)


def _plain(message):
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    if "tool_calls" not in message:
        return message
    calls = [
        f'<tool_call>\n{{"name": {json.dumps(call["function"]["name"], ensure_ascii=False)}, '
        f'"arguments": {call["function"]["arguments"]}}}\n</tool_call>'
        for call in message["tool_calls"]
    ]
    content = "\n".join(filter(None, [message["content"], *calls]))
    return {"role": "assistant", "content": content}
