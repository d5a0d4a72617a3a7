"""What the engine has the device do: the weights, the pool of rows, and the compiled steps over them.

The engine knows tokens and pages, this file arrays. Batches are padded to a few sizes with copies of their
first row, which reads and writes what that row does: no further expert is read for it, and no page is hurt.

Devices along `data` of a mesh are groups, each with as many pages of the pool and as many rows of a batch.
Whose a row is follows from its pages. A group that has none takes part with one that has no page and no
expert.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.monitoring
import numpy as np

from mla_jax import cache as cache_lib
from mla_jax import expert_reduction as reduction_lib
from mla_jax import logits as logits_lib
from mla_jax import sampler, steps
from mla_jax.cache import Cache
from mla_jax.completion import Logprobs
from mla_jax.config import ModelConfig, RunConfig

MAX_ROWS = 16  # of a batch, and pages of a copy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A sequence that draws its next tokens.

    Attributes:
      tokens: all so far; rows of all but the newest are in the cache.
      pages: where they are, with room for the tokens to be drawn.
      sampling: how to draw.
      reduction: (Kmin, t) of each layer.
      bias: (token id, number added to its logit).
      allowed: u32[ceil(W / 32)], bits of the tokens that may be drawn; None for all.
      num_logprobs: how many likely tokens to tell; None for no logprobs at all.
    """

    tokens: Sequence[int]
    pages: Sequence[int]
    sampling: sampler.SamplingParams
    reduction: tuple[reduction_lib.Setting, ...]
    bias: tuple[tuple[int, float], ...] = ()
    allowed: np.ndarray | None = None
    num_logprobs: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of a prompt, to be written to the cache.

    Attributes:
      tokens: of the piece.
      start: how many are before it, whose rows are there.
      pages: where those are, with room for the piece.
      reduction: (Kmin, t) of each layer.
    """

    tokens: Sequence[int]
    start: int
    pages: Sequence[int]
    reduction: tuple[reduction_lib.Setting, ...]


class Device:
    """Weights and a pool of rows.

    Attributes:
      page_size: tokens in a page.
      num_groups: groups of devices; each has as many pages, one group after the other.
      num_pages: pages in the pool, of all groups.
      vocab_size: tokens of the vocabulary, W.
      widths: sizes that pieces of prompts are padded to.
      batches: sizes that the rows of each group are padded to.
      num_compiled: programs that were compiled, or read from the folder that keeps them, by this process.
    """

    def __init__(
        self,
        params,
        config: ModelConfig,
        run: RunConfig,
        *,
        ctx_size: int,
        ubatch: int,
        max_rows: int,
        eog_ids: Sequence[int],
        page_size: int = cache_lib.PAGE_SIZE,
        programs=steps,
    ):
        """Makes a device without rows.

        Args:
          params: nested dict of weights, as `programs` read them.
          config: the model.
          run: how it is run.
          ctx_size: tokens of the pool for each group, rounded up to pages.
          ubatch: prompt tokens computed at a time.
          max_rows: sequences of a batch at most, of all groups.
          eog_ids: end-of-generation tokens.
          page_size: tokens in a page.
          programs: `mla_jax.steps`, or what has the functions `prefill`, `decode`, `draw`, `init_pool`,
            `copy_pages`, `take_pages` and `put_pages` with the same arguments and results.
        """
        self.page_size, self.num_groups = page_size, 1 if run.shard is None else run.shard.data
        self._group_pages = -(-ctx_size // page_size)
        self.num_pages = self.num_groups * self._group_pages
        self.widths = steps.buckets(ubatch)
        self.batches = _batches(min(-(-max_rows // self.num_groups), MAX_ROWS))
        self.vocab_size = config.vocab_size
        self._params, self._settings = params, dict(config=config, run=run)
        self._config, self._run, self._layers, self._steps = config, run, None, programs
        self._eog_ids = np.asarray(sorted(eog_ids) or [-1], np.int32)
        self._samplings = {}
        no_expert = ((0, math.inf),) * config.num_layers
        self._no_part = Part(tokens=[], start=0, pages=[], reduction=no_expert)
        nobody = dict(pages=[], sampling=sampler.SamplingParams(seed=0), reduction=no_expert)
        self._no_row = Row(tokens=[-1], **nobody)

    @property
    def num_compiled(self) -> int:
        """Programs compiled so far in this process."""
        return _compilations.count

    @property
    def is_sound(self) -> bool:
        """Whether the rows are still there; a step that failed may have taken them along."""
        leaves = jax.tree.leaves(self._layers)
        if any(leaf.is_deleted() for leaf in leaves):
            return False
        try:
            jax.block_until_ready(leaves)
        except Exception:  # what failed was to write them
            return False
        return True

    def reset(self) -> None:
        """Forgets all rows."""
        self._layers = None

    def prefill(self, parts: Sequence[Part], width: int) -> None:
        """Computes the rows of some pieces, at most one of each group, padded to `width`."""
        of_group = {self._group(part.pages): part for part in parts}
        parts = [of_group.get(group, self._no_part) for group in range(self.num_groups)]
        padded = np.zeros((len(parts), width), np.int32)
        for part, tokens in zip(parts, padded, strict=True):
            tokens[: len(part.tokens)] = part.tokens
        count = np.asarray([len(part.tokens) for part in parts], np.int32)
        cache = self._steps.prefill(
            self._params,
            padded,
            count,
            self._cache([part.start for part in parts]),
            self._table([part.pages for part in parts]),
            self._reduction([part.reduction for part in parts]),
            **self._settings,
        )
        self._layers = cache.layers

    def decode(self, rows: Sequence[Row], num_steps: int) -> list[list[int]]:
        """Draws up to `num_steps` tokens for each row, fewer if all have drawn one that ends a text.

        There are at most as many rows of each group as a batch has.
        """
        rows, places = self._padded(rows)
        drawn, taken, _, cache = self._steps.decode(
            self._params,
            *self._inputs(rows),
            np.int32(num_steps),
            self._eog_ids,
            self._table([row.pages for row in rows]),
            self._reduction([row.reduction for row in rows]),
            **self._settings,
        )
        self._layers = cache.layers
        drawn, taken = jax.device_get((drawn, taken))  # waits, and raises what failed
        return drawn[places, :taken].tolist()

    def draw(self, rows: Sequence[Row]) -> list[tuple[int, Logprobs | None]]:
        """Draws a token for each row under its bias and mask, with its logprobs where they are wanted."""
        padded, places = self._padded(rows)
        drawn, told, cache = self._steps.draw(
            self._params,
            *self._inputs(padded),
            self._constraints(padded),
            self._table([row.pages for row in padded]),
            self._reduction([row.reduction for row in padded]),
            **self._settings,
        )
        self._layers = cache.layers
        drawn, told = jax.device_get((drawn, told))
        logprobs = []
        for row, *values in zip(rows, *(part[places] for part in told), strict=True):
            logprobs.append(None if row.num_logprobs is None else _logprobs(row.num_logprobs, *values))
        return list(zip(drawn[places].tolist(), logprobs, strict=True))

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies pages (source, target); no target is a source."""
        for some in _pieces(pairs) if pairs else ():
            sources, targets = (self._pages(part, MAX_ROWS) for part in zip(*some, strict=True))
            self._layers = self._steps.copy_pages(self._cache([0]), sources, targets).layers

    def take(self, pages: Sequence[int]):
        """Returns the rows of some pages in arrays of the host."""
        taken = [
            jax.device_get(self._steps.take_pages(self._cache([0]), self._pages(some, MAX_ROWS)))
            for some in _pieces(pages)
        ]
        return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(pages)], *taken)

    def put(self, pages: Sequence[int], layers) -> None:
        """Writes what `take` returned to as many pages."""
        padding = -len(pages) % MAX_ROWS or (0 if pages else MAX_ROWS)
        whole = lambda part: np.concatenate([part, np.zeros((padding, *part.shape[1:]), part.dtype)])
        layers = jax.tree.map(whole, layers)
        for index, some in enumerate(_pieces(pages)):
            rows = slice(index * MAX_ROWS, (index + 1) * MAX_ROWS)
            piece = jax.tree.map(lambda part, rows=rows: part[rows], layers)
            numbers = self._pages(some, MAX_ROWS)
            self._layers = self._steps.put_pages(self._cache([0]), numbers, piece).layers

    def save(self, path, tokens: Sequence[int], layers, expert_reduction: str) -> int:
        """Writes rows that `take` returned and their tokens, see `cache.save`, and returns the bytes."""
        cache = Cache(layers=layers, length=np.asarray([len(tokens)], np.int32))
        table = np.arange(-(-len(tokens) // self.page_size), dtype=np.int32)
        about = dict(model=self._fingerprint, run=self._run, expert_reduction=expert_reduction)
        return cache_lib.save(path, cache, tokens, pages=table, **about)

    def load(self, path, expert_reduction: str):
        """Reads what `save` wrote: rows for `put`, and their tokens; errors as of `cache.load`."""
        empty = jax.eval_shape(functools.partial(self._init, steps))
        layers = jax.tree.map(lambda part: np.zeros(part.shape, part.dtype), empty.layers)
        cache = Cache(layers=layers, length=np.zeros((1,), np.int32))
        table = np.arange(self.num_pages, dtype=np.int32)
        about = dict(model=self._fingerprint, run=self._run, expert_reduction=expert_reduction)
        cache, tokens = cache_lib.load(path, cache, pages=table, **about)
        num_pages = -(-len(tokens) // self.page_size)
        return jax.tree.map(lambda part: part[:num_pages], cache.layers), tokens

    def programs(self) -> list[tuple[str, Callable[[], None]]]:
        """Returns what there is to compile, by name: calls that run it once on no page at all."""
        off = (reduction_lib.OFF,) * self._config.num_layers
        row = Row(tokens=[0], pages=[], sampling=sampler.SamplingParams(seed=0), reduction=off)

        def swap():
            self.copy([(self.num_pages, self.num_pages)])
            self.put([self.num_pages], self.take([self.num_pages]))

        part = Part(tokens=[0], start=0, pages=[], reduction=off)
        widths = [
            (f"prompts of {size}", functools.partial(self.prefill, [part], size)) for size in self.widths
        ]
        plain = [
            (f"{size} at a time", functools.partial(self.decode, [row] * size, 1)) for size in self.batches
        ]
        bound = [
            (f"{size} under constraints", functools.partial(self.draw, [row] * size)) for size in self.batches
        ]
        return [*widths, *plain, *bound, ("pages", swap)]

    @functools.cached_property
    def _fingerprint(self):
        return cache_lib.fingerprint(self._config, self._params)

    def _init(self, programs):
        sizes = dict(num_pages=self.num_pages, page_size=self.page_size)
        return programs.init_pool(self._config, self._run, batch=self.num_groups, **sizes)

    def _cache(self, lengths):
        if self._layers is None:
            self._layers = self._init(self._steps).layers
        return Cache(layers=self._layers, length=np.asarray(lengths, np.int32))

    def _pages(self, pages, size):
        """Returns i32[size], filled up with what is no page."""
        filled = np.full((size,), self.num_pages, np.int32)
        filled[: len(pages)] = pages
        return filled

    def _table(self, rows):
        """Returns the pages of each row i32[B, M], as numbers in the part of the pool that its group has."""
        table = np.full((len(rows), self._group_pages), self.num_pages, np.int32)
        for pages, numbers in zip(rows, table, strict=True):
            numbers[: len(pages)] = np.asarray(pages, np.int32) % self._group_pages
        return table

    def _group(self, pages):
        return pages[0] // self._group_pages if pages else 0

    def _reduction(self, rows):
        return None if self._config.moe is None else reduction_lib.arrays(*rows)

    def _padded(self, rows):
        """Returns as many rows of each group, and where `rows` are among them."""
        groups = [[] for _ in range(self.num_groups)]
        for index, row in enumerate(rows):
            groups[self._group(row.pages)].append(index)
        size = next(size for size in self.batches if size >= max(map(len, groups)))
        padded, places = [], [0] * len(rows)
        for own in groups:
            for index in own:
                places[index] = len(padded)
                padded.append(rows[index])
            padded += [rows[own[0]] if own else self._no_row] * (size - len(own))
        return padded, places

    def _inputs(self, rows):
        """Returns newest tokens, those before, the cache and how to draw."""
        recent = np.full((len(rows), sampler.NUM_RECENT), -1, np.int32)
        for row, values in zip(rows, recent, strict=True):
            tail = row.tokens[:-1][-sampler.NUM_RECENT :]
            values[sampler.NUM_RECENT - len(tail) :] = tail
        newest = np.asarray([row.tokens[-1] for row in rows], np.int32)
        cache = self._cache([len(row.tokens) - 1 for row in rows])
        return newest, recent, cache, self._sampling(tuple(row.sampling for row in rows))

    def _sampling(self, params):
        if params not in self._samplings:
            self._samplings = {params: sampler.batch(params)}  # most steps have the rows of the last one
        return self._samplings[params]

    def _constraints(self, rows):
        constraints = logits_lib.no_constraints(len(rows), self._config.vocab_size)
        for i, row in enumerate(rows):
            if row.allowed is not None:
                constraints.allowed[i] = row.allowed
            for j, (token, bias) in enumerate(row.bias):
                constraints.bias_ids[i, j], constraints.bias[i, j] = token, bias
        return constraints


def _pieces(pages):
    """Returns pages some at a time, an empty piece of none."""
    return [pages[first : first + MAX_ROWS] for first in range(0, max(len(pages), 1), MAX_ROWS)]


def _batches(max_rows):
    """Returns the batch sizes that are compiled: 1, 2, 4, ... and `max_rows`."""
    sizes = [1]
    while 2 * sizes[-1] < max_rows:
        sizes.append(2 * sizes[-1])
    return (*sizes, max_rows) if max_rows > 1 else (1,)


def _logprobs(count, chosen, ids, top):
    pairs = zip(ids[:count].tolist(), top[:count].tolist(), strict=True)
    return Logprobs(chosen=float(chosen), top=tuple(pairs))


class _Compilations:
    """Counts what JAX compiles."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event, duration, **_):
        self.count += event == "/jax/core/compile/backend_compile_duration"


_compilations = _Compilations()
