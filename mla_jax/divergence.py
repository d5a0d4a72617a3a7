"""How far a model is from a base: another model of its vocabulary, or the same one run in another way.

For each predicted token of the windows of `perplexity`: KL(base || network), the Kullback-Leibler divergence
of the network's probabilities from the base's in nats; whether both hold the same token for the likeliest;
and how much the probability of the token that comes has changed.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax import perplexity, saved_logits
from mla_jax.generate import DEFAULT_UBATCH, Model
from mla_jax.perplexity import Estimate, Network, Perplexity, mean
from mla_jax.saved_logits import SavedLogits

_FIELDS = ("nats", "base_nats", "kl", "same_top")
_SUM_TOLERANCE = 0.01  # of probabilities in 16 bits: rounding alone stays two orders below


@dataclasses.dataclass(frozen=True, kw_only=True)
class Divergence:
    """What was measured of n = T - 1 - T // 2 predicted tokens in each window of T.

    Attributes:
      window: T.
      nats: f32[windows, n], the negative logarithm of each predicted token's probability.
      base_nats: f32[windows, n], the same of the base.
      kl: f32[windows, n], KL(base || network).
      same_top: bool[windows, n], whether the likeliest token is that of the base.
    """

    window: int
    nats: np.ndarray
    base_nats: np.ndarray
    kl: np.ndarray
    same_top: np.ndarray

    @property
    def perplexity(self) -> Perplexity:
        """Of the network."""
        return Perplexity(window=self.window, nats=self.nats)

    @property
    def base_perplexity(self) -> Perplexity:
        """Of the base."""
        return Perplexity(window=self.window, nats=self.base_nats)

    @property
    def mean_kl(self) -> Estimate:
        """The mean of `kl`."""
        return mean(self.kl)

    @property
    def delta_p(self) -> np.ndarray:
        """f64[windows, n], by how much the probability of the token that comes is above the base's."""
        return np.exp(-self.nats.astype(np.float64)) - np.exp(-self.base_nats.astype(np.float64))

    @property
    def mean_delta_p(self) -> Estimate:
        """The mean of `delta_p`."""
        return mean(self.delta_p)

    @property
    def rms_delta_p(self) -> Estimate:
        """The root mean square of `delta_p`."""
        square = mean(self.delta_p**2)
        root = math.sqrt(square.value)
        return Estimate(root, 0.5 * square.error / root if root else 0.0)

    @property
    def top1(self) -> Estimate:
        """The share of tokens with the same likeliest token."""
        return mean(self.same_top)

    @property
    def log_ratio(self) -> Estimate:
        """The logarithm of the perplexity over the base's; its error is that of the differences by token."""
        return mean(self.nats.astype(np.float64) - self.base_nats)

    @property
    def ratio(self) -> Estimate:
        """The perplexity over the base's."""
        return perplexity.exponential(self.log_ratio)

    @property
    def difference(self) -> Estimate:
        """The perplexity less the base's."""
        ours, bases = self.perplexity.estimate, self.base_perplexity.estimate
        nats, base_nats = self.nats.astype(np.float64), self.base_nats.astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):  # of infinite ones
            error = mean(ours.value * nats - bases.value * base_nats).error
        return Estimate(ours.value - bases.value, error)

    @property
    def correlation(self) -> float | None:
        """Of `nats` and `base_nats`, 1 for equal ones; None where either are all the same number."""
        if np.array_equal(self.nats, self.base_nats):
            return 1.0
        if not np.ptp(self.nats) or not np.ptp(self.base_nats):
            return None
        return float(np.corrcoef(self.nats.ravel(), self.base_nats.ravel())[0, 1])


def measure(
    base: Model | Network,
    network: Model | Network,
    windows: np.ndarray,
    *,
    batch: int | None = None,
    ubatch: int = DEFAULT_UBATCH,
    report: Callable[[Divergence], None] | None = None,
) -> Divergence:
    """Compares a network with a base, both of which read the windows.

    Args:
      base: what the other is compared with; `Network.of(model, cache_type="f32")`, say.
      network: the other, of the same vocabulary.
      windows: i32[N, T], as from `perplexity.windows_of`.
      batch: as for `perplexity.measure`.
      ubatch: as for `perplexity.measure`.
      report: called after each window with what was measured so far.

    Raises:
      ValueError: for vocabularies of two sizes, what `perplexity.hidden_states` refuses, or logits that are
        not finite.
    """
    _check_vocabularies("the base", base.config.vocab_size, network)
    how = dict(batch=batch, ubatch=ubatch)
    states = [perplexity.hidden_states(part, windows, **how) for part in (base, network)]
    settings = dict(config=network.config, run=network.run, base_config=base.config, base_run=base.run)

    def compare():
        for (base_x, place), (x, _), ids in zip(*states, perplexity.following(windows), strict=True):
            yield _compare(network.params, base.params, x, base_x, place, ids, **settings)

    return _collect(compare(), windows.shape[1], report)


