"""Named values inside the network, to be recorded or edited where they arise; nothing at all otherwise.

`tap` stands at every place. It edits, then records by flax's `sow` into the collection `taps`, where
`collected` finds the values by name. Without taps in the `RunConfig` it is the identity at trace time, so
that the lowered code is what it would be without it.
"""

import dataclasses
import fnmatch
import itertools
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax

from mla_jax.config import ModelConfig, RunConfig, Taps

COLLECTION = "taps"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where there is a value.

    Attributes:
      axes: one letter each, as in `mla_jax.nn`; the first two are B and T.
      meaning: what the value is.
      where: "layers", "expert layers", or "model" for a value of which there is one.
      is_read_only: nothing is computed from it, so an edit would have no effect and is refused.
    """

    axes: str
    meaning: str
    where: str = "layers"
    is_read_only: bool = False


PLACES = {
    "resid": Place(
        axes="BTD",
        meaning="input of the layer: resid.0 is the embedding, the one past the last layer what it gives",
    ),
    "q": Place(axes="BTNH", meaning="query per head, the part without position"),
    "q_rope": Place(axes="BTNP", meaning="query per head, the rotary part, rotated by position"),
    "latent": Place(axes="BTR", meaning="normalised latent of keys and values, as it is cached"),
    "k_rope": Place(axes="BTP", meaning="rotary part of the keys, rotated by position, as it is cached"),
    "attn_lse": Place(
        axes="BTN",
        meaning="log of the sum of exponentials of a query's scaled scores",
        is_read_only=True,
    ),
    "attn_heads": Place(axes="BTNV", meaning="what each head gives, before the output projection"),
    "attn_out": Place(axes="BTD", meaning="what attention adds to the residual"),
    "router": Place(
        axes="BTE", meaning="logits of the router, before softmax or sigmoid", where="expert layers"
    ),
    "expert_ids": Place(
        axes="BTK", meaning="experts used, int32, best first; E for one left out", where="expert layers"
    ),
    "expert_weights": Place(
        axes="BTK", meaning="what each expert's result is multiplied by", where="expert layers"
    ),
    "ffn_out": Place(axes="BTD", meaning="what the FFN, or the experts, add to the residual"),
    "logits": Place(axes="BTW", meaning="logits of the next token", where="model"),
}


def names(config: ModelConfig) -> list[str]:
    """Returns the names of all values that a model of `config` has, such as "latent.3"."""
    found = []
    for name, place in PLACES.items():
        count = config.num_layers + (name == "resid")
        first = config.num_dense_layers if place.where == "expert layers" else 0
        found += [name] if place.where == "model" else [f"{name}.{i}" for i in range(first, count)]
    return found


def tapped(
    run: RunConfig, record: Sequence[str] = (), edits: Mapping[str, Callable] | None = None
) -> RunConfig:
    """Returns `run` with values to record and edits besides those that it has, see `Taps`.

    Raises:
      ValueError: for a record that is a name alone, whose letters would be taken for names.
    """
    if isinstance(record, str):
        raise ValueError(f"record must be a tuple or list of names, got {record!r}.")
    taps = run.taps or Taps()
    taps = Taps(record=(*taps.record, *record), edits=(*taps.edits, *(edits or {}).items()))
    return dataclasses.replace(run, taps=None if taps == Taps() else taps)


def check(config: ModelConfig, taps: Taps | None) -> None:
    """Checks that the model has a value for every name or pattern.

    Raises:
      ValueError: for a name that this model has not, or an edit of what is only recorded.
    """
    if taps is None:
        return
    known = names(config)
    for pattern in (*taps.record, *(pattern for pattern, _ in taps.edits)):
        if not fnmatch.filter(known, pattern):
            raise ValueError(
                f"a tap must be one of {_ranges(known)}, or a pattern such as 'resid.*', got {pattern!r}."
            )
    for name in known:
        if taps.edits_of(name) and PLACES[_base(name)].is_read_only:
            raise ValueError(f"edits must be of values that something is computed from, got {name}.")


def check_edits_alone(taps: Taps | None) -> None:
    """Checks taps of who takes the logits apart and returns no values by name.

    Raises:
      ValueError: if they record something or edit the logits.
    """
    if taps is not None and (taps.record or taps.edits_of("logits")):
        raise ValueError(
            "taps of what is measured must edit what lies before the logits, and record nothing."
        )


def tap(module: nn.Module, name: str, value: jax.Array, positions: jax.Array) -> jax.Array:
    """Returns the value as the edits make it, and records that.

    Args:
      module: where the value is; its `run` has the taps, its path the layer.
      name: key of `PLACES`; of values of the whole model with their layer.
      value: [B, T, ...], or [B * T, ...], which edits and records see as the former.
      positions: i32[B, T].

    Raises:
      ValueError: if an edit gives a value of another shape or dtype.
    """
    if module.run.taps is None:
        return value
    name = _full(module, name)
    rank = len(PLACES[_base(name)].axes) - positions.ndim
    tapped = value.reshape(*positions.shape, *value.shape[value.ndim - rank :])
    for edit in module.run.taps.edits_of(name):
        edited = edit(tapped, positions)
        wanted, got = map(_kind, (tapped, edited))
        if wanted != got:
            raise ValueError(f"the edit of {name} must return {wanted}, got {got}.")
        tapped = edited
    if module.run.taps.records(name):
        module.sow(COLLECTION, name, tapped, init_fn=lambda: None, reduce_fn=lambda _, new: new)
    return tapped.reshape(value.shape)


def is_tapped(module: nn.Module, *names: str) -> bool:
    """Whether one of these values is wanted, so that it must arise where `tap` can see it."""
    taps = module.run.taps
    full = [_full(module, name) for name in names]
    return taps is not None and any(taps.records(name) or taps.edits_of(name) for name in full)


def collected(variables, config: ModelConfig) -> dict[str, jax.Array]:
    """Returns recorded values by name, in the order of `names`, out of the variables that `apply` gives."""
    leaves = jax.tree_util.tree_leaves_with_path(variables.get(COLLECTION, {}))
    return in_order({path[-1].key: leaf for path, leaf in leaves}, config)


def in_order(seen: Mapping[str, jax.Array], config: ModelConfig) -> dict[str, jax.Array]:
    """Returns values in the order of `names`, which what comes out of jit has lost."""
    return {name: seen[name] for name in names(config) if name in seen}


def _full(module, name):
    return ".".join([name, *(part.removeprefix("layers_") for part in module.path[:1])])


def _kind(value):
    return f"{value.dtype}{list(value.shape)}" if hasattr(value, "shape") else type(value).__name__


def _base(name):
    return name.split(".")[0]


def _ranges(known):
    """Returns names as text, from the first layer to the last of each."""
    ends = [(group[0], group[-1]) for _, names in itertools.groupby(known, _base) for group in [list(names)]]
    return ", ".join(first if first == last else f"{first} to {last}" for first, last in ends)
