"""Holds a text to a grammar: which tokens may come next, by llguidance.

    compiled = grammar.compile("json_schema", '{"type": "object"}', tokenizer)
    matcher = compiled.start()
    matcher.mask()  # u32[ceil(W / 32)]
    matcher.accept(token)

A mask allows exactly the tokens whose bytes can go on to a text of the grammar; control tokens never, but for
the markers of a tool call that must be written, and the end-of-generation tokens exactly where a text may
end. JSON has its properties in the order of the schema, and as white space one space, or a line break and at
most 20 spaces or tabs, so that no model idles there.
"""

import collections
import contextlib
import json
import pathlib
import selectors
import subprocess
import sys
import threading
import time
import weakref

import llguidance
import numpy as np

from mla_jax import tokenizer as tokenizer_lib
from mla_jax.chat import renderer
from mla_jax.serve import gbnf, grammar_child, request

KINDS = ("json_object", "json_schema", "grammar", "regex", "tool_choice")
MAX_BYTES = 1 << 16  # of a grammar's text
_KEPT = 64  # compiled grammars
_TRY_SECONDS = 1.0
_START_SECONDS = 60.0
_QUEUE_SECONDS = 5.0
_SPARE_SECONDS, _SECONDS_PER_TOKEN = 1.0, 0.03  # of CPU time that one text may take for its masks
_NO_FORCING = '%llguidance {"no_forcing": true}'  # else only the usual tokens of a forced text are allowed
_WHITE_SPACE = r" |\n[ \t]{0,20}"
_COMPILERS: "weakref.WeakKeyDictionary[tokenizer_lib.Tokenizer, Compiler]" = weakref.WeakKeyDictionary()
_BUILDING = threading.Lock()
_SCRIPT = pathlib.Path(grammar_child.__file__)


def compile(kind: str, text: str, tokenizer: tokenizer_lib.Tokenizer) -> "CompiledGrammar":
    """Returns the grammar of `text` for a vocabulary; one that was compiled lately at once. Thread-safe.

    Args:
      kind: one of `KINDS`.
      text: at most 64 KiB. Of "json_object" nothing (any JSON object); of "json_schema" the schema, a JSON
        object; of "grammar" GBNF as in llama.cpp, or Lark as in llguidance where it begins with
        "%llguidance"; of "regex" an expression of Rust's `regex` that matches the whole text; of
        "tool_choice" what `chat.forced_call.grammar` returns, which alone may name control tokens.
      tokenizer: of the model.

    Raises:
      ValueError: `text` is no such grammar, matches nothing, or takes too long to compile (1 s).
      request.QueueFull: too many are being compiled.
    """
    return _compiler(tokenizer).compile(kind, text)


def kept(kind: str, text: str, tokenizer: tokenizer_lib.Tokenizer) -> "CompiledGrammar | None":
    """Returns the grammar of `text` at once, if `compile` was given it lately; None if not. Thread-safe."""
    compiler = _COMPILERS.get(tokenizer)
    return None if compiler is None else compiler.kept(kind, text)


def prepare(tokenizer: tokenizer_lib.Tokenizer) -> None:
    """Does what the first grammar of a vocabulary would wait for: half a second, for a large vocabulary."""
    with contextlib.suppress(ValueError, RuntimeError):  # which the first grammar will be told
        compile("json_object", "", tokenizer)


def _compiler(tokenizer):
    with _BUILDING:
        if tokenizer not in _COMPILERS:
            _COMPILERS[tokenizer] = Compiler(tokenizer)
        return _COMPILERS[tokenizer]


class CompiledGrammar:
    """A grammar over one vocabulary, for any number of texts at once; a `request.Grammar`."""

    def __init__(self, matcher, allowed: np.ndarray):
        self._matcher, self._allowed = matcher, allowed

    def start(self) -> "TextMatcher":
        """Returns a matcher at the beginning of a text; it belongs to one thread at a time."""
        return TextMatcher(self._matcher.deep_copy(), self._allowed)


