"""What the routes work with: the model and its engine, the settings of the server, and bodies to requests."""

import dataclasses
import functools
import hashlib
import pathlib
import secrets
import weakref
from collections.abc import Sequence
from typing import Any

from mla_jax import chat, sampler
from mla_jax import expert_reduction as reduction_lib
from mla_jax.chat import forced_call
from mla_jax.serve import grammar as grammar_lib
from mla_jax.serve.http.answers import Answers
from mla_jax.serve.http.api_error import ApiError, busy
from mla_jax.serve.http.drawing import Drawing
from mla_jax.serve.http.metrics import Metrics
from mla_jax.serve.http.workers import Workers
from mla_jax.serve.request import QueueFull, Request


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a server answers.

    Attributes:
      alias: name of the model in answers.
      file_name: of the model, without its folder.
      adapters: names and scales of the adapters that its weights have.
      sampling: what requests do not say.
      max_tokens: tokens of an answer that does not say, None for as many as the context holds.
      api_keys: any of them opens every route; none at all leaves all open.
      hosts: that requests may be addressed to, as in `access.Access`; empty for any.
      origins: of pages elsewhere that may read answers.
      slot_folder: where slots are saved, None for nowhere.
      chat_template: that is used instead of the file's, None for the file's.
      template_kwargs: variables of the template that requests may override.
      reasoning_format: where reasoning goes: "none", "auto" or "deepseek".
      has_page: serve the chat page at `/`.
      has_slots: serve `/slots`.
      has_metrics: serve `/metrics`.
      num_threads: that read prompts, write templates and the like.
      body_bytes: that a request may have.
      body_seconds: that the body of a request may take to come.
      answer_seconds: that a request may take to be answered.
      send_seconds: that a client may take to read a part of its answer.
      stall_seconds: without a step of a busy engine after which the server is not ready.
    """

    alias: str
    file_name: str
    adapters: tuple[tuple[str, float], ...] = ()
    sampling: sampler.SamplingParams = dataclasses.field(default_factory=sampler.SamplingParams)
    max_tokens: int | None = None
    api_keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    slot_folder: pathlib.Path | None = None
    chat_template: str | None = None
    template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    reasoning_format: str = "auto"
    has_page: bool = True
    has_slots: bool = True
    has_metrics: bool = True
    num_threads: int = 8
    body_bytes: int = 1 << 20
    body_seconds: float = 30.0
    answer_seconds: float = 3600.0
    send_seconds: float = 600.0
    stall_seconds: float = 120.0


class Service:
    """The state of one server.

    Attributes:
      model: weights' sizes, tokenizer and settings; see `generate.Model`.
      engine: draws the texts.
      settings: of the server.
      metrics: that it measures.
      workers: threads for what takes too long for the event loop.
      is_draining: it takes no more requests, since it is about to stop.
      lost: the sentence about what it cannot do without and has lost, None if there is nothing.
    """

    def __init__(self, model: Any, settings: Settings):
        self.model, self.engine, self.settings = model, model.engine, settings
        experts = reduction_lib.experts_per_token(model.config, model.expert_reduction)
        self.metrics = Metrics(model.engine.stats, experts)
        self.workers = Workers(settings.num_threads)
        self._compilers = Workers(1)  # grammars are compiled one at a time, and prompts do not wait for them
        self.is_draining, self.lost = False, None
        self._answers: weakref.WeakSet[Answers] = weakref.WeakSet()

    def answers(self) -> Answers:
        """Returns the place for the texts of one HTTP request."""
        answers = Answers(
            self.engine,
            self.metrics,
            seconds=self.settings.answer_seconds,
            is_draining=lambda: self.is_draining or self.lost is not None,
        )
        if self.lost is not None:
            answers.lose(self.lost)
        self._answers.add(answers)
        return answers

    def lose(self, reason: str) -> None:
        """Answers 503 to all that run, wait and come; to be called on the event loop."""
        self.lost = reason
        for answers in list(self._answers):
            answers.lose(reason)

    def not_ready_because(self) -> str | None:
        """Returns why no request should be sent here, None if there is no reason."""
        if self.lost is not None:
            return self.lost
        if self.is_draining:
            return "the server is about to stop."
        age = self.engine.stats().seconds_since_step
        if age is not None and age > self.settings.stall_seconds:
            return f"the engine has made no step for {age:.0f} seconds."
        return None

    def encode(self, prompt: str | Sequence[int], name: str = "prompt") -> tuple[int, ...]:
        """Returns the token ids of a prompt: special tokens of a text parsed, ids checked.

        Raises:
          ApiError: for an empty prompt, one longer than the context, or an id out of range.
        """
        if isinstance(prompt, str) and len(prompt) > self._max_chars:
            message = (
                f"{name} must fit the context of {self.model.ctx_size} tokens, got {len(prompt)} characters."
            )
            raise ApiError(message, param=name, code="context_length_exceeded")
        try:
            ids = self.model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        except ValueError as error:
            raise ApiError(str(error), param=name) from None
        return self.checked(ids, name)

    def checked(self, ids: Sequence[int], name: str) -> tuple[int, ...]:
        """Returns `ids` of the field called `name`; errors as for `encode`."""
        num_ids = len(ids)
        if num_ids == 0:
            raise ApiError(f"{name} must hold at least one token, got none.", param=name)
        if num_ids > self.model.ctx_size:
            raise ApiError(
                f"{name} must fit the context of {self.model.ctx_size} tokens, got {num_ids}.",
                param=name,
                code="context_length_exceeded",
            )
        return self.checked_ids(ids, name)

    def checked_ids(self, ids: Sequence[int], name: str) -> tuple[int, ...]:
        """Returns `ids` of the field called `name`. Raises ApiError for one out of range."""
        size = self.model.config.vocab_size
        for position, token in enumerate(ids):
            if not 0 <= token < size:
                raise ApiError(
                    f"token ids must be in [0, {size}), got {token} at position {position}.", param=name
                )
        return tuple(ids)

    @functools.cached_property
    def _max_chars(self):
        """Characters that a context of the longest tokens has: who sends more need not be tokenised."""
        return self.model.ctx_size * max(map(len, self.model.tokenizer.vocabulary.tokens))

    async def grammar(self, drawing: Drawing) -> Any:
        """Returns the compiled grammar that answers must follow, None for none.

        Raises:
          ApiError: for one that cannot be compiled within its limits.
        """
        if drawing.grammar is None:
            return None
        kind, text = drawing.grammar
        return await self._compiled(kind, text, "grammar" if kind == "grammar" else "response_format")

    async def tool_grammar(
        self, drawing: Drawing, tools: Sequence[Any], choice: Any, form: str, *, is_single: bool
    ) -> Any:
        """Returns the compiled grammar of an answer that must call a tool.

        Args:
          drawing: how to draw.
          tools: that the model knows.
          choice: "required", or in a tuple the name of the tool to be called once.
          form: of the calls, see `chat.answer_format`.
          is_single: no more than one call.

        Raises:
          ApiError: for a format whose calls no grammar is made for, another grammar that is to be followed,
            or parameters that cannot be compiled.
        """
        if form not in forced_call.FORMS:
            raise ApiError(
                f"tool_choice must be none or auto for the tool calls of this model ({form}).",
                param="tool_choice",
            )
        if drawing.grammar is not None:
            raise ApiError(
                "tool_choice must be none or auto where a grammar or response_format is given.",
                param="tool_choice",
            )
        if isinstance(choice, tuple):
            tools, is_single = [tool for tool in tools if tool["function"]["name"] in choice], True
        tokens = self.model.tokenizer.vocabulary.tokens
        control = {tokens[token]: token for token in self.shown_tokens}
        text = await self.workers.run(lambda: forced_call.grammar(tools, form, control, is_single=is_single))
        return await self._compiled("tool_choice", text, "tools")

    async def _compiled(self, kind, text, param):
        asked = kind, text, self.model.tokenizer
        try:
            return grammar_lib.kept(*asked) or await self._compilers.run(grammar_lib.compile, *asked)
        except QueueFull as error:
            raise busy(error) from None
        except ValueError as error:
            raise ApiError(str(error), param=param) from None

    @functools.cached_property
    def template(self) -> str:
        """The chat template: that of the settings, else that of the model."""
        return self.settings.chat_template or chat.template_for(self.model.tokenizer)

    @functools.cached_property
    def shown_tokens(self) -> frozenset[int]:
        """Ids of the control tokens that chats must see the text of."""
        return chat.shown_tokens(self.model.tokenizer)

    def requests(
        self, ids: Sequence[int], drawing: Drawing, *, salt: str, grammar: Any = None, **more: Any
    ) -> list[Request]:
        """Returns the requests of one prompt, `drawing.num_choices` of them with seeds of their own.

        Args:
          ids: the prompt.
          drawing: how to draw.
          salt: of the client's key.
          grammar: compiled, None for none.
          **more: further fields of `Request`.

        Raises:
          ApiError: for a logit bias of a token that there is not.
        """
        size, reduction = self.model.config.vocab_size, None
        for token, _ in drawing.logit_bias:
            if token >= size:
                raise ApiError(
                    f"the token ids of logit_bias must be in [0, {size}), got {token}.", param="logit_bias"
                )
        if drawing.expert_reduction is not None:
            reduction = reduction_lib.per_layer(self.model.config, drawing.expert_reduction)
        seed = drawing.sampling.seed
        seeds = [
            secrets.randbits(31) if seed is None else (seed + choice) % 2**32
            for choice in range(drawing.num_choices)
        ]
        return [
            Request(
                prompt=tuple(ids),
                max_tokens=drawing.max_tokens,
                sampling=dataclasses.replace(drawing.sampling, seed=seed),
                expert_reduction=reduction,
                stop=drawing.stop,
                logit_bias=drawing.logit_bias,
                grammar=grammar,
                ignore_eos=drawing.ignore_eos,
                reuse_prefix=drawing.reuse_prefix,
                salt=salt,
                **more,
            )
            for seed in seeds
        ]


def salt_of(key: bytes | None) -> str:
    """Returns the salt of those who came with `key`: they share cached rows with no one else."""
    return "" if key is None else hashlib.sha256(b"mla-jax prefix cache\0" + key).hexdigest()
