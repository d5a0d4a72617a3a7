"""Renders jinja templates in a sandbox; run as a script, in a process with limits on time and memory.

A template from a file is a program that somebody else wrote. The sandbox of jinja2 keeps it from the
interpreter, but not from looping or allocating without end, so it is rendered by a process of its own, which
runs this file: a request as a line of JSON in, its answer as a line of JSON out (see `renderer`).
Nothing of the package is imported here, so that the process starts fast.
"""

import datetime
import functools
import json
import sys

import jinja2
import jinja2.ext
import jinja2.sandbox

try:
    import resource
except ImportError:  # not on Windows: the limit of wall time alone is left
    resource = None

CPU_SECONDS_UPPER = 2
MEMORY_BYTES_UPPER = 512 << 20
_FILES_UPPER = 32  # modules are still to be imported
_PROMPT_CHARS_UPPER = 1 << 20

# Whatever an expression of a template can raise, as far as Python's own types and jinja2 do.
_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    NameError,
    RuntimeError,  # RecursionError among them
    SyntaxError,
    TypeError,
    ValueError,
)


class _Arguments(dict):
    """Arguments of a tool call, for templates that take them as text and for those that take a mapping."""

    def __init__(self, values, text):
        super().__init__(values)
        self._text = text

    def __str__(self):
        return self._text

    def __add__(self, other):
        return self._text + other

    def __radd__(self, other):
        return other + self._text

    def __bool__(self):
        return True  # as text is that holds an empty object


def render(template: str, variables: dict) -> str:
    """Renders in this process.

    Args:
      template: jinja2.
      variables: what it sees, JSON values; `messages` as `messages.normalised` returns them.

    Raises:
      ValueError: the template fails, or writes too much; one sentence.
    """
    parts, length = [], 0
    try:
        variables = variables | {"messages": [_with_arguments(entry) for entry in variables["messages"]]}
        for part in _compiled(template).generate(**variables):
            length += len(part)
            if length > _PROMPT_CHARS_UPPER:
                raise ValueError(f"it writes more than {_PROMPT_CHARS_UPPER} characters")
            parts.append(part)
    except _FAILURES as error:
        raise ValueError(f"the chat template fails with {_sentence(error)}.") from None
    return "".join(parts)


@functools.lru_cache(maxsize=8)
def _compiled(template):
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    return environment.from_string(template)


def _with_arguments(message):
    calls = message.get("tool_calls")
    if not calls:
        return message
    function = lambda call: call["function"] | {"arguments": _arguments(call["function"]["arguments"])}
    return message | {"tool_calls": [call | {"function": function(call)} for call in calls]}


def _arguments(text):
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return _Arguments(values, text) if isinstance(values, dict) else text


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    if isinstance(value, _Arguments) and not (ensure_ascii or indent or separators or sort_keys):
        return str(value)
    # jinja2's own escapes for HTML and sorts keys
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message):
    raise jinja2.TemplateError(message)


def _sentence(error):
    line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
    text = " ".join(str(error).split())[:300].rstrip(".")
    return f"{type(error).__name__}{line}: {text}" if text else f"{type(error).__name__}{line}"


def _limit(kind, amount):
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (amount if hard == resource.RLIM_INFINITY else min(amount, hard), hard))


def _limit_time():
    """Gives the process `CPU_SECONDS_UPPER` more from now on, rounded up to whole seconds."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + CPU_SECONDS_UPPER)


def _main():
    if resource is not None:
        _limit(resource.RLIMIT_AS, MEMORY_BYTES_UPPER)
        _limit(resource.RLIMIT_CORE, 0)
        _limit(resource.RLIMIT_FSIZE, 0)  # pipes are no files
        _limit(resource.RLIMIT_NOFILE, _FILES_UPPER)
    for line in sys.stdin.buffer:
        if resource is not None:
            _limit_time()
        try:
            request = json.loads(line)
            answer = {"prompt": render(request["template"], request["variables"])}
        except ValueError as error:
            answer = {"error": str(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main()
