"""What measures print and keep: lines and tables in the forms of llama.cpp and ik_llama.cpp, and records."""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mla_jax.divergence import Divergence
from mla_jax.perplexity import Estimate, Perplexity
from mla_jax.speed import Speed, SweepRow

_KL_PERCENTILES = (99.9, 99.0, 95.0, 90.0, 50.0, 10.0, 5.0, 1.0, 0.1)
_DELTA_PERCENTILES = (99.9, 99.0, 95.0, 90.0, 75.0, 50.0, 25.0, 10.0, 5.0, 1.0, 0.1)

DIVERGENCE_HEADER = (
    "chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence"
    "              Δp RMS            Same top p"
)
_SWEEP_WIDTHS = {"PP": 6, "TG": 6, "N_KV": 6, "T_PP s": 8, "S_PP t/s": 8, "T_TG s": 8, "S_TG t/s": 8}
SWEEP_HEADER = "\n".join(
    [
        f"|{' | '.join(name.rjust(width) for name, width in _SWEEP_WIDTHS.items())} |",
        f"|{'|'.join('-' * (width + 2) for width in _SWEEP_WIDTHS.values())[1:]}|",
    ]
)


def final_estimate(found: Perplexity) -> str:
    """Returns the last line of a perplexity."""
    value, error = found.estimate
    return f"Final estimate: PPL = {value:.4f} +/- {error:.5f}"


def divergence_line(found: Divergence) -> str:
    """Returns the line of the newest window, which tells of all windows so far."""
    parts = [f"{len(found.kl):4}", _plus_minus(found.perplexity.estimate, 9, 4)]
    parts += [_plus_minus(estimate, 10, 5) for estimate in (found.log_ratio, found.mean_kl)]
    parts += [_percent(estimate, 6) for estimate in (found.rms_delta_p, found.top1)]
    return "    ".join(parts)


def divergence_statistics(found: Divergence) -> str:
    """Returns three tables: of perplexity, of KL, and of the probabilities of the tokens that came."""
    kl, delta = found.kl.ravel(), 100 * found.delta_p.ravel()
    lines = ["====== Perplexity statistics ======"]
    for name, estimate in [
        ("Mean PPL(Q)                   ", found.perplexity.estimate),
        ("Mean PPL(base)                ", found.base_perplexity.estimate),
        ("Cor(ln(PPL(Q)), ln(PPL(base)))", None),
        ("Mean ln(PPL(Q)/PPL(base))     ", found.log_ratio),
        ("Mean PPL(Q)/PPL(base)         ", found.ratio),
        ("Mean PPL(Q)-PPL(base)         ", found.difference),
    ]:
        told = _share(found.correlation) if estimate is None else _plus_minus(estimate, 10, 6)
        lines.append(f"{name}: {told}")
    lines += ["", "====== KL divergence statistics ======"]
    lines.append(f"Mean    KLD: {_plus_minus(found.mean_kl, 10, 6)}")
    lines += [f"{name} KLD: {value:10.6f}" for name, value in _spread(kl, _KL_PERCENTILES)]
    lines += ["", "====== Token probability statistics ======"]
    lines.append(f"Mean    Δp: {_percent(found.mean_delta_p, 5)}")
    lines += [f"{name} Δp: {value:6.3f}%" for name, value in _spread(delta, _DELTA_PERCENTILES)]
    lines.append(f"RMS Δp    : {_percent(found.rms_delta_p, 5)}")
    lines.append(f"Same top p: {_percent(found.top1, 5)}")
    return "\n".join(lines)


def perplexity_record(found: Perplexity) -> dict[str, Any]:
    """Returns what a perplexity came to; None for what is not finite, which JSON has no number for."""
    value, error = map(_finite, found.estimate)
    windows, tokens = found.nats.shape
    return dict(window=found.window, windows=windows, tokens=windows * tokens, perplexity=value, error=error)


def perplexity_rows(found: Perplexity) -> list[dict[str, Any]]:
    """Returns a row for each window."""
    nats, values, running = found.nats.mean(axis=1, dtype=np.float64), found.by_window, found.running
    return [
        dict(window=i + 1, nats=float(nats[i]), perplexity=float(values[i]), running=float(running[i]))
        for i in range(len(nats))
    ]


def divergence_record(found: Divergence) -> dict[str, Any]:
    """Returns what a divergence came to; None for what is not finite."""
    record = perplexity_record(found.perplexity)
    estimates = dict(
        base_perplexity=found.base_perplexity.estimate,
        log_ratio=found.log_ratio,
        ratio=found.ratio,
        difference=found.difference,
        kl=found.mean_kl,
        delta_p=found.mean_delta_p,
        rms_delta_p=found.rms_delta_p,
        top1=found.top1,
    )
    for name, (value, error) in estimates.items():
        record |= {name: _finite(value), f"{name}_error": _finite(error)}
    spread = lambda values, percents: {
        "min": float(values.min()),
        **{f"{percent:g}": float(np.percentile(values, percent)) for percent in reversed(percents)},
        "max": float(values.max()),
    }
    record |= dict(correlation=found.correlation, kl_percentiles=spread(found.kl, _KL_PERCENTILES))
    return record | dict(delta_p_percentiles=spread(found.delta_p, _DELTA_PERCENTILES))


