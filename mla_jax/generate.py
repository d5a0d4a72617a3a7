"""From a prompt to text on the host: `Model` holds the weights, the cache and the loop over `steps`."""

import collections
import dataclasses
import functools
import itertools
import operator
import pathlib
import secrets
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

import checkpoints_tools
import cpu_kernels
from checkpoints_tools import hparams
from mla_jax import cache as cache_lib
from mla_jax import chat, sampler, steps, tokenizer
from mla_jax import expert_reduction as reduction_lib
from mla_jax.cache import Cache, init_cache
from mla_jax.completion import Completion, Piece, Timings
from mla_jax.config import ModelConfig, RunConfig
from mla_jax.nn.transformer import lay_out

PACKAGED_MODEL = pathlib.Path(__file__).parent / "models" / "python-stdlib-15m-q8_0.gguf"
DEFAULT_CTX_SIZE = 8192
DEFAULT_UBATCH = 512
_CTX_SIZE_UPPER = 2**31 - 256  # positions are int32, and the cache is rounded up to 256 slots
_SMOOTH_SECONDS = 0.05  # that a stream may stand still for: 20 times a second looks like flowing


class Model:
    """A model ready to generate: weights, vocabulary, run settings and one cache.

    Attributes:
      config: the model.
      run: mode, cache type and the like.
      params: nested dict of weights, to be used with `mla_jax.apply`.
      tokenizer: text to ids and back.
      ctx_size: tokens that the cache holds.
      expert_reduction: (Kmin, t) of each layer, `expert_reduction.OFF` for none.
      timings: of the newest request.
    """

    def __init__(
        self,
        params,
        config: ModelConfig,
        vocabulary: tokenizer.Vocabulary,
        *,
        run: RunConfig,
        ctx_size: int,
        ubatch: int = DEFAULT_UBATCH,
    ):
        if not 1 <= ctx_size <= _CTX_SIZE_UPPER:
            raise ValueError(f"ctx_size must be in [1, {_CTX_SIZE_UPPER}], got {ctx_size}.")
        if ubatch < 1:
            raise ValueError(f"ubatch must be at least 1, got {ubatch}.")
        if len(vocabulary.tokens) != config.vocab_size:
            raise ValueError(
                f"the vocabulary must have the {config.vocab_size} tokens of the embedding, "
                f"got {len(vocabulary.tokens)}."
            )
        self.params, self.config, self.run = lay_out(params, run), config, run
        self.ctx_size, self.timings = ctx_size, Timings()
        self.expert_reduction = reduction_lib.per_layer(config, None)
        self.tokenizer = tokenizer.Tokenizer(vocabulary)
        self._ubatch = min(ubatch, ctx_size)
        self._cache: Cache | None = None
        self._cached_tokens: list[int] = []
        self._settings = self.expert_reduction  # that the cache was computed with
        self._num_requests = 0

    def generate(self, prompt: str | Sequence[int], *, max_tokens: int = 128, **sampling) -> Completion:
        """Returns the whole continuation of `prompt`; arguments as in `stream_generate`."""
        pieces = list(self.stream_generate(prompt, max_tokens=max_tokens, **sampling))
        tokens = tuple(p.token for p in pieces if p.token not in self.tokenizer.eog_ids)
        text = "".join(p.text for p in pieces)
        return Completion(
            text=text, tokens=tokens, finish_reason=pieces[-1].finish_reason, timings=self.timings
        )

    def stream_generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 128,
        reuse_prefix: bool = False,
        expert_reduction: reduction_lib.Setting | None = None,
        **sampling,
    ) -> Iterator[Piece]:
        """Yields the continuation of `prompt` as it is drawn, at most 0.05 s or one token late.

        There is one cache: the next request ends this stream, which then raises if it is read on.

        Args:
          prompt: text, special tokens in it parsed; or token ids, taken as they are.
          max_tokens: tokens to draw at most; negative for as many as the context holds.
          reuse_prefix: keep the cache of the tokens that this prompt shares with the last one, as chats do.
          expert_reduction: (Kmin, t) of all layers for this request, t = 0 for off; None for the model's.
          **sampling: fields of `SamplingParams`. Without a seed each call draws its own.

        Raises:
          ValueError: for an empty prompt, one longer than the context, an id out of range, or bad sampling.
        """
        params = sampler.SamplingParams(**sampling)
        if params.seed is None:
            params = dataclasses.replace(params, seed=secrets.randbits(31))
        ids = self._check(prompt if not isinstance(prompt, str) else self._encode(prompt))
        max_tokens = operator.index(max_tokens)
        if max_tokens == 0:
            raise ValueError("max_tokens must be positive, or negative for no limit, got 0.")
        settings = self.expert_reduction
        if expert_reduction is not None:
            settings = reduction_lib.per_layer(self.config, expert_reduction)
        return self._stream(ids, max_tokens, sampler.batch([params]), settings, reuse_prefix)

    def encode_chat(self, messages: Sequence[dict]) -> list[int]:
        """Returns the prompt of a conversation, by the chat template of the file or a built-in one.

        Args:
          messages: mappings with "role" ("system", "user" or "assistant") and "content".
        """
        vocabulary = self.tokenizer.vocabulary
        text = lambda token: "" if token is None else vocabulary.tokens[token]
        template = vocabulary.chat_template or chat.builtin_template(vocabulary.tokens)
        bos_token, eos_token = text(vocabulary.bos_id), text(vocabulary.eos_id)
        prompt = chat.render(messages, template, bos_token=bos_token, eos_token=eos_token)
        add_special = not (bos_token and prompt.startswith(bos_token))
        return self.tokenizer.encode(prompt, add_special=add_special)

    def save_cache(self, path: str | pathlib.Path, num_tokens: int | None = None) -> int:
        """Writes the cache of the newest request to a file, see `cache.save`, and returns its bytes.

        Args:
          path: the file, replaced if it exists; whole or not there.
          num_tokens: how many tokens of it; None for all.
        """
        if self._cache is None:
            raise ValueError("there must be a cache to save: generate something first.")
        num_cached = len(self._cached_tokens)
        if num_tokens is not None and not 0 <= num_tokens <= num_cached:
            raise ValueError(f"num_tokens must be in [0, {num_cached}], got {num_tokens}.")
        tokens = self._cached_tokens[:num_tokens]
        reduction = reduction_lib.describe(self._settings)
        return cache_lib.save(
            path, self._cache, tokens, model=self._fingerprint, run=self.run, expert_reduction=reduction
        )

    def load_cache(self, path: str | pathlib.Path) -> list[int]:
        """Reads what `save_cache` wrote, for the next request with `reuse_prefix` to go on from.

        Returns:
          The tokens that are in the cache now.

        Raises:
          ValueError: if the file is not sound, or of another model, other settings or a larger context.
        """
        empty = init_cache(self.config, self.run, batch=1, ctx_size=self.ctx_size)
        reduction = reduction_lib.describe(self.expert_reduction)
        cache, tokens = cache_lib.load(
            path, empty, model=self._fingerprint, run=self.run, expert_reduction=reduction
        )
        if len(tokens) > self.ctx_size:
            raise ValueError(
                f"{path} must have at most the {self.ctx_size} tokens of the context, got {len(tokens)}."
            )
        self._num_requests += 1  # a stream that is open ends
        self._cache, self._cached_tokens, self._settings = cache, tokens, self.expert_reduction
        return list(tokens)

    def routing(self, tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Returns which experts each token takes in a pass over `tokens`, with the reduction of the model.

        It uses the cache, so the newest stream ends.

        Returns:
          ids i32[L, T, K] and weights f32[L, T, K] of the L layers that have experts, in order; the id of an
          expert that is left out is the number of experts, and its weight 0.
        """
        if self.config.moe is None:
            raise ValueError("routing must be asked of a model with experts, got one without.")
        self._num_requests += 1
        tokens, parts, settings = self._check(tokens), [], self.expert_reduction
        for count, routed in self._steps(tokens, 0, settings, steps.route):
            parts.append([np.asarray(part)[:, 0, :count] for part in routed])
        self._cached_tokens = list(tokens)
        ids, weights = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
        return ids, weights

    @functools.cached_property
    def _fingerprint(self):
        return cache_lib.fingerprint(self.config, self.params)

    def _encode(self, text):
        if not text:
            raise ValueError("the prompt must not be empty.")
        return self.tokenizer.encode(text)

    def _check(self, ids):
        ids = [operator.index(i) for i in ids]
        if not ids:
            raise ValueError("the prompt must hold at least one token, got none.")
        if len(ids) > self.ctx_size:
            raise ValueError(
                f"the prompt must fit the context of {self.ctx_size} tokens, got {len(ids)} tokens."
            )
        for position, token in enumerate(ids):
            if not 0 <= token < self.config.vocab_size:
                raise ValueError(
                    f"token ids must be in [0, {self.config.vocab_size}), got {token} at position {position}."
                )
        return ids

    def _stream(self, ids, max_tokens, sampling, settings, reuse_prefix):
        self._num_requests += 1
        self.timings = Timings(prompt_tokens=len(ids))
        began = time.perf_counter()
        self._prefill(ids, settings, reuse_prefix)
        decoder = tokenizer.StreamDecoder(self.tokenizer)
        room = self.ctx_size - len(ids) + 1  # the last token that is drawn needs no slot
        limit = min(max_tokens, room) if max_tokens > 0 else room
        for count, (token, seconds) in enumerate(self._draw(ids, limit, sampling), start=1):
            if count == 1:
                self.timings.prompt_seconds = time.perf_counter() - began
            else:
                self.timings.decode_seconds += seconds
            self.timings.decoded_tokens = count - 1
            reason = None
            if token in self.tokenizer.eog_ids:
                reason = "stop"
            elif count == limit:
                reason = "length"
            text = "" if reason == "stop" else decoder.feed(token)
            yield Piece(token=token, text=text + (decoder.flush() if reason else ""), finish_reason=reason)
            if reason:
                return

    def _draw(self, ids, limit, sampling):
        """Yields `limit` tokens, fewer if one ends the text, and the seconds that each took.

        Tokens are drawn ahead of the reader. `_cached_tokens` has what step by step would be in the cache at
        each token; rows after those are dead, since a request sets the length of the cache when it begins.
        """
        request = self._num_requests
        tail = ids[:-1][-sampler.NUM_RECENT :]
        recent = np.full((1, sampler.NUM_RECENT), -1, np.int32)
        recent[0, sampler.NUM_RECENT - len(tail) :] = tail
        newest, num_steps, ahead = ids[-1], 1, collections.deque()
        for left in range(limit, 0, -1):
            if request != self._num_requests:
                raise ValueError(
                    "a stream must be read before the next request of its model, which has begun."
                )
            if not ahead:
                began = time.perf_counter()
                drawn, recent = self._decode(newest, recent, sampling, min(num_steps, left))
                seconds = (time.perf_counter() - began) / len(drawn)
                num_steps = steps.within(_SMOOTH_SECONDS, seconds)
                ahead.extend(drawn)
            self._cached_tokens.append(newest)
            newest = ahead.popleft()
            yield newest, seconds

    def _prefill(self, ids, settings, reuse_prefix):
        """Brings the cache to hold all of `ids` but the last, which `_decode` takes."""
        shared = 0
        if self._cache is not None and reuse_prefix and settings == self._settings:
            pairs = zip(self._cached_tokens, ids[:-1], strict=False)
            shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        self.timings.cached_tokens = shared
        for _ in self._steps(ids[:-1], shared, settings, steps.prefill):
            pass
        self._cached_tokens = ids[:-1]

    def _steps(self, ids, start, settings, step):
        """Yields (tokens, what else `step` returns) for each piece of `ids` from `start` on."""
        cache = self._cache or init_cache(self.config, self.run, batch=1, ctx_size=self.ctx_size)
        # The cache is donated: after a failure there is none.
        self._cache, self._cached_tokens, self._settings = None, [], settings
        cache = dataclasses.replace(cache, length=jnp.full((1,), start, jnp.int32))
        for count, width in steps.split_prompt(len(ids) - start, self._ubatch):
            tokens = np.zeros((1, width), np.int32)
            tokens[0, :count] = ids[start : start + count]
            num_tokens = np.asarray([count], np.int32)
            inputs = dict(reduction=self._reduction, config=self.config, run=self.run)
            out = step(self.params, tokens, num_tokens, cache, **inputs)
            cache, *rest = (out,) if isinstance(out, Cache) else out
            start += count
            yield count, rest
        self._cache = cache

    @property
    def _reduction(self):
        return None if self.config.moe is None else reduction_lib.arrays(self._settings)

    def _decode(self, token, recent, sampling, num_steps):
        cache = self._cache
        self._cache = None  # donated: after a step that failed the next request starts anew
        drawn, taken, recent, cache = steps.decode(
            self.params,
            np.asarray([token], np.int32),
            recent,
            cache,
            sampling,
            np.int32(num_steps),
            np.asarray(sorted(self.tokenizer.eog_ids), np.int32),
            reduction=self._reduction,
            config=self.config,
            run=self.run,
        )
        drawn, taken = jax.device_get((drawn, taken))  # waits, and raises what failed
        self._cache = cache
        return drawn[0, :taken].tolist(), recent


def _prepare(compilation_cache):
    """Keeps compiled code, but not where the folder cannot be made, as in a home that is not writable."""
    if jax.default_backend() == "cpu" and not cpu_kernels.available():
        logging.warning("XLA computes, slowly, without CPU kernels: %s", cpu_kernels.unavailable_because())
    if compilation_cache is None:
        return
    try:
        steps.use_compilation_cache(pathlib.Path(compilation_cache))
    except OSError as error:
        logging.warning("compiled code is not kept: %s: %s", compilation_cache, error.strerror)


def load(
    path: str | pathlib.Path = PACKAGED_MODEL,
    *,
    mla: int = 3,
    flash: bool = True,
    cache_type: str = "f16",
    cache_type_rope: str | None = None,
    hadamard_size: int | None = None,
    attention_max_batch: int = 256,
    ctx_size: int | None = None,
    ubatch: int = DEFAULT_UBATCH,
    group_routing: bool = True,
    gpu_kernels: bool | None = None,
    expert_reduction: reduction_lib.Setting | None = None,
    compilation_cache: str | pathlib.Path | None = steps.COMPILATION_CACHE,
    progress=None,
) -> Model:
    """Loads a deepseek2 GGUF file and makes it ready to generate.

    Args:
      path: the file, or the first part of a split one; the packaged model by default.
      mla: 0 to 3, see `MLAMode`.
      flash: attend chunk by chunk, never holding the whole score matrix.
      cache_type: one of `config.CACHE_TYPES`; "q8_0" takes about half of "f16".
      cache_type_rope: type of the rotary part, None for the same.
      hadamard_size: 64, 128, 256 or 512 latents are rotated together before they are quantised; None for
        none, and without effect on a cache that is not quantised.
      attention_max_batch: MiB for some heads of attention at a time in modes 1 to 3; 0 for no limit.
      ctx_size: tokens that the cache holds; 0 is the model's own limit, None that or 8,192, the smaller.
      ubatch: prompt tokens computed at a time.
      group_routing: False ignores expert groups, as ik_llama.cpp does.
      gpu_kernels: False leaves a GPU to XLA; None takes the kernels where JAX's device is one.
      expert_reduction: (Kmin, t) of Smart Expert Reduction, see `nn.moe.ExpertReduction`; None for off.
      compilation_cache: folder of compiled code, for all models of this process; None leaves it as it is.
      progress: called with (tensors done, tensors, bytes done, bytes) while loading; None prints a line.

    Returns:
      The model.

    Raises:
      ValueError: for a file that is no sound deepseek2 GGUF, or a setting out of range.
    """
    run = RunConfig(
        mla=mla,
        flash=flash,
        cache_type=cache_type,
        cache_type_rope=cache_type_rope,
        hadamard_size=hadamard_size,
        attention_max_batch=attention_max_batch,
        group_routing=group_routing,
        gpu_kernels=gpu_kernels,
    )
    _prepare(compilation_cache)
    checkpoint = checkpoints_tools.load_gguf(path, progress=progress)
    limit = checkpoint.config.context_length
    size = min(limit, DEFAULT_CTX_SIZE) if ctx_size is None else (ctx_size or limit)
    vocabulary = hparams.vocabulary(checkpoint.metadata, checkpoint.config, checkpoint.path)
    model = Model(checkpoint.params, checkpoint.config, vocabulary, run=run, ctx_size=size, ubatch=ubatch)
    model.expert_reduction = reduction_lib.per_layer(model.config, expert_reduction)
    return model
