"""From a file to text: `load` reads a model, `Model` holds its weights and the engine that draws texts."""

import contextlib
import dataclasses
import functools
import operator
import pathlib
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
from absl import logging

import checkpoints_tools
import cpu_kernels
from checkpoints_tools import hparams, lora_files
from checkpoints_tools.lora_files import AdapterSource
from mla_jax import cache as cache_lib
from mla_jax import chat, sampler, steps, taps, tokenizer
from mla_jax import expert_reduction as reduction_lib
from mla_jax.cache import init_cache
from mla_jax.completion import Completion, Piece, Timings
from mla_jax.config import ModelConfig, RunConfig
from mla_jax.nn.taps import check
from mla_jax.nn.transformer import lay_out
from mla_jax.segments import Segments
from mla_jax.serve.device import Device
from mla_jax.serve.engine import Engine
from mla_jax.serve.request import Request
from mla_jax.serve.ticket import Ticket
from mla_jax.sharding import MeshChoice

PACKAGED_MODEL = pathlib.Path(__file__).parent / "models" / "python-stdlib-15m-q8_0.gguf"
DEFAULT_CTX_SIZE = 8192
DEFAULT_UBATCH = 512
MAX_PARALLEL = 256
_CTX_SIZE_UPPER = 2**31 - 256  # positions are int32, and the cache is rounded up to 256 slots


