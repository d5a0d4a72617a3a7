"""Chooses the command, prints help, and turns every error into one sentence and exit code 2."""

import contextlib
import difflib
import importlib.metadata
import os
import platform
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
from absl import flags as absl_flags

import cpu_kernels
from mla_jax.cli import argv as argv_lib
from mla_jax.cli import autotune, commands, file_commands, lora, measure_flags, measures, serve_flags
from mla_jax.cli import flags as flags_lib


class _Command(NamedTuple):
    """What a command does: `run` takes its flags and returns its exit code, None for 0."""

    run: Callable[[absl_flags.FlagValues], int | None]
    text: str
    positionals: tuple[str, ...] = ()  # flags that may be given without their names
    sources: tuple[str, ...] = ()  # flags of which one must be given: the usage has them, and no rows of help


def _serve(values):
    from mla_jax.cli import serve  # the web server takes a while to import: not for other commands

    return serve.serve(values)


def _finetune(values):
    from mla_jax.cli import finetune  # orbax takes half a second to import

    return finetune.finetune(values)


_SERVERS = ("serve", "llama-server")
_COMMANDS = {
    "generate": _Command(commands.generate, "continue a prompt", sources=("prompt", "file")),
    "chat": _Command(commands.chat, "talk to a model, turn by turn"),
    "serve": _Command(_serve, "serve a model over HTTP, as OpenAI and llama-server do"),
    "llama-server": _Command(_serve, "the same as serve"),
    "inspect": _Command(file_commands.inspect, "print what a GGUF file holds", ("model",)),
    "plan": _Command(
        file_commands.plan, "print the memory of a model and its cache in every type", ("model",)
    ),
    "check": _Command(
        file_commands.check, "read a whole GGUF file and say what is wrong with it", ("model",)
    ),
    "quantize": _Command(
        file_commands.quantize, "write a GGUF file with its weights in another type", ("input", "out", "type")
    ),
    "convert": _Command(
        file_commands.convert,
        "turn a Hugging Face or orbax folder into a GGUF file, or back",
        ("input", "out"),
    ),
    "split": _Command(file_commands.split, "write a GGUF file as several", ("input", "prefix")),
    "export-lora": _Command(lora.export_lora, "write a GGUF file with adapters merged into its weights"),
    "merge": _Command(file_commands.merge, "write a split GGUF file as one", ("first", "out")),
    "diff": _Command(file_commands.diff, "print how far two GGUF files are apart", ("first", "second")),
    "perplexity": _Command(
        measures.measure_perplexity,
        "measure how well a model foresees a text, or its distance to a base",
        ("model",),
    ),
    "sweep-bench": _Command(measures.sweep_bench, "measure speeds as the context fills", ("model",)),
    "bench": _Command(measures.bench, "measure the speed of prompts and of drawing", ("model",)),
    "ser-sweep": _Command(measures.ser_sweep, "measure what dropping experts costs and saves", ("model",)),
    "autotune": _Command(
        autotune.autotune, "measure tile sizes of the GPU kernels at the shapes of a model", ("model",)
    ),
    "finetune": _Command(
        _finetune, "train adapters of a model whose weights stay as the file has them", ("model",)
    ),
    "train": _Command(commands.train, "train the packaged model on Python's own sources"),
}

_LONGEST_CHOICES = 24  # characters; a longer list is told in the text of its flag
_VALUE_NAMES = {"int": "N", "float": "X", "string": "TEXT", "multi string": "TEXT"}
_FAILED = 1
_INTERRUPTED, _TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


_AGAIN_SECONDS = 0.05


class _Terminated(BaseException):
    """The process was asked to end: files that are not whole yet are to be removed on the way out."""


def main(args: Sequence[str] | None = None) -> int:
    """Runs `mla-jax ARGS` and returns its exit code: 0, 2 for bad input, 130 or 143 when interrupted."""
    args = list(sys.argv[1:] if args is None else args)
    try:
        with _raising_on_sigterm():
            return _run(args)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"mla-jax: {_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return _INTERRUPTED
    except _Terminated:
        return _TERMINATED


def run() -> int:
    """Is `main` for a process of its own; when interrupted it ends here and now.

    Threads of XLA may still compute what was begun, and would crash while the interpreter is taken down. One
    of many processes ends so as well, since JAX would wait for the others.
    """
    try:
        code = main()
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        code = _FAILED
    if code in (_INTERRUPTED, _TERMINATED) or jax.distributed.is_initialized():
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    return code


