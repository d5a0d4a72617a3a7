"""`/v1/chat/completions`: conversations, with reasoning and tool calls told apart as they are written."""

import dataclasses
import re
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mla_jax import chat
from mla_jax.completion import Piece
from mla_jax.serve.after_reasoning import AfterReasoning
from mla_jax.serve.http import bodies, schema, shapes
from mla_jax.serve.http.answers import Answers
from mla_jax.serve.http.api_error import ApiError
from mla_jax.serve.http.body_reader import while_connected
from mla_jax.serve.http.event_stream import EventStream
from mla_jax.serve.http.routing import read_body, salt_of_request, service_of
from mla_jax.serve.http.service import Service

_FIELD = re.compile(r"(?:messages|tools|chat_template_kwargs)\b[\w\[\].]*")


async def chat_completions(request: Request) -> Response:
    """Answers a `POST /v1/chat/completions`."""
    service = service_of(request)
    settings = service.settings
    asked = await read_body(request, lambda body: bodies.chat(body, settings.sampling, settings.max_tokens))
    salt = salt_of_request(request)
    return await while_connected(request, lambda: _complete(service, asked, salt))


async def apply_template(request: Request) -> Response:
    """Answers a `POST /apply-template`: the prompt that a conversation becomes."""
    service = service_of(request)
    fields = await read_body(request, lambda body: schema.read(bodies.TEMPLATE_TABLE, body))
    messages = bodies.required(fields, "messages")
    render = lambda: chat.render(
        messages,
        service.template,
        tools=fields.get("tools"),
        add_generation_prompt=fields.get("add_generation_prompt", True),
        kwargs=_kwargs(service, bodies.template_kwargs(fields)),
        **chat.special_texts(service.model.tokenizer),
    )
    work = lambda: service.workers.run(_told, render)
    return JSONResponse({"prompt": await while_connected(request, work)})


class _Message:
    """One choice while it is written."""

    def __init__(self, answer: chat.Answer, tally: shapes.Tally, *, parallel: bool):
        self.tally, self._answer, self._parallel = tally, answer, parallel
        self.content, self.reasoning, self.logprobs = [], [], []
        self.calls: list[dict[str, Any]] = []
        self.has_second_call = False

    def add(self, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        """Takes pieces, and returns what is new as deltas of the API."""
        self.tally.add(pieces)
        deltas = self._answer.feed("".join(piece.text for piece in pieces))
        if self.tally.finish_reason is not None:
            deltas += self._answer.finish()
        return [told for told in map(self._tell, deltas) if told]

    @property
    def finish_reason(self) -> str:
        """Why the answer ended."""
        if self.has_second_call or (self.calls and self.tally.finish_reason == "stop"):
            return "tool_calls"
        return self.tally.finish_reason

    def message(self) -> dict[str, Any]:
        """Returns the whole answer."""
        content = "".join(self.content)
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if self.reasoning:
            message["reasoning_content"] = "".join(self.reasoning)
        if self.calls:
            message |= {"content": content or None, "tool_calls": self.calls}
        return message

    def _tell(self, delta):
        call = delta.tool_call
        if call is not None and call.index > 0 and not self._parallel:
            self.has_second_call = True
        if self.has_second_call:
            return {}
        told = {}
        if delta.content:
            self.content.append(delta.content)
            told["content"] = delta.content
        if delta.reasoning:
            self.reasoning.append(delta.reasoning)
            told["reasoning_content"] = delta.reasoning
        if call is not None:
            told["tool_calls"] = [self._tell_call(call)]
        return told

    def _tell_call(self, call):
        if call.name is None:
            self.calls[call.index]["function"]["arguments"] += call.arguments
            return {"index": call.index, "function": {"arguments": call.arguments}}
        function = {"name": call.name, "arguments": call.arguments}
        whole = {"id": call.id, "type": "function", "function": dict(function)}
        self.calls.append(whole)
        return {"index": call.index, "id": call.id, "type": "function", "function": function}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Prepared:
    """A conversation as requests, and how the answers to it are to be read."""

    requests: list[Any]
    form: str
    starts_in_reasoning: bool


async def _complete(service, asked, salt):
    form = chat.answer_format(service.template)
    if asked.tool_choice == "auto":
        compiled = await service.grammar(asked.drawing)
    else:
        compiled = await service.tool_grammar(
            asked.drawing, asked.tools, asked.tool_choice, form, is_single=not asked.parallel_tool_calls
        )
    prepared = await service.workers.run(_prepare, service, asked, form, compiled, salt)
    answers = service.answers()
    with answers.held():
        answers.submit(prepared.requests)
        messages = [
            _Message(
                chat.Answer(
                    prepared.form,
                    tools=asked.tools,
                    starts_in_reasoning=prepared.starts_in_reasoning,
                    reasoning_format=asked.reasoning_format or service.settings.reasoning_format,
                ),
                shapes.Tally(ticket),
                parallel=asked.parallel_tool_calls,
            )
            for ticket in answers.tickets
        ]
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time())}
        head["model"] = service.settings.alias
        if asked.drawing.stream:
            head["object"] = "chat.completion.chunk"
            return EventStream(_chunks(service, asked, answers, messages, head), answers)
        async for index, pieces in answers.pieces():
            _take(service, asked, answers, messages, index, pieces)
    choices = [
        {
            "index": index,
            "message": message.message(),
            "logprobs": {"content": message.logprobs} if asked.num_logprobs is not None else None,
            "finish_reason": message.finish_reason,
        }
        for index, message in enumerate(messages)
    ]
    body = head | {"object": "chat.completion", "choices": choices, "usage": _usage(messages)}
    return JSONResponse(body | {"timings": messages[0].tally.timings()})


