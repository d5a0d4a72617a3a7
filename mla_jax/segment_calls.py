"""Cuts a network into segments, each of which runs on one device, and runs one of them."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax

from mla_jax.config import ModelConfig, RunConfig
from mla_jax.nn.moe import ExpertReduction
from mla_jax.nn.taps import tap
from mla_jax.nn.transformer import Transformer, places
from mla_jax.placement import CPU, Placement


class Part(NamedTuple):
    """A part of the network: a key of `_KINDS` and its layer, 0 for what is there once."""

    kind: str
    layer: int = 0


class Value(NamedTuple):
    """What one part gives and others read, of a layer; 0 for what is there once."""

    name: str
    layer: int = 0


class _Kind(NamedTuple):
    reads: tuple[str, ...]
    gives: tuple[str, ...]
    weights: tuple[str, ...]  # of a layer, or of the model


_KINDS = {
    "embed": _Kind(("tokens",), ("x",), ("embed",)),
    "attend": _Kind(("x",), ("x", "normed"), ("attn_norm", "attn", "ffn_norm")),
    "route": _Kind(("normed",), ("ids", "weights"), ("ffn/router",)),
    "shared": _Kind(("normed",), ("shared",), ("ffn/shared",)),
    "experts": _Kind(("normed", "ids", "weights"), ("ffn",), ("ffn/experts",)),
    "ffn": _Kind(("normed",), ("ffn",), ("ffn",)),
    "add": _Kind(("x", "ffn"), ("x",), ()),
    "add_shared": _Kind(("x", "ffn", "shared"), ("x",), ()),
    "output": _Kind(("x",), ("logits",), ("output_norm", "output")),
}
_ONCE = ("embed", "output", "tokens", "x", "logits")  # kinds and values that are of no layer
_ALONE = ("shared", "experts", "ffn")  # kinds that read neither positions nor rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """What runs in a row on one device.

    Attributes:
      place: of the `Placement`.
      parts: in order.
      reads: values that come in.
      drops: those of them that nothing reads any more.
      keeps: values that are read later.
    """

    place: str
    parts: tuple[Part, ...]
    reads: tuple[Value, ...]
    drops: tuple[Value, ...]
    keeps: tuple[Value, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose rows it appends to."""
        return tuple(part.layer for part in self.parts if part.kind == "attend")

    @property
    def reads_inputs(self) -> bool:
        """Whether it reads `Inputs`."""
        return any(part.kind not in _ALONE for part in self.parts)

    def offset(self, config: ModelConfig) -> int:
        """Returns by how much its layers may be moved down, so that segments that are alike become one."""
        layers = {part.layer for part in self.parts if part.kind not in _ONCE}
        kinds = {config.is_dense(layer) for layer in layers}
        if len(kinds) != 1:
            return 0
        return min(layers) - (0 if kinds.pop() else config.num_dense_layers)

    def moved(self, offset: int) -> "Segment":
        """Returns the segment with its layers moved down."""
        move = lambda item: item if item[0] in _ONCE else item._replace(layer=item.layer - offset)
        values = self.parts, self.reads, self.drops, self.keeps
        parts, reads, drops, keeps = (tuple(map(move, items)) for items in values)
        return Segment(place=self.place, parts=parts, reads=reads, drops=drops, keeps=keeps)

    def weights(self, params, offset: int) -> dict:
        """Returns the weights that it reads, in the tree that it reads them from once it is moved."""
        found: dict = {}
        for kind, layer in self.parts:
            for path in _KINDS[kind].weights:
                above = () if kind in _ONCE else ("layers_",)
                *parents, last = (*above, *path.split("/"))
                source, target = params, found
                for name in parents:
                    source = source[f"{name}{layer}" if name == "layers_" else name]
                    target = target.setdefault(f"{name}{layer - offset}" if name == "layers_" else name, {})
                target[last] = source[last]
        return found


def cut(config: ModelConfig, placement: Placement, last: str = "output") -> tuple[Segment, ...]:
    """Returns the segments of a model in the order in which they are called.

    Args:
      config: the model.
      placement: where its units lie.
      last: the kind of the last part: "output"; "attend" of the last layer, after which no rows are written;
        or "route", and then all choices of experts are kept.
    """
    groups: list[tuple[str, list[Part]]] = []
    for place, parts in _pieces(config, placement):
        is_alone = parts[0].kind == "shared" or (groups and groups[-1][1][-1].kind == "shared")
        if groups and groups[-1][0] == place and not is_alone:
            groups[-1][1].extend(parts)
        else:
            groups.append((place, parts))
    end = Part(last, 0 if last in _ONCE else config.num_layers - 1)
    index = next(i for i, (_, parts) in enumerate(groups) if end in parts)
    place, parts = groups[index]
    groups[index:] = [(place, parts[: parts.index(end) + 1])]
    return _with_values(groups, wanted=_KINDS[last].gives if last != "attend" else ())


