"""Takes apart what a model writes, while it writes: reasoning, tool calls, and the rest, its content.

An `Answer` is fed text in cuts of any kind. It holds back what may become a marker, and nothing else, so that
the joined parts do not depend on the cuts. What begins like a tool call and is none ends as content.
"""

import dataclasses
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mla_jax.chat import arguments as arguments_lib
from mla_jax.chat.formats import END_OF_THINK, FORMATS, THINK
from mla_jax.chat.scanner import SPACE, Scanner

REASONING_FORMATS = ("auto", "deepseek", "none")
_HEADER_CHARS_UPPER = 256  # of a call: its name with what is around it


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolCallDelta:
    """The next part of a tool call.

    Attributes:
      index: which call of the answer, from 0.
      id: in the first part of a call, else None.
      name: of the function; in the first part, else None.
      arguments: fragment of the JSON text of the arguments.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delta:
    """The next part of an answer: content, or reasoning, or a part of a tool call."""

    content: str = ""
    reasoning: str = ""
    tool_call: ToolCallDelta | None = None


class Answer:
    """The parts of one answer.

    Attributes:
      num_tool_calls: how many have begun; an answer that has any and then stops has "tool_calls" as its
        finish reason.
    """

    def __init__(
        self,
        form: str,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        starts_in_reasoning: bool = False,
        reasoning_format: str = "auto",
        new_id: Callable[[], str] = lambda: f"call_{secrets.token_hex(12)}",
    ):
        """Makes ready for the first cut.

        Args:
          form: the format of tool calls, see `answer_format`.
          tools: those that may be called, see `messages.checked_tools`. Without any, and for names that are
            not among them, what looks like a call is content.
          starts_in_reasoning: the prompt has opened `<think>` already.
          reasoning_format: "auto" and "deepseek" tell reasoning from content, where `<think>` begins the
            answer; "none" leaves it in the content, tags and all.
          new_id: makes the id of a call where the format has none.

        Raises:
          ValueError: there is no such format.
        """
        if form not in FORMATS:
            raise ValueError(
                f"the format of tool calls must be one of {', '.join(FORMATS)}, got {form!r:.60}."
            )
        if reasoning_format not in REASONING_FORMATS:
            raise ValueError(
                f"the reasoning format must be one of {', '.join(REASONING_FORMATS)}, "
                f"got {reasoning_format!r:.60}."
            )
        self.num_tool_calls = 0
        self._form, self._markers = form, FORMATS[form]
        self._schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
        self._new_id = new_id
        self._scan = Scanner()
        self._deltas: list[Delta] = []
        self._raw = ""  # what has been taken for the beginning of a call, to be given back if it is none
        self._arguments = None
        self._state = self._reasoning_begins if starts_in_reasoning else self._begin
        if reasoning_format == "none":
            self._state = self._content

    def feed(self, text: str) -> list[Delta]:
        """Returns what has become certain with `text`."""
        self._scan.text += text
        return self._advance()

    def finish(self) -> list[Delta]:
        """Returns what was held back; the text is over."""
        self._scan.is_final = True
        return self._advance()

    def _advance(self):
        while self._state():
            pass
        deltas, self._deltas = self._deltas, []
        return deltas

    # Each state takes what it can from the text and returns True if there may be more to take now.

    def _begin(self):
        found = self._scan.take_after_space(THINK)
        if found is None:
            return False
        self._state = self._reasoning_space if found else self._content
        return True

    def _reasoning_begins(self):
        if self._scan.take_after_space(THINK) is None:  # some write it though the prompt has
            return False
        self._state = self._reasoning_space
        return True

    def _reasoning_space(self):
        if not self._scan.skip_space():
            return False
        self._state = self._reasoning
        return True

    def _reasoning(self):
        begin = self._markers.calls_begin if self._schemas else None  # ends reasoning too
        text, marker = self._scan.until(END_OF_THINK, begin, hold=SPACE)
        self._write(reasoning=text)
        if marker is None:
            return False
        if marker == END_OF_THINK:
            self._scan.take(len(marker))
            self._state = self._content_begins
        else:
            self._state = self._content
        return True

    def _content_begins(self):
        if not self._scan.skip_space():
            return False
        self._state = self._content
        return True

    def _content(self):
        begins = (self._markers.calls_begin, self._markers.call_begin) if self._schemas else ()
        text, marker = self._scan.until(*begins)
        self._write(content=text)
        if marker is None:
            return False
        self._raw = self._scan.take(len(marker))
        self._state = self._header if marker == self._markers.call_begin else self._between
        return True

    def _between(self):
        """In a section of calls, or between calls where there are no sections."""
        space = self._scan.space()
        markers = (self._markers.call_begin, self._markers.calls_end)
        found = self._scan.starts_with(*markers, after=len(space))
        if found is None:
            return False
        if found == self._markers.call_begin:
            self._raw += self._scan.take(len(space) + len(found))
            self._state = self._header
        elif found and not self._raw:
            self._scan.take(len(space) + len(found))
            self._state = self._content_begins
        elif not self._raw and space == self._scan.text:
            return False  # white space after the last call is dropped
        else:
            self._give_back()
        return True

    def _header(self):
        if self._form == "json":
            return self._whole_call()
        found = self._scan.match(_HEADERS[self._form], _HEADER_CHARS_UPPER)
        if found is None:
            return False
        name, identifier = _NAMES[self._form](found[1].strip()) if found else (None, None)
        if name not in self._schemas:
            self._give_back()
            return True
        self._raw = ""
        self._scan.take(found.end())
        self._start_call(name, identifier)
        self._arguments = arguments_lib.reader(self._form, self._markers, self._schemas[name])
        self._state = self._call
        return True

    def _call(self):
        fragment, is_over = self._arguments.read(self._scan)
        if fragment:
            delta = ToolCallDelta(index=self.num_tool_calls - 1, arguments=fragment)
            self._deltas.append(Delta(tool_call=delta))
        if not is_over:
            return False
        self._state = self._between
        return True

    def _whole_call(self):
        found = self._scan.find(self._markers.call_end)
        if found is None:
            return False
        name, arguments = arguments_lib.whole_call(self._scan.text[:found])
        if name not in self._schemas:
            self._give_back()
            return True
        self._raw = ""
        self._scan.take(found + len(self._markers.call_end))
        self._start_call(name, None)
        delta = ToolCallDelta(index=self.num_tool_calls - 1, arguments=arguments)
        self._deltas.append(Delta(tool_call=delta))
        self._state = self._between
        return True

    def _start_call(self, name, identifier):
        delta = ToolCallDelta(index=self.num_tool_calls, id=identifier or self._new_id(), name=name)
        self._deltas.append(Delta(tool_call=delta))
        self.num_tool_calls += 1

    def _give_back(self):
        self._write(content=self._raw)
        self._raw, self._state = "", self._content

    def _write(self, **part):
        if any(part.values()):
            self._deltas.append(Delta(**part))


_HEADERS = {
    "deepseek-v3": re.compile(r"[^<]*<｜tool▁sep｜>([^<\n]*)\n"),
    "deepseek-v3.1": re.compile(r"([^<]*)<｜tool▁sep｜>"),
    "kimi-k2": re.compile(r"([^<]*)<\|tool_call_argument_begin\|>"),
    "glm-4.5": re.compile(r"\s*([^<\s][^<\n]*?)\s*(?:\n|(?=<arg_key>|</tool_call>))"),
}


def _kimi_name(identifier):
    name = re.fullmatch(r"(?:functions\.)?(.*?)(?::\d+)?", identifier)
    return name[1], identifier


_NAMES = dict.fromkeys(_HEADERS, lambda name: (name, None)) | {"kimi-k2": _kimi_name}
