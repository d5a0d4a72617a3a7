"""Messages to one prompt, by the jinja template of a GGUF file or a built-in one.

A template from a file is a program that somebody else wrote. The sandbox of jinja2 keeps it from the
interpreter, but not from looping or allocating without end, so it runs in a process of its own (this file,
run as a script) with limits on time and memory. Built-in templates are rendered in place.
"""

import datetime
import json
import subprocess
import sys
from collections.abc import Container, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

try:
    import resource
except ImportError:  # not on Windows: the time limit alone is left
    resource = None

_TEMPLATE_CHARS_UPPER = 1 << 18
_PROMPT_CHARS_UPPER = 1 << 20
_CPU_SECONDS_UPPER = 2
_SECONDS_UPPER = 60  # of wall time: only reached when the machine has no time for the process
_MEMORY_BYTES_UPPER = 512 << 20

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

_CHAT = "{% for m in messages %}"
BUILTIN_TEMPLATES = {
    "deepseek2": _CHAT + "{% if m.role == 'user' %}User: {{ m.content }}\n\n"
    "{% elif m.role == 'assistant' %}Assistant: {{ m.content }}{{ eos_token }}"
    "{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}",
    "deepseek3": _CHAT + "{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content }}{{ eos_token }}"
    "{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}",
    "kimi-k2": _CHAT + "<|im_{{ m.role }}|>{{ m.role }}<|im_middle|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}",
    "chatglm4": "[gMASK]<sop>" + _CHAT + "<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
}


def builtin_template(tokens: Container[str]) -> str:
    """Returns the built-in template whose markers are among `tokens`, else DeepSeek-V2's, in plain words."""
    if "<｜User｜>" in tokens and "<｜Assistant｜>" in tokens:
        return BUILTIN_TEMPLATES["deepseek3"]
    if "<|im_middle|>" in tokens:
        return BUILTIN_TEMPLATES["kimi-k2"]
    if "[gMASK]" in tokens and "<sop>" in tokens:
        return BUILTIN_TEMPLATES["chatglm4"]
    return BUILTIN_TEMPLATES["deepseek2"]


def render(
    messages: Sequence[Mapping[str, Any]],
    template: str,
    *,
    add_generation_prompt: bool = True,
    bos_token: str = "",
    eos_token: str = "",
    **extra: Any,
) -> str:
    """Writes a conversation as the prompt that the model was trained on.

    Args:
      messages: each a mapping with strings "role" and "content"; other entries are handed to the template.
      template: jinja2, with what Hugging Face's templates count on: trimmed blocks, loop controls, `tojson`,
        `raise_exception` and `strftime_now`. At most 256 Ki characters.
      add_generation_prompt: end with the words that make the model answer.
      bos_token: text of the BOS token. A template may write it or not: encode the prompt with
        `add_special=not prompt.startswith(bos_token)`.
      eos_token: text of the EOS token.
      **extra: further variables of the template, as JSON values: `tools`, `enable_thinking`, ...

    Returns:
      The prompt, of at most 1 Mi characters.

    Raises:
      ValueError: a message is not as above, or the chat template fails or exceeds its limits of size, time
        (2 s) and memory (512 MiB).
    """
    _check_messages(messages)
    variables = dict(
        extra,
        messages=[dict(message) for message in messages],
        add_generation_prompt=add_generation_prompt,
        bos_token=bos_token,
        eos_token=eos_token,
    )
    if template in BUILTIN_TEMPLATES.values():
        return _render(template, variables)
    if len(template) > _TEMPLATE_CHARS_UPPER:
        raise ValueError(
            f"the chat template must have at most {_TEMPLATE_CHARS_UPPER} characters, got {len(template)}."
        )
    try:
        request = json.dumps({"template": template, "variables": variables})
    except (TypeError, RecursionError) as error:
        raise ValueError(f"what the chat template is given must be JSON values: {error}.") from None
    return _render_apart(request)


def _check_messages(messages):
    if not messages:
        raise ValueError("messages must not be empty.")
    for index, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message, Mapping) or not isinstance(message.get(key), str):
                raise ValueError(f"messages[{index}] must have a string {key!r}, got {message!r:.80}.")


def _render(template, variables):
    """Renders in this process."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    parts, length = [], 0
    try:
        for part in environment.from_string(template).generate(**variables):
            length += len(part)
            if length > _PROMPT_CHARS_UPPER:
                raise ValueError(f"it writes more than {_PROMPT_CHARS_UPPER} characters")
            parts.append(part)
    except _FAILURES as error:
        raise ValueError(f"the chat template fails with {_sentence(error)}.") from None
    return "".join(parts)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
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


def _render_apart(request):
    """Renders in a process of its own, `_main` below."""
    command = [sys.executable, "-P", __file__]  # -P: the package's folder must not come into sys.path
    try:
        process = subprocess.run(
            command, input=request.encode(), capture_output=True, timeout=_SECONDS_UPPER, check=False
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"the chat template must finish within {_SECONDS_UPPER} s.") from None
    try:
        answer = json.loads(process.stdout)
    except ValueError:
        raise ValueError(
            f"the chat template must finish within {_CPU_SECONDS_UPPER} s and "
            f"{_MEMORY_BYTES_UPPER >> 20} MiB; its process ended with status {process.returncode}."
        ) from None
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["prompt"]


def _limit(kind, amount):
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (amount if hard == resource.RLIM_INFINITY else min(amount, hard), hard))


def _main():
    request = json.load(sys.stdin)
    if resource is not None:
        _limit(resource.RLIMIT_CPU, _CPU_SECONDS_UPPER)
        _limit(resource.RLIMIT_AS, _MEMORY_BYTES_UPPER)
        _limit(resource.RLIMIT_CORE, 0)
    try:
        answer = {"prompt": _render(request["template"], request["variables"])}
    except ValueError as error:
        answer = {"error": str(error)}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    _main()