def _pieces(config: ModelConfig, placement: Placement) -> Iterator[tuple[str, list[Part]]]:
    """Yields what is always computed in a row, and where."""
    where = placement.of_unit
    yield where["embed"], [Part("embed")]
    for i in range(config.num_layers):
        place = where[f"attn.{i}"]
        if config.is_dense(i):
            yield place, [Part("attend", i)]
            yield where[f"ffn.{i}"], [Part("ffn", i)]
            yield place, [Part("add", i)]
            continue
        has_shared, elsewhere = config.moe.num_shared_experts > 0, where[f"experts.{i}"]
        add = [Part("add_shared" if has_shared else "add", i)]
        shared = [Part("shared", i)] if has_shared else []
        yield place, [Part("attend", i), Part("route", i)]
        if elsewhere == place:
            yield place, [Part("experts", i), *shared, *add]
            continue
        # Calls on the CPU may return only when they are done, so what a GPU does meanwhile goes first.
        both = [(place, shared), (elsewhere, [Part("experts", i)])]
        yield from ((at, parts) for at, parts in (both[::-1] if place == CPU else both) if parts)
        yield place, add
    yield where["output"], [Part("output")]


def _with_values(groups, wanted):
    """Returns the segments of parts, and what each is to read and to keep."""
    of = lambda names, layer: [_of_layer(name, layer) for name in names]
    needed = {value for _, parts in groups for kind, layer in parts for value in of(wanted, layer)}
    found = []
    for place, parts in reversed(groups):
        given: set[Value] = set()
        reads: dict[Value, None] = {}
        for kind, layer in parts:
            reads |= dict.fromkeys(value for value in of(_KINDS[kind].reads, layer) if value not in given)
            given |= set(of(_KINDS[kind].gives, layer))
        keeps, left = tuple(sorted(needed & given)), needed - given
        drops = tuple(value for value in reads if value not in left)
        needed = left | set(reads)
        found.append(Segment(place=place, parts=tuple(parts), reads=tuple(reads), drops=drops, keeps=keeps))
    return tuple(reversed(found))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is said of the tokens of a step, on each device.

    Attributes:
      length: i32[B] tokens before.
      num_tokens: i32[B] tokens that count.
      pages: i32[B, M], or None.
      reduction: of all layers, or None.
    """

    length: jax.Array
    num_tokens: jax.Array
    pages: jax.Array | None
    reduction: ExpertReduction | None


@functools.partial(jax.jit, static_argnames=("parts", "keeps", "config", "run"), donate_argnames="rows")
def call(
    weights,
    values: dict[Value, jax.Array],
    rows: tuple,
    inputs: Inputs | None,
    offset: jax.Array | None,
    *,
    parts: tuple[Part, ...],
    keeps: tuple[Value, ...],
    config: ModelConfig,
    run: RunConfig,
):
    """Runs a segment.

    Args:
      weights: of the segment.
      values: what it reads.
      rows: of its layers, in order.
      inputs: None if it reads none.
      offset: i32[] by how much its layers were moved down; None without `inputs`.
      parts: of the segment, moved.
      keeps: the same.
      config: the model.
      run: how it is run.

    Returns:
      The values it keeps, in order, and its rows with the new tokens in them.
    """
    network = _Parts(config, run)
    return network.apply({"params": weights}, values, rows, inputs, offset, parts, keeps, method="through")


class _Parts(Transformer):
    """A transformer that is run part by part."""

    def through(self, values, rows, inputs, offset, parts, keeps):
        """Runs some parts, see `call`."""
        values, rest, appended = dict(values), list(rows), []
        size = next(value.shape[1] for key, value in values.items() if key.name in ("tokens", "x", "normed"))
        positions = is_padding = None
        if inputs is not None:
            positions, is_padding = places(inputs.length, inputs.num_tokens, size)
        for kind, i in parts:
            reads, gives, _ = _KINDS[kind]
            taken = [values[_of_layer(name, i)] for name in reads]
            if kind == "attend":
                before = rest.pop(0).at(inputs.pages)
                slots = self.slots(before, is_padding, positions)
                x = tap(self, f"resid.{i}", *taken, positions)
                *given, after = self.layers[i].attend(x, before, positions, slots)
                appended.append(after.at(None))
            elif kind == "route":
                reduction = None if inputs.reduction is None else inputs.reduction.of_layer(i + offset)
                given = self.layers[i].ffn.route(*taken, positions, reduction)
            else:
                given = [self._one(kind, i, taken, positions)]
            values |= {_of_layer(name, i): value for name, value in zip(gives, given, strict=True)}
        return [values[key] for key in keeps], tuple(appended)

    def _one(self, kind, i, taken, positions):
        """Returns the value of a part that gives one, of what it reads."""
        if kind == "embed":
            return self.embed(*taken)
        if kind == "output":
            x = tap(self, f"resid.{self.config.num_layers}", *taken, positions)
            return tap(self, "logits", self.unembed(x), positions)
        if kind in ("add", "add_shared"):
            x, *ffn = taken
            return self.layers[i].add(x, sum(ffn[1:], ffn[0]), positions)
        normed, *choice = taken
        if kind == "ffn":
            return self.layers[i].ffn(normed)
        product = getattr(self.layers[i].ffn, kind)  # experts or shared
        return product(normed.reshape(-1, normed.shape[-1]), *choice).reshape(normed.shape)


def _of_layer(name, layer):
    return Value(name, 0 if name in _ONCE else layer)
