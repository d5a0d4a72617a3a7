"""Messages to one prompt, as text or as token ids."""

from collections.abc import Mapping, Sequence
from typing import Any

from mla_jax.chat import formats, renderer, sandbox, tool_text
from mla_jax.chat import messages as messages_lib
from mla_jax.chat import templates as templates_lib
from mla_jax.chat.stand_ins import StandIns
from mla_jax.tokenizer import Tokenizer

_TEMPLATE_CHARS_UPPER = 1 << 18
_PROMPT_END = 8  # tokens in which `<think>` and white space end a prompt, if they do


def render(
    messages: Sequence[Mapping[str, Any]],
    template: str,
    *,
    add_generation_prompt: bool = True,
    bos_token: str = "",
    eos_token: str = "",
    tools: Sequence[Mapping[str, Any]] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> str:
    """Writes a conversation as the prompt that the model was trained on.

    Args:
      messages: see `messages.normalised`.
      template: jinja2, with what Hugging Face's templates count on: trimmed blocks, loop controls, `tojson`,
        `raise_exception` and `strftime_now`. At most 256 Ki characters. The arguments of tool calls are both
        text and mapping to it.
      add_generation_prompt: end with the words that make the model answer.
      bos_token: text of the BOS token. A template may write it or not: encode the prompt with
        `add_special=not prompt.startswith(bos_token)`.
      eos_token: text of the EOS token.
      tools: see `messages.checked_tools`. What the template does not say about them is said in words.
      kwargs: further variables of the template, `enable_thinking` say, as JSON values; see
        `messages.checked_kwargs`.

    Returns:
      The prompt, of at most 1 Mi characters. Special tokens in messages look like those of the template.

    Raises:
      ValueError: a message or a tool is not as above, or the chat template fails or exceeds its limits of
        size, time (2 s) and memory (512 MiB).
    """
    variables = dict(
        messages_lib.checked_kwargs(kwargs),
        add_generation_prompt=add_generation_prompt,
        bos_token=bos_token,
        eos_token=eos_token,
    )
    clean, tools = messages_lib.normalised(messages), messages_lib.checked_tools(tools)
    return _write(clean, template, tools, variables)


def encode(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    template: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Returns the token ids of a conversation's prompt.

    Special tokens that the template writes are those tokens. In what `messages`, `tools` and `kwargs` say
    they are text, letter by letter. Tokens that a vocabulary defines beside its merges and that are no tags
    are found in any text, as everywhere.

    Args:
      messages: see `messages.normalised`.
      tokenizer: the model's.
      template: the chat template, None for what `template_for` returns.
      tools: see `messages.checked_tools`.
      kwargs: further variables of the template, as JSON values.
      add_generation_prompt: end with the words that make the model answer.

    Raises:
      ValueError: as `render`; or the prompt cannot be encoded, see `Tokenizer.encode`.
    """
    template = templates_lib.template_for(tokenizer) if template is None else template
    given = messages_lib.normalised(messages), messages_lib.checked_tools(tools)
    given = (*given, messages_lib.checked_kwargs(kwargs))
    written = messages_lib.to_json(given, "what the chat template is given")
    stand_ins = StandIns(tokenizer, written + template)
    clean = [_hidden(message, stand_ins) for message in given[0]]
    texts = special_texts(tokenizer)
    variables = dict(
        stand_ins.hide(given[2]),
        add_generation_prompt=add_generation_prompt,
        **texts,
    )
    prompt = _write(clean, template, stand_ins.hide(given[1]), variables)
    add_special = not (texts["bos_token"] and prompt.startswith(texts["bos_token"]))
    prompt = stand_ins.unescape(prompt)
    return tokenizer.encode(prompt, add_special=add_special, stand_ins=stand_ins.of(prompt))


def special_texts(tokenizer: Tokenizer) -> dict[str, str]:
    """Returns `bos_token` and `eos_token` as templates see them, empty where there is none."""
    vocabulary = tokenizer.vocabulary
    ids = {"bos_token": vocabulary.bos_id, "eos_token": vocabulary.eos_id}
    return {name: "" if token is None else vocabulary.tokens[token] for name, token in ids.items()}


def starts_in_reasoning(ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Tells whether the prompt has opened `<think>` already, so that the answer begins inside of it."""
    return tokenizer.decode(ids[-_PROMPT_END:], skip_special=False).rstrip().endswith(formats.THINK)


def _hidden(message, stand_ins):
    hidden = stand_ins.hide(message) | {"role": message["role"]}
    calls = []
    for call in message.get("tool_calls", ()):
        function = call["function"]
        arguments = stand_ins.hide_json(function["arguments"])
        function = {"name": stand_ins.hide(function["name"]), "arguments": arguments}
        calls.append(stand_ins.hide(call) | {"type": "function", "function": function})
    return hidden | {"tool_calls": calls} if calls else hidden


def _write(messages, template, tools, variables):
    if len(template) > _TEMPLATE_CHARS_UPPER:
        raise ValueError(
            f"the chat template must have at most {_TEMPLATE_CHARS_UPPER} characters, got {len(template)}."
        )
    messages = tool_text.declared(messages, tools, template, formats.answer_format(template))
    variables = variables | {"messages": messages} | ({"tools": tools} if tools else {})
    if template in templates_lib.BUILTIN_TEMPLATES.values():
        return sandbox.render(template, variables)
    request = messages_lib.to_json(
        {"template": template, "variables": variables}, "the chat template's input"
    )
    return renderer.SHARED.render(request)
