"""Every call of a step, told to all processes and done by all of them with the same arguments.

The leader, process 0, has the functions of `mla_jax.steps`, and who calls them need not know that others do
the same. Weights and rows stay where they are; numbers of the host alone go over the lines, and results stay
with the leader. What fails in one process fails the run: the others would wait for it in a collective.
"""

import dataclasses
import functools
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from mla_jax import steps
from mla_jax.cache import Cache
from mla_jax.config import ModelConfig, RunConfig
from mla_jax.logits import Constraints
from mla_jax.nn.moe import ExpertReduction
from mla_jax.sampler import SamplingState
from mla_jax.serve.hosts import line as line_lib
from mla_jax.serve.hosts.gathering import Place
from mla_jax.serve.hosts.line import Line
from mla_jax.serve.request import Lost

_PARAMS, _CACHE, _ARRAY, _LAYERS = "params", "cache", "array", "layers"
_ARGUMENTS: dict[str, tuple[str | type, ...]] = {
    "prefill": (_PARAMS, _ARRAY, _ARRAY, _CACHE, _ARRAY, ExpertReduction),
    "decode": (_PARAMS, _ARRAY, _ARRAY, _CACHE, SamplingState, _ARRAY, _ARRAY, _ARRAY, ExpertReduction),
    "draw": (_PARAMS, _ARRAY, _ARRAY, _CACHE, SamplingState, Constraints, _ARRAY, ExpertReduction),
    "copy_pages": (_CACHE, _ARRAY, _ARRAY),
    "take_pages": (_CACHE, _ARRAY),
    "put_pages": (_CACHE, _ARRAY, _LAYERS),
}
_READ_AT_ONCE = ("decode", "draw", "take_pages")  # what they failed of is better told here than there
_VERDICT_SECONDS = 3.0  # until it is known who is gone, once a step has failed for it
_NOTICE_SECONDS = 1.0  # for the others to be told


class Leader:
    """Process 0, in the place of `mla_jax.steps`.

    Attributes:
      lost: the sentence about what ended the run, None while it goes on.
    """

    def __init__(self, place: Place, lines: Sequence[Line], lost: Callable[[str], None], *, programs=steps):
        """Begins to listen to the others. What a step fails of for their sake is a `request.Lost`.

        Args:
          place: of this process.
          lines: to all others.
          lost: called once, in any thread, with a sentence about a process that is gone or has failed; the
            others know by then. `watch` replaces it.
          programs: what does the steps here.
        """
        self.lost: str | None = None
        self._place, self._lines, self._tell, self._programs = place, lines, lost, programs
        self._calling, self._losing = threading.Lock(), threading.Lock()
        self._verdict, self._has_ended = threading.Event(), False
        self._ready = {line.process_id: threading.Event() for line in lines}
        for name in _ARGUMENTS:
            setattr(self, name, functools.partial(self._call, name))
        for line in lines:
            hear, lose = functools.partial(self._hear, line), functools.partial(self._lose_line, line)
            line.start(hear, lose)

    def watch(self, lost: Callable[[str], None]) -> None:
        """Has another function called when a process is lost; at once if one is."""
        with self._losing:
            self._tell = lost
        if self.lost is not None:
            lost(self.lost)

    def init_pool(self, config: ModelConfig, run: RunConfig, **sizes: int) -> Cache:
        """Does what `steps.init_pool` does, in all processes."""
        told = {"call": "init_pool", "sizes": sizes}
        return self._tell_and_do(told, lambda: self._programs.init_pool(config, run, **sizes))

    def end(self, failure: str | None = None) -> None:
        """Has the others end: as they should, or for a failure of this process."""
        with self._losing:
            if self._has_ended or self.lost is not None:
                return
            self._has_ended = True
        self._spread({"end": True} if failure is None else {"lost": failure})

    def _call(self, name, *args, **static):
        kinds = _ARGUMENTS[name]
        packed = [_packed(kind, value) for kind, value in zip(kinds, args, strict=True)]
        told = {"call": name, "arguments": packed, "settings": sorted(static)}
        return self._tell_and_do(told, lambda: getattr(self._programs, name)(*args, **static))

    def _tell_and_do(self, told, do):
        with self._calling:
            for ready in self._ready.values():
                ready.wait()
            self._raise_if_lost()
            try:
                payload = line_lib.pack(told)
                for line in self._lines:
                    line.send_packed(payload)
                result = do()
                return jax.block_until_ready(result) if told["call"] in _READ_AT_ONCE else result
            except Exception as error:
                self._verdict.wait(_VERDICT_SECONDS)
                self._raise_if_lost()
                self._lose(f"{self._place.name()} failed: {_described(error)}.")
                raise

    def _raise_if_lost(self):
        if self.lost is not None:
            self._verdict.wait(_VERDICT_SECONDS)  # until whoever watches knows
            raise Lost(self.lost)

    def _hear(self, line, message):
        if "ready" in message:
            self._ready[line.process_id].set()
        elif "failed" in message:
            self._lose(line_lib.printable(message["failed"]))

    def _lose_line(self, line, how):
        self._lose(f"{self._place.name(line.process_id)} was lost: {how}.")

    def _lose(self, sentence):
        with self._losing:
            if self._has_ended or self.lost is not None:
                return
            self.lost = sentence
        try:
            self._spread({"lost": sentence})
            self._tell(sentence)
        finally:
            self._verdict.set()
            for ready in self._ready.values():
                ready.set()

    def _spread(self, message):
        """Tells all others as far as they can be told: a process that stands still reads nothing."""
        threads = [threading.Thread(target=_try, args=(line, message), daemon=True) for line in self._lines]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_NOTICE_SECONDS)