def measure_saved(
    base: SavedLogits,
    network: Model | Network,
    windows: np.ndarray | None = None,
    *,
    batch: int | None = None,
    ubatch: int = DEFAULT_UBATCH,
    report: Callable[[Divergence], None] | None = None,
) -> Divergence:
    """Compares a network with a base whose logits are in a file; further arguments as for `measure`.

    Args:
      base: the file.
      network: what is compared with it.
      windows: i32[N, T], the windows of the file, but that they may begin otherwise (with BOS); None for the
        file's own.
      batch: as for `measure`.
      ubatch: as for `measure`.
      report: as for `measure`.

    Raises:
      ValueError: as `measure`, and if the windows or the file are not what they must be.
      OSError: if the file cannot be read.
    """
    windows = base.windows if windows is None else windows
    if windows.shape != base.windows.shape or not np.array_equal(windows[:, 1:], base.windows[:, 1:]):
        raise ValueError(
            f"{base.path} must be of the same text, cut into the same windows; "
            f"it has {' windows of '.join(map(str, base.windows.shape))} tokens."
        )
    _check_vocabularies(base.path, base.vocab_size, network)
    states = perplexity.hidden_states(network, windows, batch=batch, ubatch=ubatch)
    settings = dict(config=network.config, run=network.run)

    def compare():
        parts = zip(states, base.rows(), perplexity.following(windows), strict=True)
        for index, ((x, place), rows, ids) in enumerate(parts):
            scores, sums = _compare_saved(network.params, x, place, ids, *rows, **settings)
            if not (np.abs(np.asarray(sums) - 1) < _SUM_TOLERANCE).all():
                raise ValueError(
                    f"{base.path}: probabilities of window {index + 1} must sum to 1; the file is damaged."
                )
            yield scores

    return _collect(compare(), windows.shape[1], report)


def save_base(
    path: str | os.PathLike,
    network: Model | Network,
    windows: np.ndarray,
    *,
    batch: int | None = None,
    ubatch: int = DEFAULT_UBATCH,
    report: Callable[[Perplexity], None] | None = None,
) -> Perplexity:
    """Writes a base for `measure_saved`, 2 bytes a token of the vocabulary for each predicted token.

    Args:
      path: the file, replaced if it exists; whole or not there.
      network: the model.
      windows: as for `measure`.
      batch: as for `measure`.
      ubatch: as for `measure`.
      report: as for `perplexity.measure`.

    Returns:
      The perplexity.

    Raises:
      ValueError: as `measure`.
      OSError: if the file cannot be written.
    """
    states = perplexity.hidden_states(network, windows, batch=batch, ubatch=ubatch)
    settings = dict(config=network.config, run=network.run)

    def written():
        for (x, place), ids in zip(states, perplexity.following(windows), strict=True):
            nats, *rows = jax.device_get(_encode(network.params, x, place, ids, **settings))
            yield nats
            write(*rows)

    with saved_logits.writing(path, windows, network.config.vocab_size) as write:
        join = lambda found: Perplexity(window=windows.shape[1], nats=np.stack(found))
        return perplexity.collect(written(), join, report)


def _check_vocabularies(name, vocab_size, network):
    if vocab_size != network.config.vocab_size:
        raise ValueError(
            f"{name} must have the {network.config.vocab_size} tokens of the model's vocabulary, "
            f"got {vocab_size}."
        )


def _collect(scores, window, report):
    """Returns what the scores of windows come to: (nats, base_nats, kl, same_top) of each."""

    def join(found):
        fields = zip(_FIELDS, zip(*found, strict=True), strict=True)
        return Divergence(window=window, **{name: np.stack(values) for name, values in fields})

    return perplexity.collect(scores, join, report)


def _scores(base, is_told, logits, ids):
    """Returns `_FIELDS` of log-probabilities of the base and logits of the network, both f32[n, W].

    Where `is_told` is false the base is only known to be unlikely, which counts to no divergence.
    """
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    kl = jnp.sum(jnp.exp(base) * (base - logprobs), axis=-1, where=is_told)
    chosen = lambda values: -jnp.take_along_axis(values, ids[:, None], axis=-1)[:, 0]
    return chosen(logprobs), chosen(base), kl, base.argmax(axis=-1) == logprobs.argmax(axis=-1)


@functools.partial(jax.jit, static_argnames=("config", "run", "base_config", "base_run"))
def _compare(params, base_params, x, base_x, place, ids, *, config, run, base_config, base_run):
    def score(x, base_x, ids):
        base = perplexity.unembed(base_params, base_x, base_config, base_run)
        logits = perplexity.unembed(params, x, config, run)
        return _scores(jax.nn.log_softmax(base, axis=-1), True, logits, ids)

    return perplexity.in_pieces(score, x[place], base_x[place], ids, vocab_size=config.vocab_size)


@functools.partial(jax.jit, static_argnames=("config", "run"))
def _compare_saved(params, x, place, ids, scale, lowest, codes, *, config, run):
    def score(x, ids, scale, lowest, codes):
        base, is_told, total = saved_logits.decode(scale, lowest, codes)
        logits = perplexity.unembed(params, x, config, run)
        return _scores(base, is_told, logits, ids), total

    return perplexity.in_pieces(score, x[place], ids, scale, lowest, codes, vocab_size=config.vocab_size)


@functools.partial(jax.jit, static_argnames=("config", "run"))
def _encode(params, x, place, ids, *, config, run):
    def score(x, ids):
        logits = perplexity.unembed(params, x, config, run)
        return perplexity.cross_entropy(logits, ids), *saved_logits.encode(logits)

    return perplexity.in_pieces(score, x[place], ids, vocab_size=config.vocab_size)
