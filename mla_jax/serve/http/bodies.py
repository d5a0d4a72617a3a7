"""The bodies of requests: which fields each route takes, and what they mean, as frozen values."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mla_jax import sampler
from mla_jax.serve.http import drawing, schema
from mla_jax.serve.http.api_error import ApiError, invalid
from mla_jax.serve.http.drawing import Drawing

MAX_MESSAGES, MAX_TOOLS, MAX_TOOL_CALLS = 1024, 128, 128
_MAX_PROMPT_TOKENS = 1 << 20
_ROLES = ("system", "developer", "user", "assistant", "tool")
_ID = schema.Integer(0, 2**31 - 1)
_NO_EFFORT = ("none", "minimal")  # of reasoning
_EFFORTS = (*_NO_EFFORT, "low", "medium", "high", "xhigh", "max")
_PART = {"type": schema.Choice(("text",)), "text": schema.Text()}


def _content(value, name):
    if isinstance(value, str):
        return value
    parts = (
        schema.ListOf(schema.Object(), MAX_MESSAGES).read(value, name) if isinstance(value, list) else None
    )
    if parts is None:
        raise invalid(name, "a string or a list of text parts", value)
    for index, part in enumerate(parts):
        taken = schema.read(_PART, part, f"{name}[{index}].")
        for field in _PART:
            if field not in taken:
                raise invalid(f"{name}[{index}].{field}", "given", None)
    return list(parts)


_FUNCTION_CALL = {"name": schema.Text(256, min_chars=1), "arguments": schema.Text()}


def _tool_call(value, name):
    call = schema.Object().read(value, name)
    table = {"id": schema.Text(256), "type": schema.Choice(("function",)), "function": schema.Object()}
    taken = schema.read(table, call, f"{name}.")
    function = schema.read(_FUNCTION_CALL, taken.get("function", {}), f"{name}.function.")
    if "name" not in function:
        raise invalid(f"{name}.function.name", "a string", None)
    function.setdefault("arguments", "{}")
    return {"id": taken.get("id", ""), "type": "function", "function": function}


_MESSAGE = {
    "role": schema.Choice(_ROLES),
    "content": schema.Special(
        _content, bad=(5, True, {}, [5], [{}], [{"type": "image_url", "image_url": {}}])
    ),
    "name": schema.Text(256),
    "reasoning_content": schema.Text(),
    "tool_call_id": schema.Text(256),
    "tool_calls": schema.ListOf(schema.Special(_tool_call), MAX_TOOL_CALLS),
}


def _message(value, name):
    message = schema.Object().read(value, name)
    taken = schema.read(_MESSAGE, message, f"{name}.")
    if "role" not in taken:
        raise invalid(f"{name}.role", f"one of {', '.join(_ROLES)}", message.get("role"))
    if "content" not in taken and not (taken["role"] == "assistant" and len(taken) > 1):
        raise invalid(f"{name}.content", "a string or a list of text parts", None)
    if "tool_calls" in taken and taken["role"] != "assistant":
        raise ApiError(f"{name}.tool_calls must belong to an assistant.", param=f"{name}.tool_calls")
    taken.setdefault("content", None)
    return taken | ({"tool_calls": list(taken["tool_calls"])} if "tool_calls" in taken else {})


_FUNCTION = {
    "name": schema.Text(64, min_chars=1),
    "description": schema.Text(),
    "parameters": schema.Object(),
    "strict": schema.Boolean(),
}


def _tool(value, name):
    table = {"type": schema.Choice(("function",)), "function": schema.Object()}
    tool = schema.Object().read(value, name)
    taken = schema.read(table, tool, f"{name}.")
    function = schema.read(_FUNCTION, taken.get("function", {}), f"{name}.function.")
    if "name" not in function:
        raise invalid(f"{name}.function.name", "a string of 1 to 64 characters", None)
    return {"type": "function", "function": function}


def _tool_choice(value, name):
    if isinstance(value, str):
        return schema.Choice(("none", "auto", "required")).read(value, name)
    taken = schema.read(
        {"type": schema.Choice(("function",)), "function": schema.Object()}, _object(value, name)
    )
    function = schema.read(
        {"name": schema.Text(64, min_chars=1)}, taken.get("function", {}), f"{name}.function."
    )
    if "name" not in function:
        raise invalid(f"{name}.function.name", "the name of a tool", None)
    return (function["name"],)


def _object(value, name):
    if not isinstance(value, dict):
        raise invalid(name, "none, auto, required or an object that names a function", value)
    return value


def _prompt(value, name):
    """Returns the prompts: each a string or a tuple of ids."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise invalid(name, "a string, a list of token ids, or a list of either", value)
    ids = schema.ListOf(_ID, _MAX_PROMPT_TOKENS, min_count=1)
    if isinstance(value[0], int):
        return (ids.read(value, name),)
    if len(value) > drawing.MAX_CHOICES:
        raise invalid(name, f"a list of at most {drawing.MAX_CHOICES} prompts", value)
    read = lambda entry, index: entry if isinstance(entry, str) else ids.read(entry, f"{name}[{index}]")
    return tuple(read(entry, index) for index, entry in enumerate(value))


