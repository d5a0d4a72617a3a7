"""Smart Expert Reduction as its users write it: (Kmin, t), for all layers or layer by layer."""

import functools
import json
import math
import os
from collections.abc import Mapping, Sequence

import numpy as np

from mla_jax.config import ModelConfig
from mla_jax.nn.moe import ExpertReduction

Setting = tuple[int, float]  # experts kept whatever they score, and the share of the best score for others

OFF: Setting = (1, 0.0)


def parse(text: str) -> Setting:
    """Reads "Kmin,t", as in `-ser 6,1`.

    Raises:
      ValueError: if it is anything else than a whole number from 1 on and a finite number from 0 on.
    """
    try:
        minimum, threshold = text.split(",")
        return _checked((int(minimum), float(threshold)))
    except ValueError:
        raise ValueError(
            f"-ser must be Kmin,t with whole Kmin from 1 and finite t from 0 on, got {text!r}."
        ) from None


def read_layers(path: str | os.PathLike) -> dict[int, Setting]:
    """Reads a JSON file of settings by layer, such as {"3": [4, 0.2], "4": [5, 0.4]}.

    Raises:
      ValueError: if it is anything else.
      OSError: if it cannot be read.
    """
    with open(path, encoding="utf-8") as file:
        try:
            table = json.load(file)
            if not isinstance(table, dict):
                raise ValueError
            return {int(layer): _checked(tuple(setting)) for layer, setting in table.items()}
        except (ValueError, TypeError, RecursionError):
            raise ValueError(
                f'{path} must be a JSON object of settings by layer, such as {{"3": [4, 0.2]}}, with a whole '
                "Kmin from 1 and a finite t from 0 on."
            ) from None


def per_layer(
    config: ModelConfig, setting: Setting | None, layers: Mapping[int, Setting] | None = None
) -> tuple[Setting, ...]:
    """Returns the setting of every layer, `OFF` wherever it would change nothing.

    Args:
      config: the model.
      setting: of all layers that `layers` does not name; None for off.
      layers: settings by layer.

    Raises:
      ValueError: for a setting out of range or a layer that there is not.
    """
    layers = layers or {}
    for layer in layers:
        if not 0 <= layer < config.num_layers:
            raise ValueError(
                f"layers of the expert reduction must be in [0, {config.num_layers}), got {layer}."
            )
    chosen = [layers.get(i, setting) for i in range(config.num_layers)]
    return tuple(_effective(config, i, _checked(pair)) if pair else OFF for i, pair in enumerate(chosen))


@functools.lru_cache(maxsize=64)  # it is asked for at every token
def arrays(*rows: tuple[Setting, ...]) -> ExpertReduction:
    """Returns settings by layer of some sequences, [L, B] whatever they are: one compilation serves all.

    They are in NumPy arrays, which nothing is compiled for.
    """
    pairs = np.asarray(rows, np.float64).transpose(2, 1, 0)
    minimum, threshold = pairs[0].astype(np.int32), pairs[1].astype(np.float32)
    minimum.flags.writeable = threshold.flags.writeable = False
    return ExpertReduction(minimum=minimum, threshold=threshold)


def experts_per_token(config: ModelConfig, settings: Sequence[Setting]) -> tuple[float, float] | None:
    """Returns the fewest and the most experts that settings by layer give a token, None if there are none.

    They are means over the layers that have experts; ties of scores are left aside. Where the two differ,
    the scores decide: `steps.route` tells how.
    """
    routed = [setting for layer, setting in enumerate(settings) if not config.is_dense(layer)]
    if not routed:
        return None
    most = config.moe.num_experts_per_token
    of = lambda minimum, threshold: (minimum, minimum if threshold == 1 else most)
    bounds = [(most, most) if setting == OFF else of(*setting) for setting in routed]
    fewest, upper = zip(*bounds, strict=True)
    return sum(fewest) / len(bounds), sum(upper) / len(bounds)


def describe(settings: Sequence[Setting]) -> str:
    """Returns settings by layer as text that is equal if and only if they are."""
    texts = ["off" if setting == OFF else f"{setting[0]},{setting[1]:.9g}" for setting in settings]
    return "off" if set(texts) == {"off"} else " ".join(texts)


def _checked(setting):
    minimum, threshold = setting
    if type(minimum) is not int or minimum < 1:
        raise ValueError(f"Kmin of the expert reduction must be a whole number from 1 on, got {minimum!r}.")
    if isinstance(threshold, bool) or not 0 <= threshold < math.inf:
        raise ValueError(f"t of the expert reduction must be finite and at least 0, got {threshold!r}.")
    return minimum, float(threshold)


def _effective(config, layer, setting):
    minimum, threshold = setting
    if config.is_dense(layer) or threshold == 0 or minimum >= config.moe.num_experts_per_token:
        return OFF
    return setting