class Model:
    """A model ready to generate: weights, vocabulary, run settings, and an engine with one pool of rows.

    Attributes:
      config: the model.
      run: mode, cache type and the like.
      params: nested dict of weights, to be used with `mla_jax.apply`.
      tokenizer: text to ids and back.
      ctx_size: tokens that the cache holds.
      engine: draws the texts; a server hands it many requests at once.
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
        parallel: int = 1,
        cache_ram: int | None = None,
        keep_drawn: bool = True,
        programs=steps,
        **engine,
    ):
        """Lays the weights out for the device; see `load` for what the arguments mean.

        Args:
          params: nested dict of weights.
          config: the model.
          vocabulary: its tokens.
          run: how it is run, edits included; nothing is there to take what is recorded.
          ctx_size: as for `load`.
          ubatch: prompt tokens computed at a time.
          parallel: requests that run at a time, on a mesh rounded up to a multiple of its `data`.
          cache_ram: MiB of rows kept for prompts that begin alike; None for as many as the cache holds.
          keep_drawn: keep rows of drawn tokens as well, see `Engine`.
          programs: what runs the steps: `mla_jax.steps`, or what has its functions, as `Segments` have.
          **engine: further arguments of `Engine`.

        Raises:
          ValueError: for a number out of range, or a vocabulary that does not fit.
        """
        _check_sizes(ctx_size, ubatch, parallel)
        check(config, run.taps)
        if run.taps is not None and run.taps.record:
            recorded = ", ".join(run.taps.record)
            raise ValueError(f"record must be empty for texts, `taps.generate` records, got {recorded}.")
        self.params = params if isinstance(programs, Segments) else lay_out(params, run)
        self.config, self.run, self._programs = config, run, programs
        self.ctx_size, self.timings = ctx_size, Timings()
        self.tokenizer = _tokenizer(vocabulary, config)
        self._ubatch, eog_ids = min(ubatch, ctx_size), self.tokenizer.eog_ids
        sizes = dict(ctx_size=ctx_size, ubatch=self._ubatch, max_rows=parallel)
        device = Device(self.params, config, run, eog_ids=eog_ids, programs=programs, **sizes)
        page_bytes = device.page_size * cache_lib.bytes_per_token(config, run)
        self.engine = Engine(
            device,
            self.tokenizer,
            ctx_size=ctx_size,
            expert_reduction=reduction_lib.per_layer(config, None),
            num_slots=parallel,
            prefix_pages=None if cache_ram is None else (cache_ram << 20) // page_bytes,
            keep_drawn=keep_drawn,
            **engine,
        )
        self._newest: Ticket | None = None
        self._num_read = 0  # pieces of the newest request

    @property
    def expert_reduction(self) -> tuple[reduction_lib.Setting, ...]:
        """(Kmin, t) of each layer, `expert_reduction.OFF` for none, for requests that do not say."""
        return self.engine.expert_reduction

    @expert_reduction.setter
    def expert_reduction(self, settings: tuple[reduction_lib.Setting, ...]) -> None:
        self.engine.expert_reduction = settings

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

        There is one stream: the next request ends this one, which then raises if it is read on.

        Args:
          prompt: text, special tokens in it parsed; or token ids, taken as they are.
          max_tokens: tokens to draw at most; negative for as many as the context holds.
          reuse_prefix: keep the cache of the tokens that this prompt shares with earlier ones, as chats do.
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
        request = Request(
            prompt=tuple(ids),
            max_tokens=max_tokens if max_tokens > 0 else None,
            sampling=params,
            expert_reduction=settings,
        )
        return self._stream(request, reuse_prefix)

    def encode_chat(self, messages: Sequence[dict], **options) -> list[int]:
        """Returns the prompt of a conversation, by the chat template of the file or a built-in one.

        Args:
          messages: mappings with "role" ("system", "user", "assistant" or "tool") and "content".
          **options: `template`, `tools` and `kwargs` of `chat.encode`.
        """
        return chat.encode(messages, self.tokenizer, **options)

    def save_cache(self, path: str | pathlib.Path, num_tokens: int | None = None) -> int:
        """Writes the cache of the newest request to a file, see `cache.save`, and returns its bytes.

        Args:
          path: the file, replaced if it exists; whole or not there.
          num_tokens: how many tokens of it; None for all.
        """
        if self._newest is None:
            raise ValueError("there must be a cache to save: generate something first.")
        request = self._newest.request
        num_cached = len(request.prompt) + self._num_read - 1
        if num_tokens is not None and not 0 <= num_tokens <= num_cached:
            raise ValueError(f"num_tokens must be in [0, {num_cached}], got {num_tokens}.")
        num_tokens = num_cached if num_tokens is None else num_tokens
        settings = request.expert_reduction
        slot = self._newest.newest_slot
        return self.engine.save_slot(slot, path, num_tokens=num_tokens, expert_reduction=settings)[1]

    def load_cache(self, path: str | pathlib.Path) -> list[int]:
        """Reads what `save_cache` wrote, for the next request with `reuse_prefix` to go on from.

        Returns:
          The tokens that are in the cache now.

        Raises:
          ValueError: if the file is not sound, or of another model, other settings or a larger context.
        """
        slot = self._newest.newest_slot if self._newest else None
        tokens = self.engine.restore_slot(slot or 0, path, cancels=True)
        self._newest = None
        return tokens

    def routing(self, tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Returns which experts each token takes in a pass over `tokens`, with the reduction of the model.

        Returns:
          ids i32[L, T, K] and weights f32[L, T, K] of the L layers that have experts, in order; the id of an
          expert that is left out is the number of experts, and its weight 0.
        """
        if self.run.shard is not None:
            raise ValueError("routing must be asked of a model on one device, got one on a mesh.")
        if self.config.moe is None:
            raise ValueError("routing must be asked of a model with experts, got one without.")
        tokens, parts = self._check(tokens), []
        cache = init_cache(self.config, self.run, batch=1, ctx_size=len(tokens))
        settings = dict(
            reduction=reduction_lib.arrays(self.expert_reduction), config=self.config, run=self.run
        )
        for count, width in steps.split_prompt(len(tokens), self._ubatch):
            padded = np.zeros((1, width), np.int32)
            padded[0, :count], tokens = tokens[:count], tokens[count:]
            cache, *routed = self._programs.route(self.params, padded, np.asarray([count]), cache, **settings)
            parts.append([np.asarray(part)[:, 0, :count] for part in routed])
        ids, weights = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
        return ids, weights

    def _encode(self, text):
        if not text:
            raise ValueError("the prompt must not be empty.")
        return self.tokenizer.encode(text)

    def _check(self, ids):
        ids = [operator.index(i) for i in ids]
        if not ids:
            raise ValueError("the prompt must hold at least one token, got none.")
        if len(ids) > self.ctx_size:
            raise ValueError(f"the prompt must fit the context of {self.ctx_size} tokens, got {len(ids)}.")
        for position, token in enumerate(ids):
            if not 0 <= token < self.config.vocab_size:
                raise ValueError(
                    f"token ids must be in [0, {self.config.vocab_size}), got {token} at position {position}."
                )
        return ids

    def _stream(self, request, reuse_prefix):
        if self._newest is not None:
            self._newest.cancel()
        if not reuse_prefix:
            self.engine.forget()
        ticket, pieces = self.engine.stream(request)
        self._newest, self._num_read, self.timings = ticket, 0, ticket.timings
        with contextlib.closing(pieces):
            for piece in pieces:
                if self._newest is not ticket:
                    raise ValueError(
                        "a stream must be read before the next request of its model, which has begun."
                    )
                self._num_read += 1
                yield piece


