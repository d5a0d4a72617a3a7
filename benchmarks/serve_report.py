"""What `benchmarks/serve.py` makes of its runs: cells, ratios, tables and the plot.

python benchmarks/serve_report.py benchmarks/results/x.json     # prints the tables again, and plots again
"""

import importlib.util
import json
import pathlib
import statistics
import sys

import numpy as np

OURS, PEER = "ours", "peer"
LEAST_GAIN, MOST_WARM = 3.0, 0.15  # bars: the most streams over one stream, a known prefix over a new one
_PERCENTILES = (50, 90, 99)


def summarise(runs) -> dict:
    """Returns what the runs come to; see `serve_measure.measure` for them.

    Returns:
      cells: for each engine, prompt and number of streams, medians over the rounds; percentiles are of the
        requests, and of the gaps between events, of all rounds together.
      gains: `whole` is tokens per second at each number of streams over those at the least, the median over
        rounds; `decode` is that of decoding.
      prefix: of each engine, the first text after a prefix that is known over that after a new one.
      against: ours over each other engine's tokens per second, the median over rounds.
    """
    runs, prefixes = [run for run in runs if "streams" in run], [run for run in runs if "cold" in run]
    groups = _groups(runs, ("engine", "prompt", "streams"))
    cells = [_cell(found) for found in groups.values()]
    return dict(
        cells=sorted(cells, key=lambda cell: (cell["prompt"], cell["streams"], cell["engine"] != OURS)),
        gains=_gains(groups),
        prefix=[_prefix(found) for found in _groups(prefixes, ("engine",)).values()],
        against=_against(groups),
        texts_that_differ=_count_differing(runs),
    )


def print_tables(result) -> None:
    """Prints what a run found."""
    print(f"\n{result['model']}, {len(result['cores'])} cores: {result['cpu']}")
    head = f"{'prompt':>6} {'streams':>7} {'engine':8} {'tokens/s':>9} {'decode':>9}"
    widths = "".join(f"{f'{name} p{p}':>10}" for name in ("TTFT", "ITL") for p in _PERCENTILES)
    print(f"{head}{widths} {'client':>7} {'cores':>6}   (ms)")
    for cell in result["cells"]:
        place = f"{cell['prompt']:6} {cell['streams']:7} {cell['engine']:8}"
        speed = f"{cell['tokens_per_second']:9.1f} {cell['decode_tokens_per_second']:9.1f}"
        spread = "".join(
            f"{cell[kind][f'p{p}']:10.1f}" for kind in ("ttft_ms", "itl_ms") for p in _PERCENTILES
        )
        cores = f"{cell['server_cores']:6.2f}" if cell["server_cores"] is not None else f"{'-':>6}"
        print(f"{place} {speed}{spread} {cell['client_cpu_share']:7.1%} {cores}")
    print(f"the client alone: {result['client_alone_tokens_per_second']:,.0f} tokens/s")
    for row in result["gains"]:
        bar = f"   bar {LEAST_GAIN:g}" if row["streams"] == 16 else ""
        place = f"{row['engine']}, prompts of {row['prompt']}, {row['streams']} streams over {row['over']}"
        print(f"{place}: {row['whole']:.2f} ({_list(row['whole_runs'])}), decode {row['decode']:.2f}{bar}")
    for row in result["prefix"]:
        times = f"new {row['cold_ms']:.1f} ms, known {row['warm_ms']:.1f} ms, {row['share']:.1%}"
        place = f"{row['engine']}, prefix of {result['prefix_tokens']}"
        print(f"{place}: {times} ({_list(row['runs'])})   bar {MOST_WARM:g}")
    for row in result["against"]:
        place = f"ours / {row['engine']}, prompts of {row['prompt']}, {row['streams']} streams"
        print(f"{place}: {row['ratio']:.3f}")
    for name, count in result["texts_that_differ"].items():
        print(f"{name}: {count} texts depend on the number of streams")