@contextlib.contextmanager
def _raising_on_sigterm() -> Iterator[None]:
    """Makes SIGTERM unwind the stack; it would end the process at once otherwise."""
    if threading.current_thread() is not threading.main_thread():
        yield  # other threads must not set handlers
        return

    def stop(number, frame):
        raise _Terminated

    def once_more(unraisable):
        """Has an alarm raise it again where it came up in a callback that lets none out, as JAX has."""
        if unraisable.exc_type is _Terminated:
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
        else:
            hook(unraisable)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGALRM)}
    hook, sys.unraisablehook = sys.unraisablehook, once_more
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook


def _sentence(error):
    if isinstance(error, MemoryError | jax.errors.JaxRuntimeError):
        return "the model and its context must fit the memory of this machine; give a smaller --ctx-size."
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} cannot be used: {error.strerror}."
    return " ".join(str(error).split())


def _run(args):
    if not args or args[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    name = args[0]
    if name == "--version":
        print(_version())
        return 0
    if name not in _COMMANDS:
        nearest = difflib.get_close_matches(name, _COMMANDS, n=1)
        hint = f" Did you mean {nearest[0]}?" if nearest else ""
        raise argv_lib.UsageError(f"the command must be one of {', '.join(_COMMANDS)}, got {name!r}.{hint}")
    command, values = _COMMANDS[name], _flags(name)
    about = _flags_of(name)
    argv_lib.parse(
        args[1:],
        values,
        aliases=about.ALIASES,
        refused=about.REFUSED,
        positionals=command.positionals,
    )
    if values.help:
        print(_help(name, values))
        return 0
    for place in command.positionals:
        if values[place].value is None:
            raise argv_lib.UsageError(f"{place.upper()} must be given: {_usage(name, values)}.")
    return command.run(values) or 0


def _flags_of(name):
    """Returns the module that has the spellings of a command's flags."""
    if name in _SERVERS:
        return serve_flags
    return measure_flags if name in measure_flags.COMMANDS else flags_lib


def _flags(name):
    about = _flags_of(name)
    return about.command_flags() if about is serve_flags else about.command_flags(name)


def _version():
    """Returns what runs: the package, JAX with its device, and whether there are CPU kernels."""
    device = jax.devices()[0]
    kernels = f"no CPU kernels: {cpu_kernels.unavailable_because()}"
    if cpu_kernels.available():
        kernels = f"CPU kernels for {', '.join(cpu_kernels.instruction_sets())}"
    lines = [f"mla-jax {importlib.metadata.version('mla-jax')}", f"python {platform.python_version()}"]
    return "\n".join([*lines, f"jax {jax.__version__} on {device.platform} ({device.device_kind})", kernels])


def _overview():
    lines = ["usage: mla-jax COMMAND [FLAGS]", ""]
    lines += [f"  {name:<12} {command.text}" for name, command in _COMMANDS.items()]
    lines += [
        "",
        "`mla-jax COMMAND --help` lists the flags of a command, `mla-jax --version` says what runs.",
        "",
    ]
    return "\n".join([*lines, "example: mla-jax generate -p 'def read_lines(path):' -n 64"])


def _help(name, values: absl_flags.FlagValues):
    short = _short(name)
    told = ("help", *_COMMANDS[name].sources)
    rows = [_help_row(values[flag], short.get(flag)) for flag in values if flag not in told]
    width = max(len(spelling) for spelling, _ in rows)
    lines = [f"usage: {_usage(name, values)}: {_COMMANDS[name].text}", ""]
    return "\n".join(lines + [f"  {spelling:<{width}}  {text}" for spelling, text in rows])


def _short(name):
    return {flag: alias for alias, flag in _flags_of(name).ALIASES.items() if len(alias) < 4}


def _usage(name, values):
    places = [
        p.upper() if values[p].default is None else f"[{p.upper()}]" for p in _COMMANDS[name].positionals
    ]
    sources = " | ".join(f"-{_short(name)[flag]} {flag.upper()}" for flag in _COMMANDS[name].sources)
    return " ".join(["mla-jax", name, *places, *([f"({sources})"] if sources else []), "[FLAGS]"])


def _help_row(flag, short):
    """Returns the spelling of a flag with its values, and what it does with its default."""
    spelling = argv_lib.spelled(flag.name)
    if flag.boolean:
        spelling = f"--[no-]{spelling[2:]}" if flag.default is not False else spelling
    else:
        choices = "|".join(getattr(flag.parser, "enum_values", None) or [_VALUE_NAMES[flag.flag_type()]])
        spelling += f" {choices if len(choices) < _LONGEST_CHOICES else 'NAME'}"
    is_told = flag.default in (None, []) or flag.boolean or flag.name == "model"
    text = flag.help.split(">: ")[-1].partition(";\n")[0]  # absl puts choices first, and repetition last
    letters = f"-{short}," if short else ""
    return f"{letters:<6}{spelling}", text if is_told else f"{text} [{flag.default}]"
