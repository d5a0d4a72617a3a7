"""A command in many processes: process 0 does what the command says, the others follow it."""

import contextlib
import hashlib
import importlib.metadata
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import flags as absl_flags

import checkpoints_tools
import cpu_kernels
from mla_jax import steps
from mla_jax.cli import flags as flags_lib
from mla_jax.cli import host_flags, loading, placement_flags
from mla_jax.cli.argv import UsageError, spelled
from mla_jax.serve.hosts import gathering
from mla_jax.serve.hosts.calls import Follower, Leader
from mla_jax.serve.hosts.gathering import Place

LOST, _REFUSED = 1, 2  # exit codes
_LAST_SECONDS = 10.0  # for a server to say that it cannot go on
_END_SECONDS = 5.0  # for a step that waits for processes which have ended
_LONGER = 60  # seconds that JAX may take beyond `--join-seconds`, when it would write a report of its own
_OWN = ("model", "threads", "lora", "lora_scaled", "smart_expert_reduction", "ser_layers")
_ALONE = {
    "expert_stats": "counts experts in one process alone",
    "prompt_cache": "knows a model by weights, of which each process has a part",
    "slot_save_path": "knows a model by weights, of which each process has a part",
} | {name: "places a model within one process" for name in placement_flags.NAMES if name != "n_gpu_layers"}
_KEY_VARIABLE = "MLA_JOIN_KEY"
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
_GOODBYE = "process 0 has ended the run; goodbye"
_HEAD_BYTES = 1 << 24  # of a file, with the header of most
_SAMPLES, _SAMPLE_BYTES = 256, 1 << 16


def is_follower(values: absl_flags.FlagValues) -> bool:
    """Whether another process leads, so that this one needs nothing but the model.

    Raises:
      UsageError: for flags that do not say a place among processes.
    """
    place = _place(values)
    return place is not None and place.process_id > 0


@contextlib.contextmanager
def leading(values: absl_flags.FlagValues, command: str) -> Iterator[Any]:
    """Gathers the other processes, and has them end when the block does.

    Args:
      values: flags of the command.
      command: its name.

    Yields:
      what has the functions of `mla_jax.steps`: a `Leader`, or the module itself if this process is alone.

    Raises:
      UsageError: for flags that do not go with others.
      ValueError: for a model that cannot be read, or processes that do not come together.
    """
    place = _place(values)
    if place is None:
        yield steps
        return
    _refuse(values)
    about = _about(values, command, place)
    if place.num_processes > 1 and not values.mesh:
        loading.tell("without --mesh every process computes the whole model")
    _keep_stdout()
    with _in_time(values.join_seconds, place):
        loading.tell(f"{place.name()} waits for the others at {place.address}")
        gathered = gathering.gather(place, about, values.join_seconds, key=_key())
        leader = Leader(place, gathered.lines, lambda sentence: _leave(sentence, LOST))
        _join_jax(place, gathered, values)
    try:
        yield leader
    except Exception as error:
        leader.end(f"{place.name()} failed: {error}")
        raise
    finally:
        leader.end()


def watch(programs: Any, lose: Callable[[str], None]) -> None:
    """Has a server end by `lose` when a process is lost, and this process at the latest some seconds after.

    Args:
      programs: what `leading` gave.
      lose: called with a sentence, in any thread.
    """
    if not isinstance(programs, Leader):
        return

    def lost(sentence):
        loading.tell(f"mla-jax: {sentence}")
        last = threading.Timer(_LAST_SECONDS, os._exit, (LOST,))
        last.daemon = True
        last.start()
        lose(sentence)

    programs.watch(lost)


def follow(values: absl_flags.FlagValues, command: str) -> None:
    """Loads the model and does what process 0 says, until that ends.

    Args:
      values: flags of the command.
      command: its name.

    Raises:
      ValueError: for a model that cannot be read, or processes that do not come together.
    """
    place = _place(values)
    _refuse(values)
    about = _about(values, command, place)
    with _in_time(values.join_seconds, place):
        gathered = gathering.come(place, about, values.join_seconds, key=_key())
        _keep_stdout()
        follower = Follower(place, *gathered.lines, _leave_leader)
        _join_jax(place, gathered, values)
    loading.tell(f"{place.name()} follows {place.address}")
    try:
        model = loading.load(values)
    except Exception as error:
        follower.tell(error)
        raise
    follower.follow(model.params, model.config, model.run)
    loading.tell(_GOODBYE)