class Follower:
    """Any other process: has weights and rows of its own, and does what the leader says."""

    def __init__(self, place: Place, line: Line, left: Callable[[str | None], None], *, programs=steps):
        """Begins to listen to the leader.

        Args:
          place: of this process.
          line: to the leader.
          left: called once, in any thread: with a sentence about what was lost, or with None when the run has
            ended and this process may still wait for others in a step.
          programs: what does the steps here.
        """
        self._place, self._line, self._left, self._programs = place, line, left, programs
        self._messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._ending, self._verdict = threading.Lock(), threading.Event()
        self._has_ended, self._layers = False, None
        line.start(self._hear, lambda how: self._end(f"{place.name(0)} was lost: {how}."))

    def follow(self, params, config: ModelConfig, run: RunConfig) -> None:
        """Does every call until the run has ended.

        Args:
          params: nested dict of weights, as `programs` read them.
          config: the model.
          run: how it is run.

        Raises:
          Exception: what a call failed of; the leader knows by then.
        """
        _try(self._line, {"ready": True})
        while (message := self._messages.get()) is not None and not self._verdict.is_set():
            try:
                self._do(message, params, dict(config=config, run=run))
            except Exception as error:
                if self._verdict.wait(_VERDICT_SECONDS) and self._has_ended:
                    return
                self._end(self.tell(error))
                raise

    def tell(self, error: BaseException) -> str:
        """Tells the leader what this process cannot go on for, and returns the sentence."""
        sentence = f"{self._place.name()} failed: {_described(error)}."
        _try(self._line, {"failed": sentence})
        return sentence

    def _do(self, message, params, static):
        name = message["call"]
        if name == "init_pool":
            self._layers = None  # before there are others
            self._layers = self._programs.init_pool(*static.values(), **message["sizes"]).layers
            return
        arguments = zip(_ARGUMENTS[name], message["arguments"], strict=True)
        values = [_unpacked(kind, value, params, self._layers) for kind, value in arguments]
        settings = {key: static[key] for key in message["settings"]}
        result = getattr(self._programs, name)(*values, **settings)
        for part in jax.tree.leaves(jax.block_until_ready(result), is_leaf=_is_cache):
            if _is_cache(part):
                self._layers = part.layers

    def _hear(self, message):
        if "call" in message:
            self._messages.put(message)
        else:
            lost = message.get("lost")
            self._end(None if lost is None else line_lib.printable(lost))

    def _end(self, sentence):
        with self._ending:
            if self._verdict.is_set():
                return
            self._has_ended = sentence is None
            self._verdict.set()
        try:
            if sentence is not None:
                self._left(sentence)
        finally:
            self._messages.put(None)
        if sentence is None:
            self._left(None)


def _is_cache(part):
    return isinstance(part, Cache)


def _packed(kind, value):
    """Returns an argument as it is sent."""
    if value is None or kind == _PARAMS:
        return None
    if kind == _CACHE:
        return np.asarray(value.length)
    if kind == _ARRAY:
        return np.asarray(value)
    if kind == _LAYERS:
        return [np.ascontiguousarray(leaf).view(np.uint8) for leaf in jax.tree.leaves(value)]
    names = [field.name for field in dataclasses.fields(kind)]
    return {name: _packed(_ARRAY, getattr(value, name)) for name in names}


def _unpacked(kind, value, params, layers):
    if kind == _PARAMS:
        return params
    if kind == _CACHE:
        return Cache(layers=layers, length=value)
    if kind == _LAYERS:
        leaves, structure = jax.tree.flatten(layers)
        return structure.unflatten(new.view(leaf.dtype) for new, leaf in zip(value, leaves, strict=True))
    return value if value is None or kind == _ARRAY else kind(**value)


def _try(line, message):
    try:
        line.send(message)
    except OSError:
        return  # it is gone as well


def _described(error):
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}"
