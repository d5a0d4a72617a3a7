"""Plots of measures: matplotlib figures, which notebooks show. matplotlib is in the extra `notebooks`."""

from collections.abc import Mapping, Sequence

import numpy as np

from mla_jax.divergence import Divergence
from mla_jax.perplexity import Perplexity
from mla_jax.speed import SweepRow


def of_perplexity(found: Perplexity):
    """Returns a figure of the perplexity of each window, and of all windows so far."""
    figure, [axes] = _figure(1, width=8)
    numbers = np.arange(1, len(found.nats) + 1)
    value, error = found.estimate
    axes.plot(numbers, found.by_window, ".", alpha=0.5, label="of the window")
    axes.plot(numbers, found.running, label="of all windows so far")
    axes.axhspan(value - error, value + error, alpha=0.15, label=f"{value:.3f} ± {error:.3f}")
    axes.set(xlabel=f"window of {found.window} tokens", ylabel="perplexity", yscale="log")
    axes.legend()
    return figure


def of_divergence(found: Divergence):
    """Returns a figure of how many tokens diverge by how much, and of the probabilities that changed."""
    figure, (left, right) = _figure(2, width=11)
    values = np.sort(found.kl.ravel().astype(np.float64))
    above = 1 - np.arange(values.size) / values.size
    is_seen = values > 0  # on an axis of logarithms
    value, error = found.mean_kl
    left.plot(values[is_seen], above[is_seen])
    if value > 0:
        left.axvline(value, linestyle="--", color="grey", label=f"mean {value:.3g} ± {error:.1g}")
        left.set(xscale="log")
        left.legend()
    left.set(xlabel="KL to the base (nats)", ylabel="share of tokens with more", yscale="log")
    right.hist(100 * found.delta_p.ravel(), bins=81)
    root, share = found.rms_delta_p, found.top1
    right.set(
        xlabel="change of the next token's probability (points)",
        ylabel="tokens",
        yscale="log",
        title=f"RMS {100 * root.value:.3f} points; same likeliest token {share.value:.2%}",
    )
    return figure


def of_sweeps(runs: Mapping[str, Sequence[SweepRow]]):
    """Returns a figure of the speed of prompts and of drawing over depth, a line for each of some runs."""
    figure, panels = _figure(2, width=11)
    for axes, (field, title) in zip(
        panels, [("prompt_speed", "prompts"), ("predict_speed", "drawn tokens")], strict=True
    ):
        for name, rows in runs.items():
            axes.plot([row.depth for row in rows], [getattr(row, field) for row in rows], "o-", label=name)
        axes.set(xlabel="tokens in the cache", ylabel="tokens/s", title=title)
        axes.set_ylim(bottom=0)
    panels[0].legend()
    return figure


def _figure(num_panels, width):
    from matplotlib.figure import Figure  # an extra, and slow to import

    figure = Figure(figsize=(width, 4.5), layout="constrained")
    panels = figure.subplots(1, num_panels, squeeze=False)[0]
    for axes in panels:
        axes.grid(alpha=0.3)
    return figure, panels
