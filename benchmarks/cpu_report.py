"""What `benchmarks/cpu.py` makes of its measurements: cells, ratios, slopes, tables and the plot.

python benchmarks/cpu_report.py benchmarks/results/x.json     # prints the tables again, and plots again
"""

import importlib.util
import itertools
import json
import pathlib
import re
import statistics
import sys

import numpy as np

OURS, PEER, NATIVE = "ours", "ik_llama.cpp", "ik_llama.cpp native"
PARTS = ("prefill", "decode")
_GROUP = ("model", "cores", "cache_type")


def engine_cell(runs, step_bytes, plain_read) -> dict:
    """Summarises the runs of an engine in one cell of the grid.

    Args:
      runs: tokens per second of prefill and of decode, a pair for each run.
      step_bytes: what decoding one token reads.
      plain_read: bytes per second of reading memory and nothing else.
    """
    values = dict(zip(PARTS, zip(*runs, strict=True), strict=True))
    medians = {part: statistics.median(values[part]) for part in PARTS}
    bytes_per_second = medians["decode"] * step_bytes
    return dict(
        {f"{part}_tokens_per_second": round(medians[part], 2) for part in PARTS},
        **{f"{part}_runs": [round(value, 2) for value in values[part]] for part in PARTS},
        decode_gb_per_second=round(bytes_per_second / 1e9, 3),
        share_of_plain_read=round(bytes_per_second / plain_read, 4),
    )


