"""The tokenizer of a Hugging Face checkpoint to the key-values `tokenizer.*` of a GGUF file.

Read are `tokenizer.json`, or Kimi's `tiktoken.model`; `tokenizer_config.json`, `generation_config.json`,
`config.json` and `chat_template.jinja` beside them say which tokens are special and how a chat is written.
"""

import base64
import binascii
import json
import os
from collections.abc import Mapping
from typing import Any

import tokenizers
from absl import logging

from checkpoints_tools import json_file
from checkpoints_tools.gguf_file import GGUFError
from checkpoints_tools.gguf_metadata import Field
from mla_jax import pretokenize
from mla_jax import tokenizer as tokenizer_lib
from mla_jax.tokenizer import CONTROL, NORMAL, UNUSED, USER_DEFINED

_PREFIX = "tokenizer.ggml."
_NUM_RESERVED = 256  # ids behind the ranks of tiktoken.model, those without a name included
_SPECIAL = {  # key of tokenizer_config.json: key of the file
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_END_KEYS = ("eot_token_id", "eom_token_id")  # of the other tokens that end a generation

# Told apart by it are all pre-tokenizers known here. It leaves out what ik_llama.cpp cuts in another way than
# the published tokenizer of the same name: "~", wide spaces, combining marks, camel case and 'LL.
_PROBE = (
    "Hello  World's don't x9 12345 1234567 ab中文字cd かなカナ 한국 éß ΑΩ ¼\n\n  y\t-a !!\n #tag e.g._b $5 "
    "a+b=c <br/>\r\n\r\n end.  \n (q)「z」，。 tail  "
)


def tokenizer_metadata(folder: str | os.PathLike, vocab_size: int) -> dict[str, Any]:
    """Reads the tokenizer in a folder.

    Args:
      folder: of a checkpoint.
      vocab_size: rows of the embedding; ids without a token get a filler.

    Returns:
      Key-values `tokenizer.*` as plain values and fields; empty if the folder has no tokenizer.

    Raises:
      GGUFError: for a file that cannot be read, or a tokenizer that is not byte-level BPE with one of the
        pre-tokenizers of `mla_jax.pretokenize`.
    """
    source = _Source(os.fspath(folder))
    if source.has("tokenizer.json"):
        values = _from_json(source, vocab_size)
    elif source.has("tiktoken.model"):
        values = _from_tiktoken(source, vocab_size)
    elif source.has("tokenizer.model"):
        raise GGUFError(f"{source.path('tokenizer.model')}: must come with a tokenizer.json, it does not.")
    else:
        return {}
    values |= _special_ids(source, values[f"{_PREFIX}tokens"])
    values |= source.chat_template()
    try:
        tokenizer_lib.Tokenizer(tokenizer_lib.Vocabulary.from_metadata(values))
    except ValueError as error:
        raise GGUFError(f"{source.folder}: the tokenizer cannot be used: {error}") from None
    if not values[f"{_PREFIX}merges"]:
        values[f"{_PREFIX}merges"] = Field.of([], "string")
    return values


class _Source:
    """The small files of a folder, each an empty object where it is absent."""

    def __init__(self, folder: str):
        self.folder = folder
        self.config, self.generation, self.model, self.template = (
            json_file.read_object(self.path(name)) if self.has(name) else {}
            for name in (
                "tokenizer_config.json",
                "generation_config.json",
                "config.json",
                "chat_template.json",
            )
        )

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def has(self, name: str) -> bool:
        return os.path.exists(self.path(name))

    def fail(self, name: str, what: str) -> GGUFError:
        return GGUFError(f"{self.path(name)}: {what}.")

    def added_tokens(self) -> list[Any]:
        """Returns those of `tokenizer_config.json`, in the form of `tokenizer.json`."""
        entries = self.config.get("added_tokens_decoder") or {}
        if not isinstance(entries, dict):
            raise self.fail("tokenizer_config.json", "key 'added_tokens_decoder' must be an object")
        return [
            {**entry, "id": int(key)} if isinstance(entry, dict) and _is_number(key) else entry
            for key, entry in entries.items()
        ]

    def chat_template(self) -> dict[str, str]:
        if self.has("chat_template.jinja"):
            raw = json_file.read_bytes(self.path("chat_template.jinja"))
            try:
                template = raw.decode()
            except UnicodeDecodeError:
                raise self.fail("chat_template.jinja", "must be UTF-8 text, it is not") from None
        else:
            template = self.config.get("chat_template") or self.template.get("chat_template")
        if isinstance(template, list):  # several by name
            entries = [entry for entry in template if isinstance(entry, dict)]
            named = (entry.get("template") for entry in entries if entry.get("name") == "default")
            template = next(named, None)
        if template is None:
            return {}
        if not isinstance(template, str):
            raise self.fail("tokenizer_config.json", "key 'chat_template' must be a text")
        return {"tokenizer.chat_template": template}

    def end_ids(self) -> list[int]:
        """Returns the ids that end a generation, as the two configs have them."""
        ids = []
        for name, values in (("generation_config.json", self.generation), ("config.json", self.model)):
            entry = values.get("eos_token_id")
            for token_id in entry if isinstance(entry, list) else [] if entry is None else [entry]:
                if type(token_id) is not int:
                    raise self.fail(name, f"key 'eos_token_id' must hold integers, got {token_id!r:.80}")
                ids.append(token_id)
        return list(dict.fromkeys(ids))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


def _from_json(source: _Source, vocab_size: int) -> dict[str, Any]:
    name = "tokenizer.json"
    content = json_file.read_object(source.path(name))
    model, added = content.get("model"), content.get("added_tokens") or []
    if not isinstance(model, dict) or model.get("type") != "BPE" or model.get("byte_fallback"):
        raise source.fail(name, "key 'model' must be byte-level BPE, it is not")
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not isinstance(merges, list) or not isinstance(added, list):
        raise source.fail(name, "keys 'model.vocab', 'model.merges' and 'added_tokens' must be there")
    if content.get("normalizer") not in (None, {"type": "Sequence", "normalizers": []}):
        logging.warning("%s: the normalizer is left out: GGUF files have none.", source.path(name))
    tokens = _Tokens(source.path(name), vocab_size)
    for token, token_id in vocab.items():
        tokens.add(token_id, token, NORMAL)
    for entry in (*added, *source.added_tokens()):
        tokens.add_special(entry)
    joins_digits = any(token.isdecimal() for token in vocab if len(token) > 1)
    pre = _pre_type(source, content.get("pre_tokenizer"), joins_digits)
    bos = _begins_with(content.get("post_processor"))
    return {
        **tokens.metadata(pre, [_merge(source, index, merge) for index, merge in enumerate(merges)]),
        **_add_flags(source, bos is not None and bos == _content(source.config.get("bos_token"))),
    }


def _from_tiktoken(source: _Source, vocab_size: int) -> dict[str, Any]:
    """Reads ranks of byte strings, the ids of which are the ranks; the merges follow from them."""
    name = "tiktoken.model"
    tokens = _Tokens(source.path(name), vocab_size)
    base = []
    for number, line in enumerate(json_file.read_bytes(source.path(name)).split(b"\n"), start=1):
        if not line:
            continue
        encoded, _, rank = line.partition(b" ")
        try:
            raw = base64.b64decode(encoded, validate=True)
        except binascii.Error:
            raw = b""
        if not raw or rank.strip() != str(len(base)).encode():
            raise source.fail(name, f"line {number} must be base64 of bytes and the rank {len(base)}")
        base.append("".join(tokenizer_lib.BYTE_CHARACTERS[byte] for byte in raw))
        tokens.add(len(base) - 1, base[-1], NORMAL)
    for entry in source.added_tokens():
        tokens.add_special(entry)
    for token_id in range(len(base), min(len(base) + _NUM_RESERVED, vocab_size)):
        if token_id not in tokens.texts:
            tokens.add(token_id, f"<|reserved_token_{token_id}|>", CONTROL)
    try:
        merges = tokenizer_lib.merges_by_rank(base)
    except ValueError as error:
        raise GGUFError(f"{source.path(name)}: {error}") from None
    return {**tokens.metadata("kimi-k2", [" ".join(pair) for pair in merges]), **_add_flags(source, False)}


class _Tokens:
    """Tokens by id, as they are collected."""

    def __init__(self, path: str, vocab_size: int):
        self.path, self.vocab_size = path, vocab_size
        self.texts: dict[int, str] = {}
        self.types: dict[int, int] = {}

    def add(self, token_id: Any, text: str, kind: int) -> None:
        if type(token_id) is not int or not 0 <= token_id < self.vocab_size:
            raise GGUFError(
                f"{self.path}: token {text!r:.80} must have an id in [0, {self.vocab_size}), the vocabulary "
                f"of config.json, got {token_id!r:.80}."
            )
        if self.texts.setdefault(token_id, text) != text:
            raise GGUFError(
                f"{self.path}: token {token_id} must have one text, "
                f"got {self.texts[token_id]!r:.80} and {text!r:.80}."
            )
        self.types[token_id] = kind

    def add_special(self, entry: Any) -> None:
        """Adds a token that is cut out of texts; what looks like markup is hidden in texts like a control."""
        text = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(text, str) or not text:
            raise GGUFError(f"{self.path}: an added token must have an id and a content, got {entry!r:.80}.")
        looks_special = text.startswith(("<|", "<｜")) and text.endswith(("|>", "｜>"))
        is_control = entry.get("special") is True or looks_special
        self.add(entry.get("id"), text, CONTROL if is_control else USER_DEFINED)

    def metadata(self, pre: str, merges: list[str]) -> dict[str, Any]:
        ids = range(self.vocab_size)
        return {
            f"{_PREFIX}model": "gpt2",
            f"{_PREFIX}pre": pre,
            f"{_PREFIX}tokens": [self.texts.get(token_id, f"[PAD{token_id}]") for token_id in ids],
            f"{_PREFIX}token_type": [self.types.get(token_id, UNUSED) for token_id in ids],
            f"{_PREFIX}merges": merges,
        }


def _merge(source: _Source, index: int, merge: Any) -> str:
    pair = merge.split(" ") if isinstance(merge, str) else merge
    is_pair = isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
    if not is_pair or any(not part or " " in part for part in pair):
        raise source.fail("tokenizer.json", f"'model.merges[{index}]' must be two tokens, got {merge!r:.80}")
    return " ".join(pair)


def _pre_type(source: _Source, declared: Any, joins_digits: bool) -> str:
    """Finds the pre-tokenizer that cuts the probe in the same pieces."""
    pieces = _pieces(_declared(source, declared), joins_digits)
    for name in pretokenize.NAMES:
        if _pieces(pretokenize.pre_tokenizer(name), joins_digits) == pieces:
            return name
    raise source.fail(
        "tokenizer.json",
        f"key 'pre_tokenizer' must cut text like one of {', '.join(pretokenize.NAMES)}, it does not",
    )


def _declared(source: _Source, declared: Any) -> tokenizers.pre_tokenizers.PreTokenizer:
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    try:
        found = tokenizers.Tokenizer.from_str(json.dumps({"pre_tokenizer": declared, "model": empty}))
    except Exception as error:  # the library raises nothing narrower
        raise source.fail("tokenizer.json", f"key 'pre_tokenizer' cannot be used: {error}") from None
    if found.pre_tokenizer is None:
        raise source.fail("tokenizer.json", "key 'pre_tokenizer' is missing")
    return found.pre_tokenizer


def _pieces(pre_tokenizer: tokenizers.pre_tokenizers.PreTokenizer, joins_digits: bool) -> list[str]:
    """Cuts the probe. Where no token is of two digits, it does not matter how runs of them are cut."""
    pieces = []
    for piece, _ in pre_tokenizer.pre_tokenize_str(_PROBE):
        if not joins_digits and pieces and (pieces[-1] + piece).isdecimal():
            pieces[-1] += piece
        else:
            pieces.append(piece)
    return pieces


def _begins_with(processor: Any) -> str | None:
    """Returns the token that a template puts before every text."""
    parts = processor.get("processors", [processor]) if isinstance(processor, dict) else []
    for part in parts if isinstance(parts, list) else []:
        if isinstance(part, dict) and part.get("type") == "TemplateProcessing":
            single = part.get("single")
            first = single[0] if isinstance(single, list) and single else None
            special = first.get("SpecialToken") if isinstance(first, dict) else None
            return special.get("id") if isinstance(special, dict) else None
    return None


def _content(entry: Any) -> Any:
    return entry.get("content") if isinstance(entry, dict) else entry


def _add_flags(source: _Source, adds_bos: bool) -> dict[str, bool]:
    flags = {}
    for key, default in (("add_bos_token", adds_bos), ("add_eos_token", False)):
        value = source.config.get(key)
        if value is not None and type(value) is not bool:
            raise source.fail(
                "tokenizer_config.json", f"key {key!r} must be true or false, got {value!r:.80}"
            )
        flags[f"{_PREFIX}{key}"] = default if value is None else value
    return flags


def _special_ids(source: _Source, tokens: list[str]) -> Mapping[str, int]:
    """Finds the special tokens that have keys; those that end a generation are eos, then eot and eom."""
    ids, found = {token: token_id for token_id, token in enumerate(tokens)}, {}
    for key, name in _SPECIAL.items():
        text = _content(source.config.get(key))
        if text is None:
            continue
        if not isinstance(text, str) or text not in ids:
            raise source.fail("tokenizer_config.json", f"key {key!r} must be a token, got {text!r:.80}")
        found[f"{_PREFIX}{name}"] = ids[text]
    ends = [token_id for token_id in source.end_ids() if 0 <= token_id < len(tokens)]
    eos_id = found.setdefault(f"{_PREFIX}eos_token_id", ends[0]) if ends else None
    others = [token_id for token_id in ends if token_id != eos_id]
    found |= {f"{_PREFIX}{key}": token_id for key, token_id in zip(_END_KEYS, others, strict=False)}
    return found