_BAD_PROMPTS = (5, True, {}, [], [-1], [2**31], [1.5], [True], [[]], [[[1]]], ["a", 1], [1, "a"], ["a"] * 17)
_BAD_MESSAGES = ([], {}, "hello", [5], [{}], [{"role": "user"}], [{"role": "king", "content": "a"}])
_MESSAGES = schema.ListOf(schema.Special(_message), MAX_MESSAGES, min_count=1)
_TOOLS = schema.ListOf(schema.Special(_tool), MAX_TOOLS)

TEMPLATE_TABLE: Mapping[str, schema.Kind] = {
    "messages": schema.Special(_MESSAGES.read, bad=_BAD_MESSAGES),
    "tools": schema.Special(_TOOLS.read, bad=(5, {}, [5], [{}], [{"type": "function"}])),
    "chat_template_kwargs": schema.Object(),
    "reasoning_effort": schema.Choice(_EFFORTS),
    "add_generation_prompt": schema.Boolean(),
    # Templates are programs; none is taken from a request.
    "chat_template": schema.Neutral(()),
    "tokenize": schema.Neutral(()),
}
CHAT_TABLE: Mapping[str, schema.Kind] = {
    **drawing.TABLE,
    **{name: kind for name, kind in TEMPLATE_TABLE.items() if name != "add_generation_prompt"},
    "tool_choice": schema.Special(_tool_choice, bad=("never", 5, [], {}, {"type": "function"}, True)),
    "parallel_tool_calls": schema.Boolean(),
    "reasoning_format": schema.Choice(("none", "auto", "deepseek")),
    "logprobs": schema.Boolean(),
    "top_logprobs": drawing.LOGPROBS,
    "functions": schema.Neutral(([],)),
    "function_call": schema.Neutral(("none",)),
    "audio": schema.Neutral(()),
    "modalities": schema.Neutral((["text"],)),
    "add_generation_prompt": schema.Neutral((True,)),
}
TEXT_TABLE: Mapping[str, schema.Kind] = {
    **drawing.TABLE,
    "prompt": schema.Special(_prompt, bad=_BAD_PROMPTS),
    "logprobs": drawing.LOGPROBS,
    "echo": schema.Boolean(),
    "best_of": schema.Neutral((1,)),
    "suffix": schema.Neutral(("",)),
}
COMPLETION_TABLE: Mapping[str, schema.Kind] = {
    **drawing.TABLE,
    "prompt": schema.Special(_prompt, bad=_BAD_PROMPTS),
    "n_probs": drawing.LOGPROBS,
    "n": schema.Neutral((1,)),
    "stream_options": schema.Object(),
    "return_tokens": schema.Boolean(),
}
TOKENIZE_TABLE: Mapping[str, schema.Kind] = {
    "content": schema.Text(),
    "add_special": schema.Boolean(),
    "parse_special": schema.Boolean(),
    "with_pieces": schema.Boolean(),
}
DETOKENIZE_TABLE: Mapping[str, schema.Kind] = {"tokens": schema.ListOf(_ID, _MAX_PROMPT_TOKENS)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatBody:
    """What `/v1/chat/completions` is asked for.

    Attributes:
      drawing: how to draw.
      num_logprobs: as in `request.Request`.
      messages: the conversation, each with "role" and "content", as templates take them.
      tools: that the model may call; empty if it must not.
      tool_choice: "auto", "required", or the one name that must be called.
      parallel_tool_calls: False ends the answer with its first call.
      template_kwargs: further variables of the template.
      reasoning_format: where reasoning goes; None for the server's way.
    """

    drawing: Drawing
    num_logprobs: int | None
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...]
    tool_choice: str | tuple[str]
    parallel_tool_calls: bool
    template_kwargs: dict[str, Any]
    reasoning_format: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextBody:
    """What `/v1/completions` and `/completion` are asked for.

    Attributes:
      drawing: how to draw.
      num_logprobs: as in `request.Request`.
      prompts: each text, with special tokens in it, or token ids.
      echo: answer with the prompt before the text.
    """

    drawing: Drawing
    num_logprobs: int | None
    prompts: tuple[str | tuple[int, ...], ...]
    echo: bool