def refusal(log: str) -> str:
    """Returns why a process ended, without folders: the last line `file:line: reason`, else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    reasons = [line for line in lines if re.match(r"\S+:\d+: \S", line)]  # a trace of the stack may follow
    words = (reasons or lines or ["nothing was said"])[-1].split(" ")
    return " ".join(pathlib.PurePath(word).name if word.startswith("/") else word for word in words)


def ratios(engines) -> dict:
    """Returns engine -> part -> tokens per second of ours over its own, of those that could be measured."""
    measured = {name: engine for name, engine in engines.items() if "refuses" not in engine}
    ours = measured.pop(OURS, None)
    return {name: _ratios(ours, engine) for name, engine in measured.items()} if ours else {}


def add_ratios_to_f16(cells) -> None:
    """Adds `ratios_to_f16` where an engine refuses a cache: ours with it over that engine with float16."""
    plain = {_place(cell): cell["engines"] for cell in cells if cell["cache_type"] == "f16"}
    for cell in cells:
        other, ours = plain.get(_place(cell), {}), cell["engines"][OURS]
        refusing = [name for name, engine in cell["engines"].items() if "refuses" in engine and name != OURS]
        possible = [name for name in refusing if "refuses" not in other.get(name, dict(refuses=""))]
        if possible and "refuses" not in ours:
            cell["ratios_to_f16"] = {name: _ratios(ours, other[name]) for name in possible}


def slopes(cells, plain_reads) -> list[dict]:
    """Fits lines to decode seconds over depth.

    Args:
      cells: of the grid.
      plain_reads: bytes per second by name of the cores.

    Returns:
      For each engine with several depths its microseconds a token per 1,000 tokens of depth, and those of
      reading as much of the cache and doing nothing else.
    """
    rows = []
    for group, depths in itertools.groupby(cells, key=lambda cell: [cell[key] for key in _GROUP]):
        depths = list(depths)
        first = depths[0]
        read = 1e9 * first["cache_bytes_per_token"] / plain_reads[_cores(first)]
        for name in first["engines"]:
            points = _points(depths, name)
            if len(points) > 1:
                slope = np.polyfit(*zip(*points, strict=True), 1)[0] * 1e9
                microseconds = dict(us_per_1000_tokens=round(slope, 1), plain_read_us=round(read, 1))
                rows.append(dict(zip(_GROUP, group, strict=True), engine=name, **microseconds))
    return rows


def print_tables(result) -> None:
    """Prints what a run found."""
    for name, speed in result["plain_read"].items():
        print(f"plain read on cores {name}: {speed / 1e9:.1f} GB/s")
    for _, cells in itertools.groupby(result["cells"], key=lambda cell: [cell[key] for key in _GROUP]):
        _print_group(list(cells))
    print("\ndecode against depth, microseconds a token per 1,000 tokens of depth")
    for row in result["slopes"]:
        found = f"{row['us_per_1000_tokens']:10.1f}   reading the cache {row['plain_read_us']:8.1f}"
        print(f"  {_title(row):60} {row['engine']:20} {found}")
    print("\nmost memory of this project, and 1.1 times the file + 600 MB")
    for row in result["memory"]:
        sizes = row["peak_rss_bytes"] / 1e6, row["bound_bytes"] / 1e6
        print(f"  {_title(row):60} {sizes[0]:10,.0f} MB of {sizes[1]:10,.0f} MB")
    print("\nKL(float32 products || engine) in nats and the share of tokens with the same best token")
    for row in result["quality"]:
        found = f"refuses: {row['refuses']}" if "refuses" in row else f"{row['kl']:10.2e} {row['top1']:8.2%}"
        print(f"  {row['model']:40} {row['way']:13} {row['engine']:20} {found}")


def save_plot(result, path) -> None:
    """Draws decode milliseconds over depth, a panel for each model and choice of cores."""
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed (extra `notebooks`): there is no plot.", file=sys.stderr)
        return
    import matplotlib.pyplot as plt

    panels = {}
    for cell in result["cells"]:
        panels.setdefault((cell["model"], _cores(cell)), []).append(cell)
    figure, axes = plt.subplots(1, len(panels), figsize=(6.5 * len(panels), 4.5), squeeze=False)
    markers = {OURS: "o", PEER: "s", NATIVE: "D"}
    for axis, ((model, cores), cells) in zip(axes[0], panels.items(), strict=True):
        for color, kind in enumerate(dict.fromkeys(cell["cache_type"] for cell in cells)):
            chosen = [cell for cell in cells if cell["cache_type"] == kind]
            for name in chosen[0]["engines"]:
                points = [(depth, 1e3 * seconds) for depth, seconds in _points(chosen, name)]
                style = dict(marker=markers[name], linestyle="-" if name == OURS else "--")
                if points:
                    axis.plot(*zip(*points, strict=True), color=f"C{color}", label=f"{name}, {kind}", **style)
            ends = [min(cell["depth"] for cell in chosen), max(cell["depth"] for cell in chosen)]
            reads = [chosen[0]["weight_bytes"] + chosen[0]["cache_bytes_per_token"] * depth for depth in ends]
            floor = [1e3 * num_bytes / result["plain_read"][cores] for num_bytes in reads]
            axis.plot(ends, floor, color=f"C{color}", linestyle=":", label=f"plain read, {kind}")
        axis.set(title=f"{model}, cores {cores}", xlabel="tokens in the cache", ylabel="ms per token")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _print_group(cells):
    first = cells[0]
    sizes = f"a token reads {first['weight_bytes']:,} bytes of weights and {first['cache_bytes_per_token']:,}"
    print(f"\n{_title(first)}: {sizes} of each token before it")
    columns = ("prefill", "ours/it", "decode", "ours/it", "GB/s", "of read")
    widths = (9, 8, 9, 8, 7, 7)
    headings = [f"{column:>{width}}" for column, width in zip(columns, widths, strict=True)]
    print(f"{'depth':>6}  {'tokens/s':20}", *headings)
    for cell in cells:
        for name, engine in cell["engines"].items():
            place = f"{cell['depth']:6}  {name:20}"
            if "refuses" in engine:
                print(f"{place} refuses: {engine['refuses']}")
                if name in cell.get("ratios_to_f16", {}):
                    found = [f"{part} {cell['ratios_to_f16'][name][part]:.3f}" for part in PARTS]
                    print(f"{'':28} ours with {cell['cache_type']} / it with f16: {', '.join(found)}")
                continue
            ratio = cell["ratios"].get(name, {})
            for part in PARTS:
                place += f" {engine[f'{part}_tokens_per_second']:9.1f}"
                place += f" {ratio[part]:8.3f}" if ratio else f"{'':9}"
            speed = engine["decode_gb_per_second"], engine["share_of_plain_read"]
            print(f"{place} {speed[0]:7.2f} {speed[1]:7.1%}")


def _title(row):
    return f"{row['model']}, cores {_cores(row)}, cache {row['cache_type']}"


def _cores(row):
    return ",".join(map(str, row["cores"]))


def _place(cell):
    return cell["model"], *cell["cores"], cell["depth"]


def _ratios(ours, other):
    keys = {part: f"{part}_tokens_per_second" for part in PARTS}
    return {part: round(ours[key] / other[key], 4) for part, key in keys.items()}


def _points(cells, name):
    """Returns (depth, decode seconds per token) of an engine where it was measured."""
    found = [(cell["depth"], cell["engines"].get(name, dict(refuses=""))) for cell in cells]
    return [(d, 1 / engine["decode_tokens_per_second"]) for d, engine in found if "refuses" not in engine]


if __name__ == "__main__":
    written = pathlib.Path(sys.argv[1])
    saved = json.loads(written.read_text())
    print_tables(saved)
    save_plot(saved, written.with_suffix(".png"))
