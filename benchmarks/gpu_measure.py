"""How the GPU benchmark measures a case, judges it by the bars and tells it in a table."""

import dataclasses
import statistics
import time
from collections.abc import Container, Iterator

import jax
import jax.numpy as jnp

from benchmarks import gpu_peers
from benchmarks.gpu_cases import OURS, Case, Way

_RUN_SECONDS, _MOST_CALLS = 0.01, 100


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What the device reaches: bytes per second of a copy, FLOPs per second of a product."""

    copy: float
    product: float

    def bound(self, cost) -> tuple[float, str]:
        """Returns the least seconds of a call, and the ceiling that says so."""
        return max((cost.bytes_accessed / self.copy, "copy"), (cost.flops / self.product, "product"))


def seconds_per_call(way: Way, operands: tuple, *, calls: int, repeats: int) -> list[float]:
    """Times runs of `calls` calls, without the first run.

    Args:
      way: to compute the case.
      operands: those that it takes.
      calls: of a run; each takes what the one before returned.
      repeats: runs.
    """

    @jax.jit
    def run(first, operands):
        zeros = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype)
        start = way.first(operands) if way.first else jax.tree.map(zeros, way.result)
        call = lambda i, previous: way.run(first + i, previous, operands)
        return jax.lax.fori_loop(0, calls, call, start)

    seconds = []
    for i in range(repeats + 1):
        first = jnp.int32(i * calls)
        began = time.perf_counter()
        jax.block_until_ready(run(first, operands))
        seconds.append((time.perf_counter() - began) / calls)
    return seconds[1:]


def measure_ceilings(*, copied: int, product: int, calls: int, repeats: int) -> Ceilings:
    """Copies a large array and multiplies large matrices.

    Args:
      copied: bytes of the array.
      product: rows and columns of both matrices, which are bfloat16.
      calls: copies and products in a run.
      repeats: runs.
    """
    settings = dict(calls=calls, repeats=repeats)
    median = lambda way, *operands: statistics.median(seconds_per_call(way, operands, **settings))
    array = jax.ShapeDtypeStruct((copied // 4,), jnp.float32)
    square = jax.ShapeDtypeStruct((product, product), jnp.bfloat16)
    # powers of a matrix whose eigenvalues are within the unit circle
    matrix = (jax.random.normal(jax.random.key(0), square.shape) / product**0.5).astype(square.dtype)
    multiply = lambda index, previous, operands: jnp.dot(operands[0], previous, precision="default")
    copy = Way(run=lambda index, previous, operands: previous + 1, result=array)
    power = Way(run=multiply, result=square, first=lambda operands: operands[0])
    return Ceilings(copy=2 * 4 * array.size / median(copy), product=2 * product**3 / median(power, matrix))


def measure(
    case: Case,
    ceilings: Ceilings,
    *,
    memory: float | None,
    calls: int,
    repeats: int,
    has_peers: bool = True,
    libraries: Container[str] = gpu_peers.LIBRARIES,
) -> dict:
    """Runs the ways of a case.

    Args:
      case: to measure.
      ceilings: of the device.
      memory: bytes that a way may take, or None for any number.
      calls: of a run; 0 for as many as take about 10 ms at the ceiling, for peers in JAX fewer.
      repeats: runs.
      has_peers: whether to run more than the kernel.
      libraries: of the peers by PyTorch that run.

    Returns:
      The row of the result: sizes, cost, figures of each way or why there are none, and bars.
    """
    bound, binding = ceilings.bound(case.cost)
    row = dict(part=case.part, sizes=case.sizes, flops=case.cost.flops, bytes=case.cost.bytes_accessed)
    row |= dict(bound_seconds=bound, binding=binding, ways={})
    held, operands = _bytes_of(jax.eval_shape(case.operands)), None
    most = calls or min(_MOST_CALLS, max(2, round(_RUN_SECONDS / bound)))
    for name, way in case.ways.items() if has_peers else [(OURS, case.ways[OURS])]:
        need = held + 2 * _bytes_of(way.result) + way.workspace
        if memory is not None and need > memory:
            row["ways"][name] = dict(skipped=f"needs {need / 2**30:.3g} GiB of {memory / 2**30:.3g}")
            continue
        num_calls = most if name == OURS or calls else min(most, max(5, most // 10))
        try:
            operands = jax.jit(case.operands)() if operands is None else operands
            runs = seconds_per_call(way, way.prepare(operands), calls=num_calls, repeats=repeats)
        except (RuntimeError, ValueError) as error:  # of memory, of shapes that it cannot take
            row["ways"][name] = _failed(error)
        else:
            row["ways"][name] = _figures(case.cost, runs, num_calls, bound)
    for name, peer in case.peers.items() if has_peers else ():
        if name not in libraries:
            continue
        try:
            runs = gpu_peers.seconds_per_call(peer, calls=most, repeats=repeats)
        except Exception as error:  # whatever a library raises, or that it is not there
            row["ways"][name] = _failed(error)
        else:
            row["ways"][name] = _figures(case.cost, runs, most, bound)
    return row | dict(bars=[_judge(bar, row["ways"], ceilings) for bar in case.bars])


def left_out(case: Case, reason: str) -> dict:
    """Returns the row of a case that is not measured."""
    return dict(part=case.part, sizes=case.sizes, ways={OURS: dict(skipped=reason)}, bars=[])


def _bytes_of(shapes):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def _failed(error):
    reason = str(error).strip().partition("\n")[0]
    return dict(skipped=f"{type(error).__name__}: {reason}")


def _figures(cost, runs, calls, bound):
    seconds = statistics.median(runs)
    return dict(
        seconds=seconds,
        runs=runs,
        calls=calls,
        gb_per_second=cost.bytes_accessed / seconds / 1e9,
        tflops=cost.flops / seconds / 1e12,
        share=bound / seconds,
    )


def _judge(bar, ways, ceilings):
    """Returns the bar with what was got, and whether that is enough; None where something is missing."""
    got, ours = None, ways[OURS]
    other = ways.get(bar.of, {})
    if "seconds" in ours:
        if bar.of == "copy":
            got = ours["gb_per_second"] * 1e9 / ceilings.copy
        elif bar.of == "TFLOP/s":
            got = ours["tflops"]
        elif "seconds" in other:
            got = other["seconds"] / ours["seconds"]
    return dict(of=bar.of, least=bar.least, got=got, met=None if got is None else got >= bar.least)


def head() -> str:
    """Returns the first line of the table."""
    figures = f"{'us':>11} {'GB/s':>8} {'TFLOP/s':>8} {'share':>6} {'bound':8} bar"
    return f"{'part':8} {'sizes':32} {'way':14} {figures}"


def lines(row: dict) -> Iterator[str]:
    """Yields the lines of the table for a row."""
    sizes = " ".join(str(size) for size in row["sizes"].values())
    ours = row["ways"][OURS].get("seconds")
    for name, way in row["ways"].items():
        place = f"{row['part']:8} {sizes:32} {name:14}"
        if "skipped" in way:
            yield f"{place} {way['skipped']}"
            continue
        speeds = f"{way['seconds'] * 1e6:11.1f} {way['gb_per_second']:8.1f} {way['tflops']:8.2f}"
        note = f"{way['seconds'] / ours:.2f} times the kernel's time" if ours else ""
        if name == OURS:
            note = "; ".join(map(_bar_text, row["bars"]))
        yield f"{place} {speeds} {way['share']:6.1%} {row['binding']:8} {note}".rstrip()


def _bar_text(bar):
    of, least = bar["of"], bar["least"]
    texts = {"copy": f"copy >= {least:.0%}", "TFLOP/s": f"TFLOP/s >= {least:.0f}"}
    met = {None: "not known", True: "met", False: "not met"}[bar["met"]]
    return f"{texts.get(of, f'ahead of {of}')}: {met}"