def required(fields: Mapping[str, Any], name: str) -> Any:
    """Returns the field called `name`. Raises ApiError if it is not there."""
    if name not in fields:
        raise ApiError(f"{name} must be given.", param=name)
    return fields[name]


def template_kwargs(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the further variables of the template that fields of `TEMPLATE_TABLE` ask for.

    OpenAI's `reasoning_effort` is whether to think: templates here know no more and no less of it. Who says
    so by `chat_template_kwargs` too is heard there.
    """
    kwargs, effort = fields.get("chat_template_kwargs", {}), fields.get("reasoning_effort")
    if effort is None or "enable_thinking" in kwargs or "thinking" in kwargs:
        return kwargs
    return kwargs | {"enable_thinking": effort not in _NO_EFFORT}


def chat(body: Mapping[str, Any], defaults: sampler.SamplingParams, max_tokens: int | None) -> ChatBody:
    """Returns what a body of `/v1/chat/completions` asks for; other arguments: `drawing.from_fields`."""
    fields = schema.read(CHAT_TABLE, body)
    if "top_logprobs" in fields and not fields.get("logprobs"):
        raise ApiError("top_logprobs must come with logprobs, which must be true.", param="top_logprobs")
    tools, choice = fields.get("tools", ()), fields.get("tool_choice", "auto")
    if isinstance(choice, tuple) and choice[0] not in [tool["function"]["name"] for tool in tools]:
        raise ApiError(f"tool_choice must name one of the tools, got {choice[0]!r}.", param="tool_choice")
    if choice == "required" and not tools:
        raise ApiError("tool_choice must not be required where there are no tools.", param="tool_choice")
    return ChatBody(
        drawing=drawing.from_fields(fields, defaults, max_tokens),
        num_logprobs=fields.get("top_logprobs", 0) if fields.get("logprobs") else None,
        messages=required(fields, "messages"),
        tools=() if choice == "none" else tools,
        tool_choice="auto" if choice == "none" else choice,
        parallel_tool_calls=fields.get("parallel_tool_calls", True),
        template_kwargs=template_kwargs(fields),
        reasoning_format=fields.get("reasoning_format"),
    )


def text(body: Mapping[str, Any], defaults: sampler.SamplingParams, max_tokens: int | None) -> TextBody:
    """Returns what a body of `/v1/completions` asks for; other arguments: `drawing.from_fields`."""
    fields = schema.read(TEXT_TABLE, body)
    prompts, draw = required(fields, "prompt"), drawing.from_fields(fields, defaults, max_tokens)
    if len(prompts) * draw.num_choices > drawing.MAX_CHOICES:
        most = drawing.MAX_CHOICES
        raise ApiError(f"n times the number of prompts must be at most {most}.", param="n")
    if fields.get("echo") and "logprobs" in fields:
        raise ApiError("echo must not come with logprobs: a prompt has none here.", param="echo")
    return TextBody(
        drawing=draw, num_logprobs=fields.get("logprobs"), prompts=prompts, echo=fields.get("echo", False)
    )


def completion(body: Mapping[str, Any], defaults: sampler.SamplingParams, max_tokens: int | None) -> TextBody:
    """Returns what a body of `/completion` asks for; other arguments: `drawing.from_fields`."""
    fields = schema.read(COMPLETION_TABLE, body)
    prompts = required(fields, "prompt")
    if len(prompts) > 1:
        raise ApiError("prompt must be a string or a list of token ids here.", param="prompt")
    num_probs = fields.get("n_probs", 0)
    draw = {name: value for name, value in fields.items() if name not in ("n", "stream_options")}
    return TextBody(
        drawing=drawing.from_fields(draw, defaults, max_tokens),
        num_logprobs=num_probs if num_probs else None,
        prompts=prompts,
        echo=False,
    )