def _check_sizes(ctx_size, ubatch, parallel):
    if not 1 <= ctx_size <= _CTX_SIZE_UPPER:
        raise ValueError(f"ctx_size must be in [1, {_CTX_SIZE_UPPER}], got {ctx_size}.")
    if ubatch < 1:
        raise ValueError(f"ubatch must be at least 1, got {ubatch}.")
    if not 1 <= parallel <= MAX_PARALLEL:
        raise ValueError(f"parallel must be in [1, {MAX_PARALLEL}], got {parallel}.")


def _tokenizer(vocabulary, config):
    if len(vocabulary.tokens) != config.vocab_size:
        raise ValueError(
            f"the vocabulary must have the {config.vocab_size} tokens of the embedding, "
            f"got {len(vocabulary.tokens)}."
        )
    return tokenizer.Tokenizer(vocabulary)


def _prepare(compilation_cache, segments):
    """Keeps compiled code, but not where the folder cannot be made, as in a home that is not writable."""
    uses_cpu = jax.default_backend() == "cpu" or (segments is not None and segments.uses_cpu)
    if uses_cpu and not cpu_kernels.available():
        logging.warning("XLA computes, slowly, without CPU kernels: %s", cpu_kernels.unavailable_because())
    if compilation_cache is None:
        return
    try:
        steps.use_compilation_cache(pathlib.Path(compilation_cache))
    except OSError as error:
        logging.warning("compiled code is not kept: %s: %s", compilation_cache, error.strerror)


def _read(path, run, lora, *, segments, mesh, progress, mmap, run_time_repack):
    """Returns the checkpoint, its weights with adapters where they are to be, and the run with its shard."""
    if mesh is None:
        put = None if segments is None else functools.partial(segments.put, run=run)
        where = dict(mmap=mmap, on_host=segments and segments.is_on_host)
        where["in_panels"] = segments is None and run_time_repack
        checkpoint = checkpoints_tools.load_gguf(path, progress, put, **where)
        params = lora_files.adapted(checkpoint, lora)
        return checkpoint, params if segments is None else segments.put_all(params, run), run
    if segments is not None:
        raise ValueError("a mesh must come without segments, got both.")
    if lora:
        raise ValueError(
            "lora must be merged into the file (`mla-jax export-lora`) for a mesh, got adapters."
        )
    checkpoint, shard = checkpoints_tools.load_on_mesh(
        path, mesh.axes, splits_cache=mesh.splits_cache, progress=progress
    )
    return checkpoint, checkpoint.params, dataclasses.replace(run, shard=shard)