def save_plot(result, path) -> None:
    """Draws tokens per second over streams, and percentiles of the gaps between events."""
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed (extra `notebooks`): there is no plot.", file=sys.stderr)
        return
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (speed, gaps) = plt.subplots(1, 2, figsize=(11, 4.5))
    for color, ((engine, prompt), cells) in enumerate(_groups(result["cells"], ("engine", "prompt")).items()):
        streams, label = [cell["streams"] for cell in cells], f"{engine}, prompts of {prompt}"
        style = dict(color=f"C{color}", linestyle="-" if engine == OURS else "--")
        middle = [cell["tokens_per_second"] for cell in cells]
        ends = [(min(cell["runs"]), max(cell["runs"])) for cell in cells]
        spread = [[m - low, high - m] for m, (low, high) in zip(middle, ends, strict=True)]
        speed.errorbar(
            streams, middle, np.transpose(spread), marker="o", markersize=5, capsize=3, label=label, **style
        )
        for percentile, marker in zip(_PERCENTILES, "o^s", strict=True):
            values = [cell["itl_ms"][f"p{percentile}"] for cell in cells]
            gaps.plot(streams, values, marker=marker, label=f"{label}, p{percentile}", **style)
    speed.set(ylabel="tokens/s, all streams", title=f"{result['model']}, {len(result['cores'])} cores")
    gaps.set(ylabel="ms", title="between two parts of a text")
    counts = sorted({cell["streams"] for cell in result["cells"]})
    for axis in (speed, gaps):
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, counts)
        axis.set(xlabel="concurrent streams")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _groups(rows, keys):
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def _cell(runs):
    first = runs[0]
    joined = lambda key: [value for run in runs for value in run[key]]
    median = lambda key: statistics.median(run[key] for run in runs)
    return dict(
        engine=first["engine"],
        prompt=first["prompt"],
        streams=first["streams"],
        tokens_per_second=round(median("tokens_per_second"), 2),
        runs=[round(run["tokens_per_second"], 2) for run in runs],
        decode_tokens_per_second=round(median("decode_tokens_per_second"), 2),
        ms_per_token=round(1e3 * statistics.median(joined("per_token")), 3),
        ttft_ms=_percentiles(joined("first")),
        itl_ms=_percentiles(joined("gaps")),
        events_per_token=round(median("events_per_token"), 4),
        client_cpu_share=round(max(run["client_cpu_share"] for run in runs), 4),
        server_cores=None if first["server_cores"] is None else round(median("server_cores"), 3),
    )


def _percentiles(seconds):
    values = 1e3 * np.percentile(seconds, _PERCENTILES) if seconds else [0.0] * len(_PERCENTILES)
    return {f"p{p}": round(float(value), 3) for p, value in zip(_PERCENTILES, values, strict=True)}


def _list(values):
    return ", ".join(f"{value:.2f}" for value in values)


def _ratios(runs, others, key="tokens_per_second"):
    """Returns the speed of one over that of the other in each round."""
    theirs = {run["round"]: run[key] for run in others}
    return [round(run[key] / theirs[run["round"]], 4) for run in runs]


def _gains(groups):
    rows, least = [], min((streams for _, _, streams in groups), default=0)
    for (engine, prompt, streams), runs in sorted(groups.items()):
        if streams == least:
            continue
        others = groups[engine, prompt, least]
        whole, decode = _ratios(runs, others), _ratios(runs, others, "decode_tokens_per_second")
        medians = dict(whole=statistics.median(whole), decode=statistics.median(decode))
        place = dict(engine=engine, prompt=prompt, streams=streams, over=least)
        rows.append(place | medians | dict(whole_runs=whole, decode_runs=decode))
    return rows


def _against(groups):
    rows = []
    for (engine, prompt, streams), runs in sorted(groups.items()):
        if engine != OURS:
            ratios = _ratios(groups[OURS, prompt, streams], runs)
            place = dict(engine=engine, prompt=prompt, streams=streams)
            rows.append(place | dict(ratio=statistics.median(ratios), runs=ratios))
    return rows


def _prefix(runs):
    shares = [round(run["warm"] / run["cold"], 4) for run in runs]
    return dict(
        engine=runs[0]["engine"],
        cold_ms=round(1e3 * statistics.median(run["cold"] for run in runs), 2),
        warm_ms=round(1e3 * statistics.median(run["warm"] for run in runs), 2),
        share=statistics.median(shares),
        runs=shares,
        num_cached=[run["num_cached"] for run in runs],
    )


def _count_differing(runs):
    """Returns engine -> prompts whose greedy text is not the same at every number of streams."""
    counts = {run["engine"]: 0 for run in runs}
    for (engine, _, _), found in _groups(runs, ("engine", "round", "prompt")).items():
        together = zip(*(run["texts"] for run in found), strict=True)
        counts[engine] += sum(len(set(texts)) > 1 for texts in together)
    return counts


if __name__ == "__main__":
    written = pathlib.Path(sys.argv[1])
    saved = json.loads(written.read_text())
    print_tables(saved)
    save_plot(saved, written.with_suffix(".png"))