def divergence_rows(found: Divergence) -> list[dict[str, Any]]:
    """Returns a row for each window."""
    bases, tops = found.base_perplexity.by_window, found.same_top.mean(axis=1)
    kl, delta = found.kl.mean(axis=1, dtype=np.float64), np.sqrt((found.delta_p**2).mean(axis=1))
    return [
        row | dict(base_perplexity=float(base), kl=float(mean), rms_delta_p=float(change), top1=float(top))
        for row, base, mean, change, top in zip(
            perplexity_rows(found.perplexity), bases, kl, delta, tops, strict=True
        )
    ]


def sweep_line(row: SweepRow) -> str:
    """Returns a row of the table that `SWEEP_HEADER` begins."""
    sizes = f"|{row.prompt:6} | {row.predict:6} | {row.depth:6} |"
    prompt = f" {row.prompt_seconds:8.3f} | {row.prompt_speed:8.2f} |"
    return f"{sizes}{prompt} {row.predict_seconds:8.3f} | {row.predict_speed:8.2f} |"


def sweep_record(row: SweepRow, about: dict[str, int]) -> dict[str, Any]:
    """Returns a row with the keys of ik_llama.cpp's JSON lines, the settings before it."""
    return about | dict(
        pp=row.prompt,
        tg=row.predict,
        n_kv=row.depth,
        t_pp=row.prompt_seconds,
        speed_pp=row.prompt_speed,
        t_tg=row.predict_seconds,
        speed_tg=row.predict_speed,
    )


def bench_record(result: Speed, about: dict[str, Any]) -> dict[str, Any]:
    """Returns a result with the keys of llama-bench, what is the same for all results before it."""
    nanoseconds = [round(1e9 * seconds) for seconds in result.seconds]
    deviation = np.std(nanoseconds, ddof=1) if len(nanoseconds) > 1 else 0
    return about | dict(
        test=result.name,
        n_prompt=result.prompt,
        n_gen=result.predict,
        n_depth=result.depth,
        avg_ns=round(float(np.mean(nanoseconds))),
        stddev_ns=round(float(deviation)),
        avg_ts=result.mean,
        stddev_ts=result.deviation,
        samples_ns=nanoseconds,
        samples_ts=list(result.samples),
    )


def bench_table(results: Sequence[Speed], about: dict[str, Any]) -> str:
    """Returns a table in Markdown, as llama-bench prints it."""
    same = {
        "model": about["model_type"],
        "size": _with_unit(about["model_size"], {"GiB": 2**30, "MiB": 2**20}),
        "params": _with_unit(about["model_n_params"], {"B": 1e9, "M": 1e6}),
        "backend": about["backend"],
        "threads": str(about["n_threads"]),
        "type_k": about["type_k"],
        "mla": str(about["mla"]),
    }
    rows = [same | {"test": r.name, "t/s": f"{r.mean:.2f} ± {r.deviation:.2f}"} for r in results]
    to_left = ("model", "backend")
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    place = lambda name, cell: (cell.ljust if name in to_left else cell.rjust)(widths[name])
    line = lambda row: f"| {' | '.join(place(name, cell) for name, cell in row.items())} |"
    rule = ["-" * width if name in to_left else "-" * (width - 1) + ":" for name, width in widths.items()]
    return "\n".join([line({name: name for name in widths}), f"| {' | '.join(rule)} |", *map(line, rows)])


def bench_csv_rows(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns records without the single runs, for a table."""
    return [{key: value for key, value in record.items() if "samples" not in key} for record in records]


def json_lines(records: Sequence[dict[str, Any]]) -> str:
    """Returns a line of JSON for each record."""
    return "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)


def _spread(values, percents):
    """Yields the names and values of the largest, of percentiles from above, and of the smallest."""
    yield "Maximum", values.max()
    for percent in percents:
        yield "Median " if percent == 50 else f"{percent:4.1f}%  ", np.percentile(values, percent)
    yield "Minimum", values.min()


def _finite(value):
    return value if math.isfinite(value) else None


def _share(value):
    return "undefined" if value is None else f"{100 * value:6.2f}%"


def _with_unit(number, units):
    """Writes a number in the largest of some units that it has one of, or in the last."""
    unit = next((unit for unit, size in units.items() if number >= size), list(units)[-1])
    return f"{number / units[unit]:.2f} {unit}"


def _plus_minus(estimate: Estimate, width, digits):
    return f"{estimate.value:{width}.{digits}f} ± {estimate.error:{width}.{digits}f}"


def _percent(estimate: Estimate, width):
    return f"{100 * estimate.value:6.3f} ± {100 * estimate.error:{width}.3f} %"
