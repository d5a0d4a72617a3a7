"""Chooses the command, prints help, and turns every error into one sentence and exit code 2."""

import difflib
import os
import sys
from collections.abc import Callable, Sequence

import jax
from absl import flags as absl_flags

from mla_jax.cli import argv as argv_lib
from mla_jax.cli import commands
from mla_jax.cli import flags as flags_lib

_COMMANDS: dict[str, tuple[Callable, str]] = {
    "generate": (commands.generate, "continue a prompt"),
    "chat": (commands.chat, "talk to a model, turn by turn"),
    "inspect": (commands.inspect, "print what a GGUF file holds"),
    "plan": (commands.plan, "print the memory of a model and its cache in every type"),
    "ser-sweep": (commands.ser_sweep, "measure what dropping experts costs and saves"),
    "train": (commands.train, "train the packaged model on Python's own sources"),
}


_TAKE_A_FILE = ("inspect", "plan", "ser-sweep")  # may be given the model without --model
_LONGEST_CHOICES = 24  # characters; a longer list is told in the text of its flag
_VALUE_NAMES = {"int": "N", "float": "X", "string": "TEXT"}


def main(args: Sequence[str] | None = None) -> int:
    """Runs `mla-jax ARGS` and returns its exit code: 0, 2 for bad input, 130 when interrupted."""
    args = list(sys.argv[1:] if args is None else args)
    try:
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
        return 130


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
    if name not in _COMMANDS:
        nearest = difflib.get_close_matches(name, _COMMANDS, n=1)
        hint = f" Did you mean {nearest[0]}?" if nearest else ""
        raise argv_lib.UsageError(f"the command must be one of {', '.join(_COMMANDS)}, got {name!r}.{hint}")
    values = flags_lib.command_flags(name)
    positional = "model" if name in _TAKE_A_FILE else None
    argv_lib.parse(
        args[1:], values, aliases=flags_lib.ALIASES, refused=flags_lib.REFUSED, positional=positional
    )
    if values.help:
        print(_help(name, values))
        return 0
    _COMMANDS[name][0](values)
    return 0


def _overview():
    lines = ["usage: mla-jax COMMAND [FLAGS]", ""]
    lines += [f"  {name:<10} {text}" for name, (_, text) in _COMMANDS.items()]
    lines += ["", "`mla-jax COMMAND --help` lists the flags of a command.", ""]
    return "\n".join([*lines, "example: mla-jax generate -p 'def read_lines(path):' -n 64"])


def _help(name, values: absl_flags.FlagValues):
    short = {flag: alias for alias, flag in flags_lib.ALIASES.items() if len(alias) < 4}
    rows = [_help_row(values[flag], short.get(flag)) for flag in values]
    width = max(len(spelling) for spelling, _ in rows)
    lines = [f"usage: mla-jax {name} [FLAGS]: {_COMMANDS[name][1]}", ""]
    return "\n".join(lines + [f"  {spelling:<{width}}  {text}" for spelling, text in rows])


def _help_row(flag, short):
    """Returns the spelling of a flag with its values, and what it does with its default."""
    spelling = f"--{flag.name.replace('_', '-')}"
    if flag.boolean:
        spelling = f"--[no-]{spelling[2:]}" if flag.default else spelling
    else:
        choices = "|".join(getattr(flag.parser, "enum_values", None) or [_VALUE_NAMES[flag.flag_type()]])
        spelling += f" {choices if len(choices) < _LONGEST_CHOICES else 'NAME'}"
    is_told = flag.default is None or flag.boolean or flag.name == "model"
    text = flag.help.split(">: ")[-1]  # absl puts the choices first
    letters = f"-{short}," if short else ""
    return f"{letters:<6}{spelling}", text if is_told else f"{text} [{flag.default}]"
