"""What fields of a request may be: a table from names to kinds, read by one function.

A field that is null is as if it were not there. A field that no table knows is ignored, since clients send
what their newest version has, but not if its name is nearly one of ours: `temprature` would be lost silently.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from mla_jax.serve.http.api_error import ApiError, invalid

MAX_FIELDS = 256
_ALIKE = 0.85  # of names, as difflib measures; "temprature" and "temperature" have 0.95
INT64_UPPER = 2**63 - 1


class Kind(Protocol):
    """What the value of a field may be."""

    def read(self, value: Any, name: str) -> Any:
        """Returns `value` of the field called `name` as the program takes it. Raises ApiError."""


@dataclasses.dataclass(frozen=True)
class Integer:
    """A whole number in [lower, upper]; neither a boolean nor 1.0."""

    lower: int
    upper: int

    def read(self, value: Any, name: str) -> int:
        """Returns the number."""
        if type(value) is not int or not self.lower <= value <= self.upper:
            raise invalid(name, f"a whole number in [{self.lower}, {self.upper}]", value)
        return value


@dataclasses.dataclass(frozen=True)
class Number:
    """A number in [lower, upper], either end left out if told so."""

    lower: float
    upper: float
    above_lower: bool = False
    below_upper: bool = False

    def read(self, value: Any, name: str) -> float:
        """Returns the number as a float."""
        is_low = type(value) in (int, float) and (
            value < self.lower or (self.above_lower and value == self.lower)
        )
        is_high = type(value) in (int, float) and (
            value > self.upper or (self.below_upper and value == self.upper)
        )
        if type(value) not in (int, float) or is_low or is_high:
            opens, closes = "[("[self.above_lower], "])"[self.below_upper]
            raise invalid(name, f"a number in {opens}{self.lower:g}, {self.upper:g}{closes}", value)
        return float(value)


@dataclasses.dataclass(frozen=True)
class Boolean:
    """True or false."""

    def read(self, value: Any, name: str) -> bool:
        """Returns the boolean."""
        if not isinstance(value, bool):
            raise invalid(name, "true or false", value)
        return value


@dataclasses.dataclass(frozen=True)
class Text:
    """A string of at least `min_chars` and at most `max_chars` characters, None for any number."""

    max_chars: int | None = None
    min_chars: int = 0

    def read(self, value: Any, name: str) -> str:
        """Returns the string."""
        if not isinstance(value, str):
            raise invalid(name, "a string", value)
        if len(value) < self.min_chars:
            raise invalid(name, f"a string of at least {self.min_chars} characters", value)
        if self.max_chars is not None and len(value) > self.max_chars:
            raise invalid(name, f"a string of at most {self.max_chars} characters", value)
        return value


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of some values, each a string, a number or a boolean."""

    values: tuple[Any, ...]

    def read(self, value: Any, name: str) -> Any:
        """Returns the value."""
        if not any(type(value) is type(choice) and value == choice for choice in self.values):
            raise invalid(name, f"one of {', '.join(map(repr, self.values))}", value)
        return value


@dataclasses.dataclass(frozen=True)
class ListOf:
    """A list of `min_count` to `max_count` values of one kind."""

    kind: Kind
    max_count: int
    min_count: int = 0

    def read(self, value: Any, name: str) -> tuple[Any, ...]:
        """Returns the values."""
        if not isinstance(value, list) or not self.min_count <= len(value) <= self.max_count:
            raise invalid(name, f"a list of {self.min_count} to {self.max_count} values", value)
        try:
            return tuple([self.kind.read(entry, name) for entry in value])
        except ApiError:  # now the name of each is worth its time
            for index, entry in enumerate(value):
                self.kind.read(entry, f"{name}[{index}]")
            raise


@dataclasses.dataclass(frozen=True)
class Object:
    """Any JSON object, taken as it is."""

    def read(self, value: Any, name: str) -> dict[str, Any]:
        """Returns the object."""
        if not isinstance(value, dict):
            raise invalid(name, "an object", value)
        return value


@dataclasses.dataclass(frozen=True)
class Neutral:
    """A field of other servers that is not honoured here: it may be sent where it would change nothing."""

    values: tuple[Any, ...]

    def read(self, value: Any, name: str) -> None:
        """Returns nothing; the value was neutral."""
        if not any(
            isinstance(value, bool) == isinstance(choice, bool) and value == choice for choice in self.values
        ):
            wanted = " or ".join(map(repr, self.values)) if self.values else "left out"
            raise invalid(name, f"{wanted}, since this server does not honour it", value)


@dataclasses.dataclass(frozen=True)
class Special:
    """A kind with a function of its own.

    Attributes:
      function: what `read` is.
      bad: values that it must refuse, for tests.
    """

    function: Callable[[Any, str], Any]
    bad: tuple[Any, ...] = ()

    def read(self, value: Any, name: str) -> Any:
        """Returns what the function makes of the value."""
        return self.function(value, name)


def read(table: Mapping[str, Kind], values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the fields of `values` that `table` knows and that are not null, as the program takes them.

    Args:
      table: name -> kind.
      values: the object that was sent.
      prefix: what comes before a name in messages, such as "messages[0].".

    Raises:
      ApiError: for a value that its kind refuses, a name that is nearly a known one, or too many fields.
    """
    if len(values) > MAX_FIELDS:
        raise ApiError(
            f"{prefix[:-1] or 'the body'} must have at most {MAX_FIELDS} fields, got {len(values)}."
        )
    taken = {}
    for name, value in values.items():
        if value is None:
            continue
        if name not in table:
            _refuse_misspelt(name, table, prefix)
        else:
            taken[name] = table[name].read(value, prefix + name)
    return taken


def _refuse_misspelt(name, table, prefix):
    near = difflib.get_close_matches(name, table, n=1, cutoff=_ALIKE) if len(name) <= 64 else []
    if near:
        raise ApiError(f"there is no field {prefix}{name}. Did you mean {near[0]}?", param=prefix + name)
