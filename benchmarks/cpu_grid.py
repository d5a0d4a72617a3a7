"""The cells of one model, choice of cores and cache type: `Group` runs its engines in turn."""

import dataclasses
import os
import pathlib
import sys
import time
from collections.abc import Iterator

import cpu_report
import numpy as np
import sweep_bench
from cpu_report import NATIVE, OURS, PEER

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tests" / "peer"))

import ik

SCRIPTS = {OURS: pathlib.Path(__file__).with_name("ours.py"), PEER: pathlib.Path(ik.__file__)}
_FIRST_TOKEN = 3  # of decoding; the random ones are larger, so that no run finds the tokens of another


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is the same for the whole grid.

    Attributes:
      depths: tokens in the cache before a run, ascending.
      prompt: tokens of a prompt.
      predict: tokens to decode.
      repeats: runs of each engine in each cell.
      has_peer: measure the peer's package.
      peer_bin: folder of a native build of the peer, or None.
    """

    depths: tuple[int, ...]
    prompt: int
    predict: int
    repeats: int
    has_peer: bool
    peer_bin: str | None


class Group:
    """The engines, each in a process of its own, and what they did at each depth.

    Args:
      model: GGUF file.
      cores: that this process is pinned to already; the engines inherit it.
      cache_type: as ik_llama.cpp spells it.
      settings: of the grid.

    Attributes:
      sizes: what `ours.py` tells of the model.
    """

    def __init__(self, model: str, cores: list[int], cache_type: str, settings: Settings):
        self._settings = settings
        self._place = dict(model=pathlib.Path(model).name, cores=cores, cache_type=cache_type)
        size = settings.depths[-1] + max(settings.prompt, settings.predict)
        threads = dict(cache_type=cache_type, threads=len(cores))
        self._engines = {OURS: _Engine(model, SCRIPTS[OURS], settings, ctx_size=size, **threads)}
        if settings.has_peer:
            self._engines[PEER] = _Engine(model, SCRIPTS[PEER], settings, ctx_size=size, **threads)
        self._names = [*self._engines, *([NATIVE] if settings.peer_bin else [])]
        self._sweep_settings = dict(model=model, depth=settings.depths[-1], **threads)
        self._sweep_settings |= dict(prompt=settings.prompt, predict=settings.predict)
        self.sizes = self._engines[OURS].ask("describe")
        self._tokens = random_tokens(self.sizes["vocab_size"], size)
        self._cells = {}

    def measure(self) -> Iterator[int]:
        """Runs the engines in turn, depth by depth, and yields each depth when it is done."""
        settings, num_rounds = self._settings, 0
        for depth in settings.depths:
            self._cells[depth] = cell = self._cells.get(depth) or _Cell()
            cell.load_average = round(os.getloadavg()[0], 2)
            for name in self._engines:
                began = time.perf_counter()
                self._run(name, depth)
                cell.warm_up_seconds[name] = time.perf_counter() - began
            cell.runs = {name: runs for name, runs in cell.runs.items() if name == NATIVE}
            for _ in range(settings.repeats):
                for name in self._engines:
                    self._run(name, depth)
                if settings.peer_bin and num_rounds % len(settings.depths) == 0:
                    self._sweep()
                num_rounds += 1
            yield depth

    def cells(self, plain_read: float) -> list[dict]:
        """Returns the cells that were begun, ready for JSON.

        Args:
          plain_read: bytes per second of reading memory and nothing else.
        """
        begun = [(depth, cell) for depth, cell in self._cells.items() if cell.load_average is not None]
        return [self._describe(depth, cell, plain_read) for depth, cell in begun]

    def peak_rss(self) -> int | None:
        """Returns the most bytes of memory that the process of ours has held, None if it has ended."""
        return self._engines[OURS].ask("peak_rss") if self._engines[OURS].is_running else None

    def close(self) -> str:
        """Ends the processes, and returns the log of the peer."""
        for engine in self._engines.values():
            engine.close()
        return self._engines[PEER].log if PEER in self._engines else ""

    def _run(self, name, depth):
        cell = self._cells[depth]
        if name in cell.refusals:
            return
        try:
            cell.runs.setdefault(name, []).append(self._engines[name].run(self._tokens, depth))
        except RuntimeError as error:
            cell.refusals[name] = cpu_report.refusal(str(error))

    def _sweep(self):
        cells = [self._cells.setdefault(depth, _Cell()) for depth in self._settings.depths]
        if any(NATIVE in cell.refusals for cell in cells):
            return
        try:
            speeds = sweep_bench.run(self._settings.peer_bin, **self._sweep_settings)
            for depth, cell in self._cells.items():
                cell.runs.setdefault(NATIVE, []).append(speeds[depth])
        except RuntimeError as error:
            for cell in cells:
                cell.refusals[NATIVE] = cpu_report.refusal(str(error))

    def _describe(self, depth, cell, plain_read):
        weight_bytes, row_bytes = self.sizes["weight_bytes"], self.sizes["cache_bytes_per_token"]
        step_bytes = weight_bytes + row_bytes * (depth + self._settings.predict / 2)
        engines = {}
        for name in self._names:
            if name in cell.refusals:
                engines[name] = dict(refuses=cell.refusals[name])
            elif cell.runs.get(name):
                engines[name] = cpu_report.engine_cell(cell.runs[name], step_bytes, plain_read)
                if name in cell.warm_up_seconds:
                    engines[name]["warm_up_seconds"] = round(cell.warm_up_seconds[name], 2)
        sizes = dict(weight_bytes=weight_bytes, cache_bytes_per_token=row_bytes)
        found = dict(engines=engines, ratios=cpu_report.ratios(engines))
        return self._place | dict(depth=depth, load_average=cell.load_average) | sizes | found


class _Engine:
    """A process that starts when it is needed, again if it has ended, with tokens in its cache."""

    def __init__(self, model, script, settings, **options):
        self.log = ""
        self._settings = settings
        self._start = lambda: ik.Process(model, script=script, **options)
        self._process, self._depth = None, 0

    @property
    def is_running(self):
        return self._process is not None

    def ask(self, request, **arguments):
        """As `ik.Process.ask`; after a RuntimeError the next request meets a new process."""
        try:
            self._process = self._process or self._start()
            return self._process.ask(request, **arguments)
        except RuntimeError as error:
            self.log, self._process, self._depth = str(error), None, 0
            raise

    def run(self, tokens, depth):
        """Returns tokens per second of a prompt and of decoding after the first `depth` of `tokens`."""
        prompt, predict = self._settings.prompt, self._settings.predict
        if self._depth < depth:
            self.ask("prefill", tokens=tokens[self._depth : depth], start=self._depth)
            self._depth = depth
        prompt_seconds = self.ask("prefill", tokens=tokens[depth : depth + prompt], start=depth)
        decode_seconds = self.ask("decode", token=_FIRST_TOKEN, start=depth, predict=predict)
        return prompt / prompt_seconds, predict / decode_seconds

    def close(self):
        if self.is_running:
            self._process.close()
            self.log, self._process = self._process.log, None


@dataclasses.dataclass(kw_only=True)
class _Cell:
    """By engine: tokens per second of prefill and decode of each run, or why there are none."""

    runs: dict = dataclasses.field(default_factory=dict)
    refusals: dict = dataclasses.field(default_factory=dict)
    warm_up_seconds: dict = dataclasses.field(default_factory=dict)
    load_average: float | None = None


def random_tokens(vocab_size: int, count: int) -> list[int]:
    """Returns the ids that all engines are given."""
    return np.random.default_rng(0).integers(_FIRST_TOKEN + 1, vocab_size, count).tolist()
