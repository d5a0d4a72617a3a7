"""What Smart Expert Reduction costs and saves: perplexity, kept experts and speed over a grid of settings."""

import dataclasses
import functools
import math
import pathlib
import statistics
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mla_jax import expert_reduction as reduction_lib
from mla_jax import perplexity, result_files, taps
from mla_jax.generate import Model

_SHARES = (0.2, 0.4, 0.6, 0.8)  # thresholds of the adaptive settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured with one setting.

    Attributes:
      minimum: Kmin.
      threshold: t; 0 is plain routing.
      perplexity: of the next token.
      kept: experts per token and layer.
      speed: tokens/s of decoding, the median of the rounds.
    """

    minimum: int
    threshold: float
    perplexity: float
    kept: float
    speed: float


def grid(num_used: int) -> list[reduction_lib.Setting]:
    """Returns settings to try for K = `num_used`: off, each fixed count, and adaptive ones."""
    fixed = [(count, 1.0) for count in range(num_used - 1, 0, -1)]
    floors = sorted({1, math.ceil(num_used / 2), max(1, num_used - 1)}, reverse=True)
    return [reduction_lib.OFF, *fixed, *((floor, share) for floor in floors for share in _SHARES)]


def sweep(
    model: Model,
    tokens: Sequence[int],
    settings: Iterable[reduction_lib.Setting],
    *,
    window: int = 512,
    decoded: int = 32,
    rounds: int = 3,
    report: Callable[[str], None] = print,
) -> list[Row]:
    """Measures each setting.

    Args:
      model: with experts.
      tokens: a text; its windows are predicted each on its own, and decoding goes on from its beginning.
      settings: (Kmin, t) pairs.
      window: tokens of context at most.
      decoded: tokens to draw per round.
      rounds: each times every setting once, so that what the machine does meanwhile strikes all alike.
      report: called with lines of progress.

    Raises:
      ValueError: for a model without experts or a text shorter than a window.
    """
    if model.config.moe is None:
        raise ValueError("a sweep of expert reduction must be given a model with experts, got one without.")
    count = (len(tokens) - 1) // window
    if not count:
        raise ValueError(f"the text must have more than {window} tokens, got {len(tokens)}.")
    windows = np.asarray([tokens[i * window : (i + 1) * window + 1] for i in range(count)], np.int32)
    settings, measured = list(settings), []
    for done, setting in enumerate(settings, start=1):
        arrays = reduction_lib.arrays(reduction_lib.per_layer(model.config, setting))
        sums = [
            _predict(model.params, row[None], arrays, config=model.config, run=model.run) for row in windows
        ]
        nats, kept = np.mean(np.asarray(sums), axis=0)
        measured.append((math.exp(nats), float(kept)))
        report(f"quality: {done} of {len(settings)} settings")
    speeds = [[] for _ in settings]
    prompt = list(tokens[: min(64, model.ctx_size - decoded)])
    for done in range(rounds + 1):
        for setting, found in zip(settings, speeds, strict=True):
            model.generate(prompt, max_tokens=decoded, temperature=0.0, expert_reduction=setting)
            found.append(model.timings.decoded_tokens / max(model.timings.decode_seconds, 1e-9))
        report(f"speed: round {done} of {rounds}")
    medians = [statistics.median(found[1:]) for found in speeds]  # the first one warms up
    return [
        Row(minimum=minimum, threshold=threshold, perplexity=perplexity, kept=kept, speed=speed)
        for (minimum, threshold), (perplexity, kept), speed in zip(settings, measured, medians, strict=True)
    ]


def table(rows: Iterable[Row]) -> str:
    """Returns the rows as lines of text."""
    lines = [f"{'Kmin,t':>8} {'perplexity':>11} {'kept':>6} {'tokens/s':>9}"]
    for row in rows:
        name = "off" if row.threshold == 0 else f"{row.minimum},{row.threshold:g}"
        lines.append(f"{name:>8} {row.perplexity:11.4f} {row.kept:6.2f} {row.speed:9.1f}")
    return "\n".join(lines)


def write(rows: Sequence[Row], folder: pathlib.Path, about: dict) -> None:
    """Writes `ser-sweep.json` and a plot of it, `ser-sweep.png`, into a folder that exists."""
    record = about | dict(rows=[dataclasses.asdict(row) for row in rows])
    files = {
        "ser-sweep.json": result_files.json_bytes(record),
        "ser-sweep.png": result_files.png_bytes(_plot(rows)),
    }
    result_files.write(folder, files)


def _plot(rows):
    from matplotlib.figure import Figure  # an extra, and slow to import

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    groups = {
        "off": [row for row in rows if row.threshold == 0],
        "fixed count (t = 1)": [row for row in rows if row.threshold == 1],
        "adaptive (Kmin,t)": [row for row in rows if 0 < row.threshold < 1],
    }
    for axes, (field, label) in zip(panels, [("kept", "experts kept"), ("speed", "tokens/s")], strict=True):
        for (name, chosen), marker in zip(groups.items(), "*os", strict=True):
            xs, ys = [getattr(row, field) for row in chosen], [row.perplexity for row in chosen]
            axes.scatter(xs, ys, marker=marker, label=name)
            for row, x in zip(chosen, xs, strict=True):
                text = f"{row.minimum},{row.threshold:g}" if row.threshold else ""
                axes.annotate(
                    text, (x, row.perplexity), textcoords="offset points", xytext=(4, 3), fontsize=7
                )
        axes.set(xlabel=label, yscale="log")
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="perplexity")
    panels[0].legend()
    return figure


@functools.partial(jax.jit, static_argnames=("config", "run"))
def _predict(params, tokens, reduction, *, config, run):
    """Returns the mean cross-entropy in nats of a window i32[1, T + 1], and experts kept per token."""
    settings = dict(config=config, run=run, record=("expert_ids.*",), reduction=reduction)
    logits, _, seen = taps.run(params, tokens[:, :-1], **settings)
    nats = perplexity.cross_entropy(logits, tokens[:, 1:]).mean()
    kept = jnp.mean(jnp.stack([(ids < config.moe.num_experts).sum(-1).mean() for ids in seen.values()]))
    return jnp.stack([nats, kept])