class TextMatcher:
    """How far one text has come; a `request.Matcher`."""

    def __init__(self, matcher, allowed: np.ndarray):
        self._matcher, self._allowed = matcher, allowed
        self._mask: np.ndarray | None = None  # of the next token, once it was asked for
        self._seconds = _SPARE_SECONDS

    def mask(self) -> np.ndarray:
        """Returns which tokens may come next: u32[ceil(W / 32)], token i in bit i % 32 of word i // 32.

        Raises:
          request.GrammarFailed: it has become too complex to go on, or leaves no token of the vocabulary.
        """
        if self._mask is None:
            bits = self._timed(self._matcher.compute_bitmask)
            self._check()
            mask = np.frombuffer(bits, np.uint32)[: len(self._allowed)] & self._allowed
            if not mask.any():
                raise request.GrammarFailed(
                    "grammar must leave a token of the vocabulary to go on with, got none."
                )
            mask.flags.writeable = False
            self._mask = mask
        return self._mask

    def accept(self, token: int) -> None:
        """Goes on by a token that the mask allowed; after an end-of-generation token there is no more.

        Raises:
          ValueError: the grammar does not allow it. The matcher stays where it was.
          request.GrammarFailed: as `mask`.
        """
        word, bit = divmod(token, 32)
        mask = self.mask()
        if not (0 <= word < len(mask) and int(mask[word]) >> bit & 1):
            raise ValueError(f"token must be one that the grammar allows, got {token}.")
        self._mask = None
        self._timed(self._matcher.consume_token, token)
        self._check()

    def _check(self):
        if self._matcher.is_error():
            error = _sentence(self._matcher.get_error())
            raise request.GrammarFailed(f"grammar must stay simple enough to follow: {error}.")

    def _timed(self, method, *args):
        start = time.thread_time()
        result = method(*args)
        self._seconds = min(self._seconds + _SECONDS_PER_TOKEN, _SPARE_SECONDS) - (time.thread_time() - start)
        if self._seconds < 0:
            raise request.GrammarFailed(
                f"grammar must take at most {_SECONDS_PER_TOKEN} s a token to follow, got more for a while."
            )
        return result


