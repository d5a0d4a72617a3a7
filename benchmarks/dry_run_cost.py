"""What a step takes on a machine, by the bytes that are read and told: a model, not a measurement.

The time of a decode step on one device is the sum of
weights    bytes of its parts, of experts those that some token of the step takes, over its bandwidth; the
           device that has most of these is waited for
rows       bytes of cached latents of all its sequences, over its bandwidth; heads share them
exchanges  of `sharding_plan.collectives`: a latency each, and the bytes that pass over the link
The rates that machines reach are a share of what is on their data sheets: `ASSUMPTIONS`.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from checkpoints_tools.inspect import columns
from mla_jax import sharding, sharding_plan
from mla_jax.cache import bytes_per_token
from mla_jax.config import ModelConfig, RunConfig
from mla_jax.presets import active_parameter_count
from mla_jax.sharding import WeightInfo

BATCHES, DEPTH = (1, 8, 64), 8192
ASSUMPTIONS = {
    "reached": "0.8 of the memory's bandwidth, 0.7 of the link's, 0.4 of the peak of dense bfloat16 products",
    "experts": "tokens choose evenly and independently; all wait for the device with the most chosen experts",
    "exchanges": "a ring: 2 (n - 1) / n of the bytes for an all-reduce, (n - 1) / n for the others; float32",
    "latency": "of an exchange 12 us within a machine, 30 us between two, none on one device",
    "prefill": "2 products a parameter that a token takes, attention left aside",
    "depth": f"{DEPTH} cached tokens a sequence, rows of q8_0",
}
_REACHED, _LINK, _PEAK = 0.8, 0.7, 0.4
_DRAWS = 500
_FACTORS = {"all-reduce": 2.0, "all-gather": 1.0, "reduce-scatter": 1.0, "all-to-all": 1.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """Devices and what joins them, by their data sheets.

    Attributes:
      name: in results.
      axes: of the mesh.
      type: of the weights.
      memory: bytes of a device.
      reserve: bytes of it that steps and the system take.
      bandwidth: bytes a second of a device's memory.
      peak: bfloat16 operations a second of a device.
      link: bytes a second between devices, in each direction.
      latency: seconds of an exchange.
      has_gpus: whether the devices are GPUs.
    """

    name: str
    axes: dict[str, int]
    type: str
    memory: float
    reserve: float
    bandwidth: float
    peak: float
    link: float
    latency: float
    has_gpus: bool

    @property
    def num_devices(self) -> int:
        """Devices of the machine."""
        return math.prod(self.axes.values())


_H200 = dict(memory=141e9, reserve=10e9, bandwidth=4.8e12, peak=989e12, has_gpus=True)
_H100 = dict(memory=80e9, reserve=8e9, bandwidth=3.35e12, peak=989e12, has_gpus=True)
_HOST = dict(memory=768e9, reserve=16e9, bandwidth=460e9, peak=10e12, has_gpus=False)
MACHINES = (
    Machine(name="8 x H200", axes=dict(expert=8), type="q8_0", link=450e9, latency=12e-6, **_H200),
    Machine(name="2 x 8 x H100", axes=dict(expert=16), type="q8_0", link=50e9, latency=30e-6, **_H100),
    Machine(name="host of 768 GB, q8_0", axes=dict(model=1), type="q8_0", link=1.0, latency=0.0, **_HOST),
    Machine(name="host of 768 GB, q4_K", axes=dict(model=1), type="q4_K", link=1.0, latency=0.0, **_HOST),
)


def decode_seconds(
    machine: Machine, weights: Sequence[WeightInfo], config: ModelConfig, run: RunConfig, batch: int
) -> dict[str, float]:
    """Returns the seconds of each part of a decode step.

    Args:
      machine: where.
      weights: all of the model.
      config: the model.
      run: its shard and type of cache.
      batch: sequences, at `DEPTH` each.
    """
    shard = run.shard
    touched = share_of_experts(config, shard.data * shard.expert, batch)
    is_expert = lambda weight: "experts" in sharding.logical_axes(weight.path)
    of = lambda chosen: sharding_plan.weight_bytes(chosen, config, shard)
    read = of([it for it in weights if not is_expert(it) and not it.path.startswith("embed")])
    read += of([it for it in weights if is_expert(it)]) * touched
    local = -(-batch // shard.data)
    rows = local * DEPTH * bytes_per_token(config, run)
    rows /= shard.group_size if shard.splits_cache else 1
    rate = machine.bandwidth * _REACHED
    told = 0.0
    for exchange in sharding_plan.collectives(config, run):
        size = shard.data if exchange.axis == "data" else shard.group_size
        sent = _FACTORS[exchange.kind] * (size - 1) / size * 4 * exchange.numbers * local
        told += exchange.count * (machine.latency + sent / (machine.link * _LINK))
    return dict(weights=read / rate, rows=rows / rate, exchanges=told)


def share_of_experts(config: ModelConfig, num_parts: int, batch: int) -> float:
    """Returns which share of its experts the busiest of `num_parts` devices reads for `batch` tokens.

    It is the mean of 500 draws, the same ones each time.
    """
    if config.moe is None:
        return 0.0
    rng, moe, shares = np.random.default_rng(0), config.moe, []
    size = -(-moe.num_experts // num_parts)
    for _ in range(_DRAWS):
        order = rng.random((batch, moe.num_experts)).argsort(axis=1)
        chosen = np.unique(order[:, : moe.num_experts_per_token])
        shares.append(np.bincount(chosen // size).max() / size)
    return float(np.mean(shares))


def table(
    machine: Machine, weights: Sequence[WeightInfo], config: ModelConfig, run: RunConfig
) -> dict[str, float]:
    """Returns tokens a second by what is done, of all sequences together."""
    found = {}
    for batch in BATCHES:
        parts = decode_seconds(machine, weights, config, run, batch)
        found[f"decode, {batch} at a time"] = round(batch / sum(parts.values()), 1)
        found |= {f"ms of {name}, {batch} at a time": round(1e3 * s, 3) for name, s in parts.items()}
    products = 2 * active_parameter_count(config)
    found["prefill"] = round(machine.num_devices * machine.peak * _PEAK / products, 1)
    return found


def describe(rows: Sequence[dict]) -> str:
    """Returns the table of results, as text."""
    cells = [("machine", "weights", "GB a device", "of", "fits", *(f"tokens/s at {n}" for n in BATCHES))]
    for row in rows:
        held = f"{row['weights_gb'] + row['cache_gb']:.1f}"
        speeds = [f"{row['cost'][f'decode, {n} at a time']:,.1f}" for n in BATCHES]
        fits = "yes" if row["fits"] else "no"
        cells.append((row["machine"], row["weights"], held, f"{row['device_gb']:.0f}", fits, *speeds))
    return columns(cells)


def plot(rows: Sequence[dict], path: str) -> None:
    """Draws what a step is made of, a bar for each machine and batch."""
    from matplotlib.figure import Figure  # an extra of tests and notebooks

    figure = Figure(figsize=(3 * len(rows), 3.2), layout="constrained")
    for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        bottom = [0.0] * len(BATCHES)
        for name in ("weights", "rows", "exchanges"):
            heights = [row["cost"][f"ms of {name}, {batch} at a time"] for batch in BATCHES]
            axes.bar(range(len(BATCHES)), heights, bottom=bottom, label=name)
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        axes.set_ylim(0, 1.05 * max(bottom))
        axes.set_title(row["machine"], fontsize=10)
        axes.set_xticks(range(len(BATCHES)), map(str, BATCHES))
        axes.set_xlabel("sequences")
    figure.axes[0].set_ylabel("ms of a decode step, by the model")
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)
