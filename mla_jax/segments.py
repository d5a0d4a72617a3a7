"""The steps of a model that lies on more than one device: what runs in a row on one of them is a segment.

A `Segments` has the functions of `mla_jax.steps`, and who calls them need not know which it is. A segment is
one compiled call on its device, where its weights and rows stay. Hidden states [B, T, D] and the choice of
experts [B * T, K] go from one to the next, nothing else. Calls return before they are done: where the routed
experts of a layer lie elsewhere, the shared one is a segment of its own, and runs beside them. Segments that
are alike share their compiled code.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_tools import names
from mla_jax import cache as cache_lib
from mla_jax import placement as placement_lib
from mla_jax import sampler, segment_calls, steps
from mla_jax.cache import Cache
from mla_jax.config import ModelConfig, RunConfig
from mla_jax.nn.transformer import lay_out
from mla_jax.placement import CPU, Placement
from mla_jax.segment_calls import Inputs, Segment, Value


def devices_at_hand() -> dict[str, jax.Device]:
    """Returns the devices of this machine by place: "cpu", and "gpu:0" and so on for those JAX can use."""
    found = {CPU: jax.devices("cpu")[0]}
    if jax.default_backend() == "gpu":
        found |= {placement_lib.gpu(i): device for i, device in enumerate(jax.local_devices())}
    return found


class Segments:
    """What `mla_jax.steps` is to a model on one device; arguments and results are as there.

    Attributes:
      placement: where the model lies.
    """

    def __init__(self, placement: Placement, devices: Mapping[str, jax.Device] | None = None):
        """Takes the devices of places, by default those of this machine.

        Raises:
          ValueError: for a place that there is not.
        """
        devices = devices_at_hand() if devices is None else devices
        for place in placement.places:
            if place not in devices:
                raise ValueError(f"a place must be one of {', '.join(devices)}, got {place}.")
        self.placement = placement
        self._devices = {place: devices[place] for place in placement.places}
        self._bound: tuple[Any, dict] = (None, {})
        self._newest: dict[tuple[str, str], tuple[Any, Any]] = {}

    @property
    def uses_cpu(self) -> bool:
        """Whether some of the model lies on the CPU."""
        return CPU in self.placement.places

    def is_on_host(self, name: str) -> bool:
        """Whether the tensor of a GGUF name lies on the CPU."""
        return self.placement.of_tensor(name) == CPU

    def put(self, name: str, weight, run: RunConfig):
        """Returns the tensor of a GGUF name on its device; on a GPU as its kernels read it."""
        place = self.placement.of_tensor(name)
        weight = jax.device_put(weight, self._devices[place])
        if place == CPU:
            return weight
        return names.flatten(lay_out(names.unflatten({name: weight}), run))[name]

    def put_all(self, params, run: RunConfig) -> dict:
        """Returns the weights of a model, each as of `put`; what lies there already is not copied."""
        placed = {name: self.put(name, weight, run) for name, weight in names.flatten(params).items()}
        return names.unflatten(placed)

    def prefill(self, params, tokens, num_tokens, cache, pages=None, reduction=None, *, config, run) -> Cache:
        """Does what `steps.prefill` does."""
        return self._forward(params, tokens, num_tokens, cache, pages, reduction, config, run, "attend")[1]

    def route(self, params, tokens, num_tokens, cache, reduction=None, *, config, run):
        """Does what `steps.route` does."""
        values, cache = self._forward(
            params, tokens, num_tokens, cache, None, reduction, config, run, "route"
        )
        of = lambda kind: np.stack(
            [jax.device_get(value) for key, value in sorted(values.items()) if key.name == kind]
        )
        by_token = lambda part: part.reshape(part.shape[0], *tokens.shape, part.shape[-1])
        return cache, by_token(of("ids")), by_token(of("weights"))

    def decode(
        self,
        params,
        tokens,
        recent,
        cache,
        sampling,
        num_steps,
        eog_ids,
        pages=None,
        reduction=None,
        *,
        config: ModelConfig,
        run: RunConfig,
    ):
        """Does what `steps.decode` does; the loop is the host's."""
        place, (B,) = self.placement.of_unit["output"], tokens.shape
        drawing = _Drawing(
            tokens=tokens,
            recent=recent,
            drawn=np.full((B, steps.MAX_STEPS), -1, np.int32),
            has_ended=np.zeros((B,), bool),
            step=np.int32(0),
        )
        drawing, eog_ids = self._put((drawing, eog_ids), place)
        newest, taken = tokens[:, None], 0
        while taken < min(int(num_steps), steps.MAX_STEPS):
            logits, cache = self._logits(params, newest, cache, pages, reduction, config, run)
            args = logits, drawing, self._put(cache.length, place), self._kept("sampling", sampling, place)
            drawing, newest, is_over = _draw_next(*args, eog_ids)
            taken += 1
            if jax.device_get(is_over):
                break
        return drawing.drawn, drawing.step, drawing.recent, cache

    def draw(
        self,
        params,
        tokens,
        recent,
        cache,
        sampling,
        constraints,
        pages=None,
        reduction=None,
        *,
        config: ModelConfig,
        run: RunConfig,
    ):
        """Does what `steps.draw` does."""
        place = self.placement.of_unit["output"]
        logits, cache = self._logits(params, tokens[:, None], cache, pages, reduction, config, run)
        args = self._put((tokens, recent, cache.length, constraints), place)
        drawn, told = _draw_bound(logits, *args, self._kept("sampling", sampling, place))
        return drawn, told, cache

    def init_pool(self, config: ModelConfig, run: RunConfig, *, batch: int, **sizes: int) -> Cache:
        """Does what `steps.init_pool` does, and has the rows of a layer on the device of its attention."""
        one_layer = dataclasses.replace(
            config, num_layers=1, num_dense_layers=min(config.num_dense_layers, 1)
        )
        layers = []
        for place in self._row_places(config.num_layers):
            device = self._devices[place]
            with jax.default_device(device):
                pool = cache_lib.init_pool(one_layer, run, batch=batch, **sizes)
            layers.append(jax.device_put(pool.layers[0], device))
        return Cache(layers=tuple(layers), length=np.zeros((batch,), np.int32))

    def copy_pages(self, cache: Cache, sources, targets) -> Cache:
        """Does what `steps.copy_pages` does."""
        return self._on_each(
            cache, lambda part, *pages: steps.copy_pages(part, *pages).layers, sources, targets
        )

    def take_pages(self, cache: Cache, pages):
        """Does what `steps.take_pages` does."""
        return self._on_each(cache, steps.take_pages, pages).layers

    def put_pages(self, cache: Cache, pages, layers) -> Cache:
        """Does what `steps.put_pages` does."""
        put = lambda part, pages, layers: steps.put_pages(part, pages, layers).layers
        return self._on_each(cache, put, pages, layers=layers)

    def _on_each(self, cache, function, *pages, layers=None):
        """Applies a function of a cache and pages to the layers of each device apart."""
        found: dict[int, Any] = {}
        places = self._row_places(len(cache.layers))
        for place in dict.fromkeys(places):
            own = [i for i, other in enumerate(places) if other == place]
            part = Cache(layers=tuple(cache.layers[i] for i in own), length=cache.length)
            more = () if layers is None else (tuple(layers[i] for i in own),)
            found |= zip(own, function(*self._put((part, *pages, *more), place)), strict=True)
        return dataclasses.replace(cache, layers=tuple(found[i] for i in range(len(places))))

    def _row_places(self, num_layers):
        return [self.placement.of_unit[f"attn.{i}"] for i in range(num_layers)]

    def _logits(self, params, tokens, cache, pages, reduction, config, run):
        """Returns the logits f32[B, 1, W] after `tokens` i32[B, 1], and the cache with these."""
        count = np.ones(tokens.shape[:1], np.int32)
        values, cache = self._forward(params, tokens, count, cache, pages, reduction, config, run, "output")
        return values[Value("logits")], cache

    def _forward(self, params, tokens, num_tokens, cache, pages, reduction, config, run, last):
        """Runs the segments up to a last part; returns the values that are kept, and the cache."""
        length = np.asarray(jax.device_get(cache.length))
        layers, inputs = list(cache.layers), {}
        values = {Value("tokens"): (None, tokens)}
        for segment, moved, weights, offset in self._bound_to(params, config, run, last):
            place = segment.place
            if segment.reads_inputs and place not in inputs:
                inputs[place] = Inputs(
                    **self._put(dict(length=length, num_tokens=num_tokens, pages=pages), place),
                    reduction=self._kept("reduction", reduction, place),
                )
            got = {}
            for key, own in zip(segment.reads, moved.reads, strict=True):
                there, value = values[key]
                got[own] = value if there == place else self._put(value, place)
            kept, rows = segment_calls.call(
                weights,
                got,
                tuple(layers[i] for i in segment.layers),
                inputs[place] if segment.reads_inputs else None,
                offset,
                parts=moved.parts,
                keeps=moved.keeps,
                config=config,
                run=_of_place(run, place),
            )
            for key in segment.drops:
                del values[key]
            values |= {key: (place, value) for key, value in zip(segment.keeps, kept, strict=True)}
            for i, after in zip(segment.layers, rows, strict=True):
                layers[i] = after
        cache = Cache(layers=tuple(layers), length=length + np.asarray(jax.device_get(num_tokens)))
        return {key: value for key, (_, value) in values.items()}, cache

    def _bound_to(self, params, config, run, last):
        """Returns of each segment what is the same in every step: itself, as it is moved, weights, offset."""
        if self._bound[0] is not params:
            self._bound = params, {}
        found, key = self._bound[1], (config, run.taps is None, last)
        if key not in found:
            found[key] = [
                self._bind(segment, params, 0 if run.taps is not None else segment.offset(config))
                for segment in segment_calls.cut(config, self.placement, last)
            ]
        return found[key]

    def _bind(self, segment: Segment, params, offset):
        first = self._put(np.int32(offset), segment.place) if segment.reads_inputs else None
        return segment, segment.moved(offset), segment.weights(params, offset), first

    def _put(self, tree, place):
        return jax.device_put(tree, self._devices[place])

    def _kept(self, name, value, place):
        """Returns `value` on a device, where it stays for the next step if that has the very same one."""
        newest = self._newest.get((name, place))
        if newest is None or newest[0] is not value:
            newest = self._newest[name, place] = value, self._put(value, place)
        return newest[1]


@functools.lru_cache
def _of_place(run, place):
    return dataclasses.replace(run, gpu_kernels=False) if place == CPU else run


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Drawing:
    """What the loop of `decode` goes on from."""

    tokens: jax.Array
    recent: jax.Array
    drawn: jax.Array
    has_ended: jax.Array
    step: jax.Array


@jax.jit
def _draw_next(logits, drawing, length, sampling, eog_ids):
    """Returns what the loop goes on from, the tokens drawn i32[B, 1], and whether all texts have ended."""
    recent = jnp.concatenate([drawing.recent[:, 1:], drawing.tokens[:, None]], axis=1)
    tokens = steps.if_finite(sampler.sample(logits[:, 0], recent, length, sampling), logits[:, 0])
    drawing = _Drawing(
        tokens=tokens,
        recent=recent,
        drawn=jax.lax.dynamic_update_slice_in_dim(drawing.drawn, tokens[:, None], drawing.step, axis=1),
        has_ended=drawing.has_ended | jnp.any(tokens[:, None] == eog_ids[None], axis=1),
        step=drawing.step + 1,
    )
    return drawing, tokens[:, None], jnp.all(drawing.has_ended)


_draw_bound = jax.jit(steps.draw_bound)