class Compiler:
    """Compiles the grammars of one vocabulary and keeps the newest of them; `compile` has one for each."""

    def __init__(self, tokenizer: tokenizer_lib.Tokenizer):
        if not tokenizer.eog_ids:
            raise ValueError(
                "the vocabulary must have an end-of-generation token to follow a grammar, got none."
            )
        tokens, special = _split(tokenizer)
        ends = sorted(tokenizer.eog_ids)
        is_allowed = np.ones(-(-len(tokens) // 32) * 32, np.uint8)
        is_allowed[len(tokens) :] = is_allowed[special] = 0
        is_allowed[ends] = 1
        pack = lambda bits: np.packbits(bits, bitorder="little").view(np.uint32)
        self._allowed, self._all = pack(is_allowed), pack(np.arange(len(is_allowed)) < len(tokens))
        self._tokenizer = grammar_child.build_tokenizer(tokens, special, ends)
        texts = [token.decode("latin-1") for token in tokens]
        self._vocabulary = {"tokens": texts, "special": special, "ends": ends}
        self._kept: collections.OrderedDict[tuple[str, str], CompiledGrammar] = collections.OrderedDict()
        self._child: _Child | None = None
        self._lock, self._kept_lock = threading.Lock(), threading.Lock()  # of compiling, and of what is kept

    def compile(self, kind: str, text: str) -> CompiledGrammar:
        """Returns the grammar of `text`; as the function `compile`."""
        compiled = self.kept(kind, text)
        if compiled is not None:
            return compiled
        _check(kind, text)
        if not self._lock.acquire(timeout=_QUEUE_SECONDS):
            raise request.QueueFull("too many grammars are being compiled.")
        try:
            compiled = self.kept(kind, text)  # by who had the lock before
            return self._compile(kind, text) if compiled is None else compiled
        finally:
            self._lock.release()

    def kept(self, kind: str, text: str) -> CompiledGrammar | None:
        """Returns the grammar of `text` if it was compiled lately, whatever is being compiled now."""
        with self._kept_lock:
            compiled = self._kept.get((kind, text))
            if compiled is not None:
                self._kept.move_to_end((kind, text))
            return compiled

    def _compile(self, kind, text):
        source = _SOURCES[kind](text)
        if self._child is None:
            self._child = _Child(self._vocabulary)
        error = self._child.ask(source, _TRY_SECONDS)
        if error is None:
            self._child = None
            error = (
                f"it takes more than {_TRY_SECONDS} s or too much memory to compile, or is nested too deeply"
            )
        if error:
            raise ValueError(f"{kind} must be one that can be followed: {_sentence(error)}.")
        allowed = self._all if kind == "tool_choice" else self._allowed
        compiled = CompiledGrammar(grammar_child.open_matcher(self._tokenizer, source), allowed)
        try:
            compiled.start().mask()  # the trial knows of no token that is not allowed
        except request.GrammarFailed as error:
            raise ValueError(str(error)) from None
        with self._kept_lock:
            self._kept[kind, text] = compiled
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return compiled


class _Child:
    """A process that tries grammars; it ends with its owner."""

    def __init__(self, vocabulary):
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=renderer.environment(),
            start_new_session=True,  # an interrupt from the terminal is not for it
        )
        self._end = weakref.finalize(self, _end, self._process)
        if self.ask(vocabulary, _START_SECONDS) is None:
            raise RuntimeError(f"the process that compiles grammars must start, {_SCRIPT.name} did not.")

    def ask(self, value, seconds) -> str | None:
        """Returns the answer, or None and ends the process if there is none in time."""
        try:
            self._process.stdin.write(json.dumps(value).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline() if self._has_answered(seconds) else b""
        except BrokenPipeError:
            line = b""
        if not line:
            self._end()
            return None
        return json.loads(line)

    def _has_answered(self, seconds):
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            return bool(selector.select(seconds))


def _end(process):
    process.kill()
    process.stdout.close()
    try:
        process.stdin.close()
    except BrokenPipeError:
        pass  # what was not yet sent
    process.wait()


def _split(tokenizer):
    """Returns the bytes of each token, and the ids that are never a part of a text."""
    tokens = [tokenizer.token_bytes(index) for index in range(len(tokenizer.vocabulary.tokens))]
    hidden = (tokenizer_lib.UNKNOWN, tokenizer_lib.CONTROL, tokenizer_lib.UNUSED)
    special = [
        index
        for index, (token, kind) in enumerate(zip(tokens, tokenizer.token_types, strict=True))
        # 0xFF is in no UTF-8 text, and marks special tokens for llguidance
        if kind in hidden or index in tokenizer.eog_ids or not token or token[0] == 0xFF
    ]
    return tokens, special


def _check(kind, text):
    if kind not in KINDS:
        raise ValueError(f"kind of a grammar must be one of {', '.join(KINDS)}, got {kind!r:.60}.")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{kind} must be valid Unicode, got a lone surrogate.") from None
    if size > MAX_BYTES:
        raise ValueError(f"{kind} must have at most {MAX_BYTES} bytes, got {size}.")


def _from_schema(text):
    try:
        schema = json.loads(text)
        json.dumps(schema, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"json_schema must be JSON: {_sentence(str(error))}.") from None
    if not isinstance(schema, dict):
        raise ValueError(f"json_schema must be an object, got {text!r:.60}.")
    start = {"lark_grammar": f"{_NO_FORCING}\nstart: @schema"}
    return json.dumps({"grammars": [start, {"name": "schema", "json_schema": _guided(schema)}]})


def _from_tool_choice(text):
    value = json.loads(text)
    start = {"lark_grammar": f"{_NO_FORCING}\n{value['lark']}"}
    arguments = [
        {"name": f"arguments_{index}", "json_schema": _guided(entry["schema"], not entry["is_strict"])}
        for index, entry in enumerate(value["arguments"])
    ]
    return json.dumps({"grammars": [start, *arguments]})


def _guided(schema, is_lenient=False):
    options = {"whitespace_pattern": _WHITE_SPACE, "lenient": is_lenient, "coerce_one_of": False}
    return {**schema, "x-guidance": options}


def _from_grammar(text):
    lark = text if text.lstrip().startswith("%llguidance") else gbnf.to_lark(text)
    return _from_lark(f"{lark}\n{_NO_FORCING}")


def _from_regex(text):
    return _from_lark(f"{_NO_FORCING}\nstart: /{llguidance.regex_to_lark(text, '')}/")


def _from_lark(lark):
    return json.dumps({"grammars": [{"lark_grammar": lark}]})


_SOURCES = {
    "json_object": lambda text: _from_schema('{"type": "object"}'),
    "json_schema": _from_schema,
    "grammar": _from_grammar,
    "regex": _from_regex,
    "tool_choice": _from_tool_choice,
}


def _sentence(error):
    """Returns the line of an error of llguidance that says what it is, without the full stop."""
    if error.startswith("NoExtension"):
        return "no text matches it"
    lines = error.splitlines()
    line = next((line for line in lines if line.startswith("error: ")), lines[0])  # of a regular expression
    return line.removeprefix("error: ").rstrip(" .")[:200]