def context_size(config: ModelConfig, ctx_size: int | None) -> int:
    """Returns the tokens that a cache holds: `ctx_size`, or what None and 0 of it stand for, see `load`."""
    limit = config.context_length
    return min(limit, DEFAULT_CTX_SIZE) if ctx_size is None else (ctx_size or limit)


def _model(checkpoint, params, run, expert_reduction, *, ctx_size, segments, **model):
    model |= {} if segments is None else dict(programs=segments)
    ctx_size = context_size(checkpoint.config, ctx_size)
    vocabulary = hparams.vocabulary(checkpoint.metadata, checkpoint.config, checkpoint.path)
    loaded = Model(params, checkpoint.config, vocabulary, run=run, ctx_size=ctx_size, **model)
    loaded.expert_reduction = reduction_lib.per_layer(loaded.config, expert_reduction)
    return loaded


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
    group_routing: bool = True,
    gpu_kernels: bool | None = None,
    expert_reduction: reduction_lib.Setting | None = None,
    edits: Mapping[str, Callable] | None = None,
    lora: Sequence[AdapterSource | tuple[AdapterSource, float]] = (),
    compilation_cache: str | pathlib.Path | None = steps.COMPILATION_CACHE,
    progress=None,
    segments: Segments | None = None,
    mesh: MeshChoice | None = None,
    mmap: bool | None = None,
    run_time_repack: bool | None = None,
    **model,
) -> Model:
    """Loads a deepseek2 GGUF file and makes it ready to generate.

    Args:
      path: the file, or the first part of a split one; the packaged model by default.
      mla: 0 to 3, see `MLAMode`.
      flash: attend chunk by chunk, never holding the whole score matrix.
      cache_type: one of `config.CACHE_TYPES`; "q8_0" takes about half of "f16".
      cache_type_rope: of the rotary part, None for the same.
      hadamard_size: 64, 128, 256 or 512 latents of a quantised cache are rotated together first; None: none.
      attention_max_batch: MiB for some heads of attention at a time in modes 1 to 3; 0 for no limit.
      ctx_size: tokens that the cache of a group holds; 0: the model's own limit, None: that or 8,192 at most.
      group_routing: False ignores expert groups, as ik_llama.cpp does.
      gpu_kernels: False leaves a GPU to XLA; None takes the kernels where JAX's device is one.
      expert_reduction: (Kmin, t) of Smart Expert Reduction, see `ExpertReduction`; None for off.
      edits: functions that change values inside the network in every step, see `taps.run`.
      lora: adapters of weights, each alone or with the scale of its updates, see `lora_files.adapted`.
      compilation_cache: folder of compiled code of this process; None leaves it as it is.
      progress: called with (tensors done, tensors, bytes done, bytes) while loading; None prints a line.
      segments: for a model whose parts lie on several devices: which where, see `placement`. None: on one.
      mesh: for a model that devices share out, see `sharding`; None for one device.
      mmap: whether weights on the CPU stay in the file, see `checkpoints_tools.mapping`; None: large ones.
      run_time_repack: whether they are laid out in panels, on one device; None: those that are not mapped.
      **model: `ubatch`, `parallel` and further arguments of `Model`.

    Returns:
      The model.

    Raises:
      ValueError: for a file that is no sound deepseek2 GGUF, or a setting out of range.
    """
    of_cache = dict(cache_type=cache_type, cache_type_rope=cache_type_rope, hadamard_size=hadamard_size)
    how = dict(mla=mla, flash=flash, attention_max_batch=attention_max_batch, group_routing=group_routing)
    run = taps.tapped(RunConfig(**of_cache, **how, gpu_kernels=gpu_kernels), edits=edits)
    _prepare(compilation_cache, segments)
    where = dict(segments=segments, mesh=mesh, mmap=mmap, run_time_repack=run_time_repack)
    checkpoint, params, run = _read(path, run, lora, progress=progress, **where)
    return _model(checkpoint, params, run, expert_reduction, segments=segments, ctx_size=ctx_size, **model)
