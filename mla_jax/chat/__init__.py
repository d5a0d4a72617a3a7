"""Conversations to prompts, and what a model writes back to an answer's parts.

    template = chat.template_for(tokenizer)                      # of the file, else a built-in one
    ids = chat.encode(messages, tokenizer, template=template, tools=tools, kwargs={"enable_thinking": True})
    is_thinking = chat.starts_in_reasoning(ids, tokenizer)
    answer = chat.Answer(chat.answer_format(template), tools=tools, starts_in_reasoning=is_thinking)
    for text in ...:                                             # as the model writes
        for delta in answer.feed(text): ...                      # content, reasoning or part of a tool call
    for delta in answer.finish(): ...

`encode` and `render` wait for another process (templates that are not built in are rendered there): a server
calls them from a thread. The text that `Answer` is fed must show the tokens `shown_tokens(tokenizer)`, which
decoding would leave out as control tokens.
"""

from mla_jax.chat.answer import Answer, Delta
from mla_jax.chat.formats import END_OF_THINK, answer_format, shown_tokens
from mla_jax.chat.messages import checked_kwargs
from mla_jax.chat.prompt import encode, render, special_texts, starts_in_reasoning
from mla_jax.chat.templates import BUILTIN_TEMPLATES, builtin_template, template_for

__all__ = [
    "BUILTIN_TEMPLATES",
    "END_OF_THINK",
    "Answer",
    "Delta",
    "answer_format",
    "builtin_template",
    "checked_kwargs",
    "encode",
    "render",
    "shown_tokens",
    "special_texts",
    "starts_in_reasoning",
    "template_for",
]
