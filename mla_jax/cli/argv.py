"""Reads command lines in the reference's spelling: one dash or two, hyphens or underscores, `-fa` alone."""

import difflib
import re
from collections.abc import Mapping, Sequence

from absl import flags

from mla_jax.cli import placement_flags


class UsageError(ValueError):
    """A command line that cannot be run; the message is one sentence for its writer."""


def spelled(name: str) -> str:
    """Returns how users write the flag `name`: `--ctx-size` of "ctx_size"."""
    return f"--{name.replace('_', '-')}"


PAIRS = ("lora_scaled",)  # flags that take two values
OPTIONAL_VALUES = {"flash_attn": "on|off|auto", "fit": placement_flags.FIT}  # they may stand alone, for "on"


def parse(
    args: Sequence[str],
    values: flags.FlagValues,
    *,
    aliases: Mapping[str, str],
    refused: Mapping[str, str],
    positionals: Sequence[str] = (),
) -> None:
    """Parses `args` into `values`.

    Args:
      args: what follows the command's name.
      values: the flags that the command takes.
      aliases: other spelling -> name of the flag, without dashes and with underscores.
      refused: "flag" or "flag=value" of the reference that does nothing here yet -> why.
      positionals: the flags that arguments belong to that are none themselves, in this order.

    Raises:
      UsageError: for an argument too many, an unknown or refused flag, or a value that a flag cannot take.
    """
    rest, places = list(args), list(positionals)
    while rest:
        if places and not rest[0].startswith("-"):
            place = places.pop(0)
            _set(place.upper(), values[place], rest.pop(0))
            continue
        written, has_value, value = rest.pop(0).partition("=")
        if not written.startswith("-") or written.strip("-") == "":
            hint = _nearest(written, values, aliases) or " A value with spaces in it needs quotes."
            raise UsageError(
                f"every argument must belong to a flag, got {written + has_value + value!r}.{hint}"
            )
        name = written.lstrip("-").replace("-", "_")
        name = aliases.get(name, name)
        _refuse(written, name, refused)
        if name not in values:
            _switch_off(written, name, bool(has_value), values, aliases)
            continue
        if not has_value:
            value = _value(written, name, values, rest)
        if name in PAIRS:
            value = [value, _value(written, name, values, rest)]
        _refuse(f"{written} {value}", f"{name}={value}", refused)
        _set(written, values[name], value)
    values.mark_as_parsed()


def _refuse(written, key, refused):
    if key in refused:
        raise UsageError(f"{written} cannot be used: {refused[key]}")


def _switch_off(written, name, has_value, values, aliases):
    """Takes `--no-flag` of a boolean flag; whatever else comes here is no flag."""
    positive = name[2:].lstrip("_")
    positive = aliases.get(positive, positive)
    if not name.startswith("no") or positive not in values or not values[positive].boolean:
        raise UsageError(f"there is no flag {written}.{_nearest(written, values, aliases)}")
    if has_value:
        raise UsageError(f"{written} takes no value.")
    _set(written, values[positive], "false")


def _value(written, name, values, rest):
    if values[name].boolean:
        return "true"
    if name in OPTIONAL_VALUES:
        return rest.pop(0) if rest and re.fullmatch(OPTIONAL_VALUES[name], rest[0]) else "on"
    if not rest:
        count = "two values" if name in PAIRS else "a value"
        raise UsageError(f"{written} must be followed by {count}.")
    return rest.pop(0)


def _set(written, flag, value):
    try:
        flag.parse(value)
    except flags.IllegalFlagValueError:
        raise UsageError(f"{written} must be {_wanted(flag)}, got {value!r}.") from None


def _wanted(flag):
    choices = getattr(flag.parser, "enum_values", None)
    if choices:
        return f"one of {', '.join(choices)}"
    text = flag.parser.syntactic_help or "a boolean: true or false"
    return text if text.startswith("a") else f"an {text}"  # absl says "integer >= -1"


def _nearest(written, values, aliases):
    names = [*values, *(alias for alias, name in aliases.items() if name in values)]
    known = [name.replace("_", "-") for name in names if len(name) > 1]
    found = difflib.get_close_matches(written.lstrip("-").replace("_", "-"), known, n=1)
    return f" Did you mean --{found[0]}?" if found else ""
