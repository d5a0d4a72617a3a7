"""How well a model foresees a text: perplexity, in the windows of llama.cpp.

A text is cut into windows that follow each other. Each begins with the vocabulary's BOS, if that wants one,
and of each the tokens after its middle are predicted, so that all of them have some context. Every window has
a cache of its own: what the cache, the mode or fewer experts cost is measured as well. Other measures go on
from `hidden_states`.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax import expert_reduction as reduction_lib
from mla_jax.cache import init_cache
from mla_jax.config import ModelConfig, RunConfig
from mla_jax.generate import DEFAULT_UBATCH, Model
from mla_jax.nn import taps
from mla_jax.nn.transformer import Transformer

_BATCH_TOKENS = 2048  # of the windows that run together
_LOGITS_BYTES = 64 << 20  # held at a time
_SHORTEST = 3  # tokens: the first that is predicted has one before it and one after


class Estimate(NamedTuple):
    """A mean over tokens and its standard error."""

    value: float
    error: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """Weights and how they are run. A `Model` has these attributes too, and may stand in its place.

    Attributes:
      params: nested dict of weights, as from `checkpoints_tools.load_gguf` and `nn.transformer.lay_out`.
      config: the model.
      run: mode, cache type and the like.
      expert_reduction: (Kmin, t) of each layer; None for off.
    """

    params: Any
    config: ModelConfig
    run: RunConfig
    expert_reduction: tuple[reduction_lib.Setting, ...] | None = None

    @classmethod
    def of(
        cls, model: Model, *, expert_reduction: reduction_lib.Setting | None = None, **run: Any
    ) -> "Network":
        """Returns a model run in another way, with the same weights in memory.

        Args:
          model: whose weights and settings.
          expert_reduction: (Kmin, t) of all layers; None for the model's own settings.
          **run: fields of `RunConfig` to be changed, such as `cache_type="q4_0"`.
        """
        settings = model.expert_reduction
        if expert_reduction is not None:
            settings = reduction_lib.per_layer(model.config, expert_reduction)
        run = dataclasses.replace(model.run, **run)
        return cls(params=model.params, config=model.config, run=run, expert_reduction=settings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity:
    """What was measured.

    Attributes:
      window: tokens of a window, T.
      nats: f32[windows, T - 1 - T // 2], the negative logarithm of each predicted token's probability.
    """

    window: int
    nats: np.ndarray

    @property
    def estimate(self) -> Estimate:
        """The perplexity: exp of the mean of `nats`, with the error that theirs makes."""
        return exponential(mean(self.nats))

    @property
    def running(self) -> np.ndarray:
        """f64[windows], the perplexity of all windows so far."""
        sums = np.cumsum(self.nats.sum(axis=1, dtype=np.float64))
        return _exp(sums / (self.nats.shape[1] * np.arange(1, len(sums) + 1)))

    @property
    def by_window(self) -> np.ndarray:
        """f64[windows], the perplexity of each window alone."""
        return _exp(self.nats.mean(axis=1, dtype=np.float64))


def mean(values) -> Estimate:
    """Returns the mean of some numbers and its standard error, as llama.cpp has it: 0 for a single number."""
    values = np.asarray(values, np.float64)
    return Estimate(float(values.mean()), float(values.std() / math.sqrt(max(values.size - 1, 1))))


def exponential(nats: Estimate) -> Estimate:
    """Returns e to the power of a mean, with the error that its own makes; infinite above 709 nats."""
    value = float(_exp(nats.value))
    return Estimate(value, value * nats.error if nats.error else 0.0)


def cut(tokens: Sequence[int], size: int, *, bos_id: int | None = None, limit: int | None = None):
    """Cuts a text into windows; what is left at the end is not used.

    Args:
      tokens: the text.
      size: tokens of a window, T.
      bos_id: takes the place of the first token of each window; None for no change.
      limit: how many windows at most; None for all.

    Returns:
      i32[windows, T].

    Raises:
      ValueError: if a number is out of range or there is not one window.
    """
    if size < _SHORTEST:
        raise ValueError(f"a window must have at least {_SHORTEST} tokens, got {size}.")
    if limit is not None and limit < 1:
        raise ValueError(f"there must be at least 1 window, got {limit}.")
    count = min(len(tokens) // size, limit or len(tokens))
    if not count:
        raise ValueError(f"the text must have at least the {size} tokens of a window, got {len(tokens)}.")
    windows = np.asarray(tokens[: count * size], np.int32).reshape(count, size)
    return windows if bos_id is None else begun(windows, bos_id)


def begun(windows: np.ndarray, bos_id: int) -> np.ndarray:
    """Returns windows i32[N, T] that begin with `bos_id`."""
    windows = windows.copy()
    windows[:, 0] = bos_id
    return windows


def windows_of(model: Model, text: str, size: int = 512, *, limit: int | None = None) -> np.ndarray:
    """Returns windows i32[N, T] of a text in the vocabulary of a model; further arguments as of `cut`."""
    return cut(model.tokenizer.encode(text), size, bos_id=bos_id(model), limit=limit)


def bos_id(model: Model) -> int | None:
    """Returns the token that windows begin with, None where the vocabulary wants none."""
    vocabulary = model.tokenizer.vocabulary
    return vocabulary.bos_id if vocabulary.add_bos else None


def measure(
    network: Model | Network,
    windows: np.ndarray,
    *,
    batch: int | None = None,
    ubatch: int = DEFAULT_UBATCH,
    report: Callable[[Perplexity], None] | None = None,
) -> Perplexity:
    """Measures the perplexity of the second halves of windows.

    Args:
      network: the model.
      windows: i32[N, T], as from `cut` or `windows_of`.
      batch: windows that run together; None for as many as have 2,048 tokens.
      ubatch: tokens of a window computed at a time.
      report: called after each window with what was measured so far.

    Raises:
      ValueError: as `hidden_states`, or for logits that are not finite.
    """
    settings = dict(config=network.config, run=network.run)
    states = hidden_states(network, windows, batch=batch, ubatch=ubatch)
    parts = zip(states, following(windows), strict=True)
    nats = (_nats(network.params, x, place, ids, **settings) for (x, place), ids in parts)
    return collect(nats, lambda found: Perplexity(window=windows.shape[1], nats=np.stack(found)), report)


def collect(scores: Iterable[Any], join: Callable[[list], Any], report: Callable[[Any], None] | None):
    """Returns what the scores of windows come to.

    Args:
      scores: of each window an array, or a tuple of arrays.
      join: from the scores of some windows to what they come to.
      report: called after each window with what all so far come to.

    Raises:
      ValueError: for scores that are not finite.
    """
    found = []
    for score in scores:
        score = jax.device_get(score)
        if not all(np.isfinite(values).all() for values in jax.tree.leaves(score)):
            raise ValueError(f"logits must be finite, but those of window {len(found) + 1} are not.")
        found.append(score)
        if report is not None:
            report(join(found))
    return join(found)


def following(windows: np.ndarray) -> np.ndarray:
    """Returns the tokens that are predicted, i32[N, T - 1 - T // 2]."""
    return windows[:, windows.shape[1] // 2 + 1 :]


def hidden_states(
    network: Model | Network,
    windows: np.ndarray,
    *,
    batch: int | None = None,
    ubatch: int = DEFAULT_UBATCH,
) -> Iterator[tuple[jax.Array, np.int32]]:
    """Runs windows, some together, each with a cache of its own.

    Args:
      network: the model.
      windows: i32[N, T].
      batch: as for `measure`.
      ubatch: as for `measure`.

    Returns:
      An iterator that yields of each window (x f32[B, T - 1 - T // 2, D], place): x[place] are the hidden
      states that predict the tokens `following`.

    Raises:
      ValueError: for no windows or too short ones, a number or an id out of range, or taps that would have
        no effect.
    """
    _check(network, windows, batch, ubatch)
    num_windows, size = windows.shape
    batch = min(num_windows, max(1, _BATCH_TOKENS // size) if batch is None else operator.index(batch))
    return _states(network, windows, batch, ubatch)


def _check(network, windows, batch, ubatch):
    if windows.ndim != 2 or len(windows) < 1 or windows.shape[1] < _SHORTEST:
        raise ValueError(
            f"windows must be at least 1 of at least {_SHORTEST} tokens each, got shape {windows.shape}."
        )
    for name, count in (("batch", batch), ("ubatch", ubatch)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}.")
    vocab_size = network.config.vocab_size
    if windows.min() < 0 or windows.max() >= vocab_size:
        raise ValueError(
            f"token ids must be in [0, {vocab_size}), got ids from {windows.min()} to {windows.max()}."
        )
    taps.check_edits_alone(network.run.taps)


def _states(network, windows, batch, ubatch):
    for start in range(0, len(windows), batch):
        part = windows[start : start + batch]
        filled = np.concatenate([part, np.repeat(part[:1], batch - len(part), axis=0)])
        x = _hidden(network, filled, ubatch)
        yield from ((x, np.int32(place)) for place in range(len(part)))


def unembed(params, x: jax.Array, config: ModelConfig, run: RunConfig) -> jax.Array:
    """Returns logits f32[n, W] of hidden states [n, D]."""
    return Transformer(config, run).apply({"params": params}, x, method="unembed")


def cross_entropy(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns the negative logarithm of the probability of `ids` i32[...] by logits [..., W], f32[...]."""
    chosen = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def in_pieces(score: Callable, *arrays: jax.Array, vocab_size: int):
    """Returns `score(*arrays)` of arrays [n, ...], computed for some rows at a time.

    So many that their logits, which nobody keeps, take about 64 MiB, whatever the size of the vocabulary.

    Args:
      score: takes some rows of each array, and returns a pytree of arrays with as many rows.
      *arrays: what it is given.
      vocab_size: numbers of a row of logits.
    """
    num_rows = arrays[0].shape[0]
    count = -(-num_rows // max(1, _LOGITS_BYTES // (4 * vocab_size)))
    size = -(-num_rows // count)

    def split(array):
        padding = [(0, count * size - num_rows), *[(0, 0)] * (array.ndim - 1)]
        return jnp.pad(array, padding).reshape(count, size, *array.shape[1:])

    found = jax.lax.map(lambda rows: score(*rows), tuple(map(split, arrays)))
    return jax.tree.map(lambda part: part.reshape(count * size, *part.shape[2:])[:num_rows], found)


def _exp(nats):
    with np.errstate(over="ignore"):
        return np.exp(nats)


@functools.partial(jax.jit, static_argnames=("config", "run"))
def _nats(params, x, place, ids, *, config, run):
    score = lambda x, ids: cross_entropy(unembed(params, x, config, run), ids)
    return in_pieces(score, x[place], ids, vocab_size=config.vocab_size)


def _hidden(network, tokens, ubatch):
    """Returns hidden states f32[B, T - 1 - T // 2, D], that of the middle first, of windows i32[B, T]."""
    B, T = tokens.shape
    middle, parts = T // 2, []
    cache = init_cache(network.config, network.run, batch=B, ctx_size=T)
    reduction = None
    if network.config.moe is not None and network.expert_reduction is not None:
        reduction = reduction_lib.arrays(*[network.expert_reduction] * B)
    settings = dict(config=network.config, run=network.run)
    for start in range(0, T, ubatch):
        piece = tokens[:, start : start + ubatch]
        x, cache = _read(network.params, piece, cache, reduction, **settings)
        if start + piece.shape[1] > middle:
            parts.append(x[:, max(middle - start, 0) :])
    return jnp.concatenate(parts, axis=1)[:, :-1]


@functools.partial(jax.jit, static_argnames=("config", "run"), donate_argnames="cache")
def _read(params, tokens, cache, reduction, *, config, run):
    inputs = tokens, cache, None, None, reduction
    return Transformer(config, run).apply({"params": params}, *inputs, method="hidden")
