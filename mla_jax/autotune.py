"""Measures tile sizes of the GPU kernels at the shapes of a model; `pallas_kernels.tuning` keeps the best.

The search takes one field of a Config after the other and keeps the value that is clearly faster.
"""

import dataclasses
import functools
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from checkpoints_tools.inspect import columns
from mla_jax.autotune_cases import Case
from pallas_kernels import tuning

_GAIN = 0.98  # a Config must take less than this share of the time of the best so far: the rest is noise
_ROUNDS, _REPEATS = 20, 5


@dataclasses.dataclass(frozen=True)
class Result:
    """The best Config that was tried, and the seconds a call takes with it and with the heuristic."""

    case: Case
    config: Any
    seconds: float
    heuristic_seconds: float

    @property
    def gain(self) -> float:
        """How many times faster it is than the heuristic."""
        return self.heuristic_seconds / self.seconds


def tune(
    cases: Sequence[Case],
    *,
    report: Callable[[str], None],
    timer: Callable[[Callable[[], Any]], float] | None = None,
    rounds: int = _ROUNDS,
) -> list[Result]:
    """Measures all cases, those left out for which nothing runs.

    Args:
      cases: what to measure.
      report: takes a line of progress.
      timer: calls a function and returns the seconds that it takes; None for the median of some calls.
      rounds: calls of the operation in one of the function.
    """
    results = []
    for number, case in enumerate(cases, 1):
        what = f"[{number}/{len(cases)}] {case.op} {case.key}"
        result = _search(case, timer or _seconds, rounds)
        if result is None:
            report(f"{what}: no configuration runs on this device")
            continue
        gain = (
            f"{result.gain:.2f} times as fast as" if math.isfinite(result.gain) else "which does run, unlike"
        )
        report(f"{what}: {result.seconds * 1e6:.1f} us, {gain} the heuristic")
        results.append(result)
    return results


def write(folder: pathlib.Path, kind: str, results: Sequence[Result]) -> pathlib.Path:
    """Adds results to the file of a kind of GPU and returns its path."""
    found = {}
    for result in results:
        found.setdefault(result.case.op, {})[result.case.key] = dataclasses.asdict(result.config)
    return tuning.write(folder, kind, found)


def table(results: Sequence[Result]) -> str:
    """Lays results out: times, gain over the heuristic, and the fields that differ from it."""
    rows = [("operation", "shape", "us", "heuristic", "gain", "chosen")]
    for result in results:
        times = (f"{seconds * 1e6:.1f}" for seconds in (result.seconds, result.heuristic_seconds))
        before, after = map(dataclasses.asdict, (result.case.heuristic, result.config))
        chosen = " ".join(f"{name}={value}" for name, value in after.items() if value != before[name])
        rows.append((result.case.op, result.case.key, *times, f"{result.gain:.2f}", chosen or "as it was"))
    return columns(rows)


def _search(case, timer, rounds):
    operands, tried = case.operands(), {}

    def seconds_of(config):
        if config not in tried:
            tried[config] = _measure(case, config, operands, timer, rounds)
        return tried[config]

    best = case.heuristic
    for field, values in case.choices.items():
        for value in values:
            trial = dataclasses.replace(best, **{field: value})
            if seconds_of(trial) < _GAIN * seconds_of(best):
                best = trial
    if not math.isfinite(seconds_of(best)):
        return None
    return Result(case, best, seconds_of(best), seconds_of(case.heuristic))


def _measure(case, config, operands, timer, rounds):
    """Returns the seconds of a call, or infinity if the Config does not compile or run on this device."""
    carried, kept = operands

    @jax.jit
    def calls(carried, kept):
        return jax.lax.fori_loop(0, rounds, lambda _, carried: case.step(config, carried, kept), carried)

    try:
        return timer(functools.partial(calls, carried, kept)) / rounds
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError):
        return math.inf


def _seconds(function):
    jax.block_until_ready(function())
    found = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        jax.block_until_ready(function())
        found.append(time.perf_counter() - started)
    return statistics.median(found)