def _prepare(service: Service, asked: bodies.ChatBody, form: str, compiled: Any, salt: str) -> _Prepared:
    """Does everything that may take long before a conversation is handed to the engine."""
    tokenizer = service.model.tokenizer
    ids = _told(
        lambda: service.model.encode_chat(
            asked.messages,
            template=service.template,
            tools=asked.tools,
            kwargs=_kwargs(service, asked.template_kwargs),
        )
    )
    starts_in_reasoning = chat.starts_in_reasoning(ids, tokenizer)
    if compiled is not None and starts_in_reasoning:
        compiled = AfterReasoning(compiled, tokenizer, chat.END_OF_THINK)
    return _Prepared(
        requests=service.requests(
            service.checked(ids, "messages"),
            asked.drawing,
            salt=salt,
            grammar=compiled,
            num_logprobs=asked.num_logprobs,
            shown_tokens=service.shown_tokens,
        ),
        form=form,
        starts_in_reasoning=starts_in_reasoning,
    )


def _told(work):
    """Returns what `work` does, its errors as answers that name the field."""
    try:
        return work()
    except ValueError as error:
        field = _FIELD.match(str(error))
        raise ApiError(str(error), param=field[0].rstrip(".") if field else "messages") from None


def _kwargs(service, given):
    # Each is checked by itself, which gives both names of thinking: else a request changed one of them alone.
    return chat.checked_kwargs(service.settings.template_kwargs) | chat.checked_kwargs(given)


def _take(service, asked, answers, messages, index, pieces):
    """Adds pieces to their choice, and returns (deltas, logprobs) that are new."""
    message, told = messages[index], []
    deltas = message.add(pieces)
    if asked.num_logprobs is not None:
        tell = lambda piece: shapes.chat_logprobs(service.model.tokenizer, piece.token, piece.logprobs)
        told = [tell(piece) for piece in pieces if piece.logprobs is not None]
        message.logprobs += told
    if message.has_second_call:
        answers.end(index)
    return deltas, told


async def _chunks(
    service: Service,
    asked: bodies.ChatBody,
    answers: Answers,
    messages: list[_Message],
    head: dict[str, Any],
) -> AsyncIterator[dict[str, Any]]:
    def chunk(index, delta, logprobs=(), finish_reason=None):
        told = {"content": logprobs} if logprobs else None
        choice = {"index": index, "delta": delta, "logprobs": told, "finish_reason": finish_reason}
        return head | {"choices": [choice]}

    for index in range(len(messages)):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for index, pieces in answers.pieces():
        message = messages[index]
        deltas, logprobs = _take(service, asked, answers, messages, index, pieces)
        is_last = message.tally.finish_reason is not None or message.has_second_call
        if not deltas and (logprobs or asked.drawing.timings_per_token) and not is_last:
            deltas = [{}]
        for delta in deltas:
            told = chunk(index, delta, logprobs)
            if asked.drawing.timings_per_token:
                told["timings"] = message.tally.timings()
            yield told
            logprobs = ()  # of the tokens, which have given several deltas
        if is_last:
            told = chunk(index, {}, logprobs, message.finish_reason)
            yield told | {"timings": message.tally.timings()}
    if asked.drawing.include_usage:
        yield head | {"choices": [], "usage": _usage(messages)}


def _usage(messages):
    of = messages[0].tally.ticket_timings
    drawn = sum(message.tally.num_drawn for message in messages)
    return shapes.usage(of.prompt_tokens, of.cached_tokens, drawn)