def _join_jax(place, gathered, values):
    if any(name.lower() in _PROXIES for name in os.environ):
        direct = os.environ.get("no_grpc_proxy") or os.environ.get(
            "no_proxy"
        )  # gRPC reads the first there is
        os.environ["no_grpc_proxy"] = ",".join(
            filter(None, [direct, "127.0.0.1"])
        )  # where its connections begin
    jax.config.update("jax_check_proxy_envs", False)  # which would warn of what was just seen to
    gathering.join_jax(place, gathered.coordinator, values.join_seconds + _LONGER)


def _key():
    return os.fsencode(os.environ.get(_KEY_VARIABLE, ""))


def _place(values):
    given = [name for name in host_flags.NAMES if values[name].value is not None]
    if not given:
        if values["join_seconds"].present:
            raise UsageError("--join-seconds must come with --coordinator.")
        return None
    if len(given) < len(host_flags.NAMES):
        missing = next(name for name in host_flags.NAMES if name not in given)
        raise UsageError(f"{spelled(given[0])} must come with {spelled(missing)}.")
    host, separator, port = values.coordinator.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    is_host = bool(separator and host) and not set(host) & set(" /@[]")
    if not is_host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UsageError(f"--coordinator must be HOST:PORT, got {values.coordinator[:80]!r}.")
    if values.process_id >= values.num_processes:
        raise UsageError(
            f"--process-id must be in [0, {values.num_processes}) with --num-processes "
            f"{values.num_processes}, got {values.process_id}."
        )
    return Place(host=host, port=int(port), num_processes=values.num_processes, process_id=values.process_id)


def _refuse(values):
    for name, why in _ALONE.items():
        if name in values and values[name].present:
            raise UsageError(f"{spelled(name)} {why}, so it must not come with --coordinator.")


def _about(values, command, place) -> dict[str, str]:
    """Returns what must be the same in all processes, by its name in a sentence."""
    shared = absl_flags.FlagValues()
    flags_lib.define_run(shared)
    names = [name for name in shared if name not in _OWN] + ["parallel"] * (command == "serve")
    found = {
        "--num-processes": place.num_processes,
        "the command": command,
        "the version of mla-jax": importlib.metadata.version("mla-jax"),
        "the version of JAX": jax.__version__,
        **{spelled(name): values[name].value for name in names},
        "what computes": _computes(values),
        "the model": _digest(sorted({info.path for info in _tensors(values.model)})),
        "the adapters": ", ".join(f"{_digest_of(path)} times {s:g}" for path, s in loading.adapters(values)),
    }
    return {name: str(value) for name, value in found.items()}


def _computes(values):
    """Returns the device that the flags ask for: JAX must not be asked before it has joined the others."""
    if values.n_gpu_layers:
        return "a GPU"
    best = cpu_kernels.instruction_sets()[:1]
    return f"the CPU by kernels for {best[0]}" if best else "the CPU without kernels"


def _tensors(path):
    return checkpoints_tools.open_gguf(path).tensors.values()


def _digest_of(path):
    path = pathlib.Path(path)
    return _digest(sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path])


def _digest(paths):
    """Returns a digest of the heads of files, and of samples of what comes after."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(str(size).encode())
            digest.update(file.read(_HEAD_BYTES))
            num_samples = max(_SAMPLES // len(paths), 1) if size > _HEAD_BYTES else 0
            for sample in range(num_samples):
                file.seek(size * sample // num_samples)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _keep_stdout():
    """Keeps stdout for results: libraries of collectives write there that they are connected."""
    sys.stdout.flush()
    kept = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    same = dict(encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    sys.stdout = os.fdopen(kept, "w", buffering=1 if sys.stdout.line_buffering else -1, **same)


@contextlib.contextmanager
def _in_time(seconds, place):
    """Ends the process if the block takes longer, also where it waits in JAX."""
    sentence = f"{place.name()} must join the others within {seconds} seconds, but has not."
    timer = threading.Timer(seconds + _END_SECONDS, _leave, (sentence, _REFUSED))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _leave(sentence, code):
    """Ends the process here and now: other threads may wait for ever."""
    loading.tell(f"mla-jax: {sentence}")
    os._exit(code)


def _leave_leader(sentence):
    if sentence is not None:
        _leave(sentence, LOST)
    time.sleep(_END_SECONDS)  # the main thread is quicker, unless it waits in a step
    loading.tell(_GOODBYE)
    os._exit(0)
