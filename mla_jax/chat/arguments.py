"""Arguments of a tool call as they are written, read to the text of a JSON object."""

import json
import re
from collections.abc import Mapping
from typing import Any

from mla_jax.chat.formats import Format
from mla_jax.chat.scanner import SPACE, Scanner

_FENCE = "```json"
_VALUE_END = "</arg_value>"
_KEY = re.compile(r"<arg_key>\s{0,16}([^<]{1,256}?)\s{0,16}</arg_key>\s{0,16}<arg_value>")
_KEY_CHARS_UPPER = 400


class TextArguments:
    """Arguments that are written as JSON already, up to a marker; with V3 in a fence of backticks."""

    def __init__(self, markers: Format, *, may_be_fenced: bool):
        self._markers = (markers.call_end, markers.calls_end, markers.call_begin)
        self._may_be_fenced, self._hold = may_be_fenced, SPACE
        self._has_begun, self._is_empty = False, True

    def read(self, scan: Scanner) -> tuple[str, bool]:
        """Returns the next fragment of JSON, and whether it was the last; what follows is left in `scan`."""
        if self._may_be_fenced:
            is_fenced = scan.take_after_space(_FENCE)
            if is_fenced is None:
                return "", False
            self._may_be_fenced, self._hold = False, SPACE + "`" if is_fenced else SPACE
        if not self._has_begun and not scan.skip_space():
            return "", False
        text, marker = scan.until(*self._markers, hold=self._hold)
        self._has_begun, self._is_empty = True, self._is_empty and not text
        if marker == self._markers[0]:
            scan.take(len(marker))
        return "{}" if marker and self._is_empty else text, marker is not None


class TaggedArguments:
    """Arguments that are written as tags of keys and values, strings without quotes.

    Which values are strings is told by the schema of the parameters; of others, those that are no JSON are.
    """

    def __init__(self, markers: Format, schema: Mapping[str, Any]):
        properties = schema.get("properties")
        self._properties = properties if isinstance(properties, Mapping) else {}
        self._call_end = markers.call_end
        self._before = "{"  # what comes before the next key
        self._is_string: bool | None = None  # None between values

    def read(self, scan: Scanner) -> tuple[str, bool]:
        """Returns the next fragment of JSON, and whether it was the last; what follows is left in `scan`."""
        fragments, is_over, goes_on = [], False, True
        while goes_on and not is_over:
            step = self._pair if self._is_string is None else self._value
            fragment, goes_on, is_over = step(scan)
            fragments.append(fragment)
        return "".join(fragments), is_over

    def _pair(self, scan):
        if not scan.skip_space() and not scan.is_final:
            return "", False, False
        found = scan.starts_with("<arg_key>", self._call_end)
        if found == "<arg_key>":
            found = scan.match(_KEY, _KEY_CHARS_UPPER)
        if found is None:
            return "", False, False
        if isinstance(found, re.Match):
            scan.take(found.end())
            self._is_string = self._takes_string(found[1])
            opening = f"{self._before}{_quoted(found[1])}: " + ('"' if self._is_string else "")
            self._before = ", "
            return opening, True, False
        if found:
            scan.take(len(found))
        return "{}" if self._before == "{" else "}", False, True

    def _value(self, scan):
        if self._is_string:
            text, marker = scan.until(_VALUE_END)
            fragment, is_whole = _quoted(text)[1:-1] + ('"' if marker else ""), marker is not None
        else:
            end = scan.find(_VALUE_END)
            if end is None:
                return "", False, False
            is_whole = end >= 0
            fragment = _json_or_string(scan.take(end)) if is_whole else scan.take(len(scan.text))
        if is_whole:
            scan.take(len(_VALUE_END))
            self._is_string = None
        return fragment, is_whole, False

    def _takes_string(self, key):
        schema = self._properties.get(key)
        if not isinstance(schema, Mapping):
            return False
        choices = schema.get("enum")
        return schema.get("type") == "string" or (
            isinstance(choices, list) and bool(choices) and all(isinstance(choice, str) for choice in choices)
        )


def reader(form: str, markers: Format, schema: Mapping[str, Any]) -> TextArguments | TaggedArguments:
    """Returns what reads the arguments of one call in a format, by the JSON schema of its parameters."""
    if form == "glm-4.5":
        return TaggedArguments(markers, schema)
    return TextArguments(markers, may_be_fenced=form == "deepseek-v3")


def whole_call(text: str) -> tuple[str | None, str]:
    """Returns name and arguments, as JSON, of a call that is one JSON object; (None, "") if it is none."""
    try:
        call = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None, ""
    name = call.get("name") if isinstance(call, dict) else None
    arguments = call.get("arguments", {}) if isinstance(call, dict) else None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None, ""
    return name, json.dumps(arguments, ensure_ascii=False)


def _json_or_string(text):
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _quoted(text)
    return text.strip()


def _refuse(constant):
    raise ValueError(f"{constant} is not JSON")


def _quoted(text):
    return json.dumps(text, ensure_ascii=False)
