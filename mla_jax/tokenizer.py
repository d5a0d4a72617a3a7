"""Text to token ids and back, from the vocabulary that a GGUF file carries.

`Vocabulary` is the file's metadata, checked. `Tokenizer` is byte-level BPE over it: special tokens are cut
out of the text, the rest is cut into pieces (mla_jax/pretokenize.py), and the bytes of each piece are merged
by rank. The ids are those of ik_llama.cpp for the same file, also where it departs from the tokenizer that a
model was published with; mla_jax/pretokenize.py lists where.
"""

import codecs
import collections
import dataclasses
import operator
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import models

from mla_jax import pretokenize

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
_TOKEN_TYPES = frozenset(range(7))  # 0 is undefined, 6 a byte; both are taken as normal

_PREFIX = "tokenizer.ggml."
_ID_KEYS = {  # field of Vocabulary: key of the file
    "bos_id": "bos_token_id",
    "eos_id": "eos_token_id",
    "eot_id": "eot_token_id",
    "eom_id": "eom_token_id",
    "fim_pad_id": "fim_pad_token_id",
    "fim_rep_id": "fim_rep_token_id",
    "fim_sep_id": "fim_sep_token_id",
}

_MAX_JOINED = 32  # characters of joined pairs to those of tokens; DeepSeek's vocabularies have 2
_TEXT_CHARS_UPPER = 1 << 21  # the expressions of a pre-tokenizer give up on longer runs of white space

# Tokens that end a generation whatever the ids in the metadata say, by their text.
_EOG_TEXTS = """
<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s>
<|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response>
<｜end▁of▁sentence｜>
""".split()
# Fill-in-the-middle tokens that end a generation where the metadata names none of their kind.
_FIM_EOG_TEXTS = {
    "fim_pad_id": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep_id": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep_id": ("<|file_sep|>",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The tokenizer part of a GGUF file: tokens in the order of their ids, merges in that of their ranks."""

    tokens: tuple[str, ...]  # in GPT-2's printable byte alphabet, except special tokens, which are plain text
    token_types: tuple[int, ...]
    merges: tuple[tuple[str, str], ...]
    pre: str  # name of the pre-tokenizer, one of pretokenize.NAMES
    bos_id: int | None = None
    eos_id: int | None = None
    eot_id: int | None = None
    eom_id: int | None = None
    fim_pad_id: int | None = None
    fim_rep_id: int | None = None
    fim_sep_id: int | None = None
    add_bos: bool = False
    add_eos: bool = False
    chat_template: str | None = None

    def __post_init__(self):
        if not self.tokens:
            raise ValueError(f"{_PREFIX}tokens must not be empty.")
        if len(self.token_types) != len(self.tokens):
            raise ValueError(
                f"{_PREFIX}token_type must have one entry for each of the {len(self.tokens)} tokens, "
                f"got {len(self.token_types)}."
            )
        if self.pre not in pretokenize.NAMES:
            raise ValueError(
                f"{_PREFIX}pre must be one of {', '.join(pretokenize.NAMES)}, got {self.pre!r:.60}."
            )
        for field, key in _ID_KEYS.items():
            token_id = getattr(self, field)
            if token_id is not None and not 0 <= token_id < len(self.tokens):
                raise ValueError(f"{_PREFIX}{key} must be in [0, {len(self.tokens)}), got {token_id}.")
        for flag, field in (("add_bos", "bos_id"), ("add_eos", "eos_id")):
            if getattr(self, flag) and getattr(self, field) is None:
                raise ValueError(f"{_PREFIX}{_ID_KEYS[field]} must be given when {flag}_token is true.")
        for index, kind in enumerate(self.token_types):
            if kind not in _TOKEN_TYPES:
                raise ValueError(f"{_PREFIX}token_type[{index}] must be in [0, 6], got {kind}.")
        _check_tokens_and_merges(self.tokens, self.merges)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "Vocabulary":
        """Reads the vocabulary of a GGUF file.

        Args:
          metadata: key -> value of the file. Strings may be str or bytes, arrays lists or NumPy arrays,
            numbers Python's or NumPy's. `tokenizer.ggml.merges` may be missing for kimi-k2 alone, whose
            merges follow from the order of its tokens (ik_llama.cpp then merges nothing).

        Raises:
          ValueError: a key is missing or its value cannot be used; the sentence names the key.
        """
        model = _text(metadata, "model", required=True)
        if model != "gpt2":
            raise ValueError(f"{_PREFIX}model must be 'gpt2' (byte-level BPE), got {model!r:.60}.")
        pre = _text(metadata, "pre") or "default"
        tokens = _texts(metadata, "tokens")
        types = metadata.get(f"{_PREFIX}token_type")
        if f"{_PREFIX}merges" in metadata:
            merges = tuple(_merge(index, entry) for index, entry in enumerate(_texts(metadata, "merges")))
        elif pre == "kimi-k2":
            merges = merges_by_rank(tokens)
        else:
            raise ValueError(f"{_PREFIX}merges is missing; only kimi-k2 vocabularies work without it.")
        return cls(
            tokens=tuple(token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)),
            token_types=(NORMAL,) * len(tokens) if types is None else _integers("token_type", types),
            merges=merges,
            pre=pre,
            add_bos=_flag(metadata, "add_bos_token"),
            add_eos=_flag(metadata, "add_eos_token"),
            chat_template=_text(metadata, "chat_template", prefix="tokenizer."),
            **{field: _token_id(metadata, key) for field, key in _ID_KEYS.items()},
        )


class Tokenizer:
    """Encodes text to the token ids of a vocabulary and decodes them.

    Attributes:
      vocabulary: the `Vocabulary` it was made from.
      eog_ids: frozenset of the ids that end a generation: the file's eos, eot, eom and fill-in-the-middle
        padding and separators, and the tokens whose text is known to mean it.
      token_types: the vocabulary's, but that tokens known to end a generation are CONTROL.
    """

    def __init__(self, vocabulary: Vocabulary):
        ids = {token: index for index, token in enumerate(vocabulary.tokens)}
        self.vocabulary = vocabulary
        self.eog_ids = frozenset(_eog_ids(vocabulary, ids))
        types = list(vocabulary.token_types)
        for token_id in self.eog_ids.intersection(ids[text] for text in _EOG_TEXTS if text in ids):
            types[token_id] = CONTROL
        self.token_types = tuple(types)
        special = [index for index, kind in enumerate(types) if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
        special.sort(key=lambda index: -len(vocabulary.tokens[index].encode()))
        self._special = [(vocabulary.tokens[index], index) for index in special]
        self._user_defined = [entry for entry in self._special if types[entry[1]] == USER_DEFINED]
        self._missing_bytes = frozenset(byte for byte, char in enumerate(BYTE_CHARACTERS) if char not in ids)
        self._bpe = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=list(vocabulary.merges)))
        self._bpe.pre_tokenizer = pretokenize.pre_tokenizer(vocabulary.pre)

    def encode(
        self, text: str, *, add_special=True, parse_special=True, stand_ins: Mapping[str, str] | None = None
    ) -> list[int]:
        """Returns the token ids of `text`.

        Args:
          text: any Unicode text.
          add_special: put BOS before and EOS after, where the vocabulary asks for them.
          parse_special: read the text of control tokens as those tokens. False: it is text like any other,
            for what a user wrote; user-defined tokens are found all the same, as in ik_llama.cpp.
          stand_ins: characters to be replaced by others, after special tokens were found.

        Raises:
          ValueError: `text` is longer than 2 Mi characters, or holds a lone surrogate or a byte that the
            vocabulary has no token for.
        """
        ids, table = [], str.maketrans(dict(stand_ins or {}))
        as_meant = lambda part: part.translate(table) if table else part
        encoded = lambda part: self._bpe.encode_batch_fast([as_meant(part)])[0].ids  # `encode` keeps the GIL
        self._check_text(as_meant(text))
        for part in _split(text, self._special if parse_special else self._user_defined):
            ids.extend([part] if isinstance(part, int) else encoded(part))
        if add_special and self.vocabulary.add_bos:
            ids.insert(0, self.vocabulary.bos_id)
        if add_special and self.vocabulary.add_eos:
            ids.append(self.vocabulary.eos_id)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Returns the text of `ids`; bytes that are not UTF-8 become U+FFFD.

        Args:
          ids: token ids, each in [0, vocabulary size).
          skip_special: render control tokens as nothing, like unused ones. False: as their text.
        """
        return b"".join(self._rendered(token_id, skip_special) for token_id in ids).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes that a token stands for; a special token stands for its text.

        Raises:
          ValueError: `token_id` is not in [0, vocabulary size).
        """
        token_id = operator.index(token_id)
        if not 0 <= token_id < len(self.vocabulary.tokens):
            raise ValueError(f"token id must be in [0, {len(self.vocabulary.tokens)}), got {token_id}.")
        token = self.vocabulary.tokens[token_id]
        if self.token_types[token_id] in (UNKNOWN, CONTROL, USER_DEFINED):
            return token.encode()
        return b"".join(_BYTES.get(char) or char.encode() for char in token)

    def _rendered(self, token_id, skip_special):
        rendered = self.token_bytes(token_id)
        hidden = (UNKNOWN, CONTROL, UNUSED) if skip_special else (UNUSED,)
        return b"" if self.token_types[token_id] in hidden else rendered

    def _check_text(self, text):
        if len(text) > _TEXT_CHARS_UPPER:
            raise ValueError(f"text must have at most {_TEXT_CHARS_UPPER} characters, got {len(text)}.")
        try:
            encoded = text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text must be valid Unicode, got the lone surrogate U+{ord(text[error.start]):04X} "
                f"at position {error.start}."
            ) from None
        missing = self._missing_bytes.intersection(encoded) if self._missing_bytes else ()
        if missing:
            raise ValueError(f"text holds byte 0x{min(missing):02X}, for which the vocabulary has no token.")


class StreamDecoder:
    """Decodes tokens one at a time, holding back the bytes of a character until all have come.

    The parts that `feed` returns, and last `flush`, joined are `Tokenizer.decode` of the same ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, shown: Container[int] = ()):
        """Begins a text; control tokens among `shown` are rendered as their text whatever `skip_special`."""
        self._tokenizer = tokenizer
        self._skip_special, self._shown = skip_special, shown
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        """Returns the text that is certain once `token_id` has come; may be empty."""
        skip_special = self._skip_special and token_id not in self._shown
        return self._utf8.decode(self._tokenizer._rendered(token_id, skip_special))

    def flush(self) -> str:
        """Returns U+FFFD for a character still incomplete, else nothing, and starts afresh."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def _byte_alphabet():
    """GPT-2's printable character of each byte: itself where it can be seen, else the next of U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return [chr(byte if byte in seen else 0x100 + hidden.index(byte)) for byte in range(256)]


BYTE_CHARACTERS = _byte_alphabet()  # how byte-level tokens are written: a character for each byte
_BYTES = {char: bytes([byte]) for byte, char in enumerate(BYTE_CHARACTERS)}


def _check_tokens_and_merges(tokens, merges):
    known = set(tokens)
    if len(known) != len(tokens):
        (token, count), *_ = collections.Counter(tokens).most_common(1)
        raise ValueError(f"{_PREFIX}tokens must differ from each other, got {token!r:.60} {count} times.")
    for index, (left, right) in enumerate(merges):  # the library would panic
        if left not in known or right not in known or left + right not in known:
            raise ValueError(
                f"{_PREFIX}merges[{index}] must join two tokens to a third, "
                f"got {left!r:.60} and {right!r:.60}."
            )


def _split(text: str, special: Sequence[tuple[str, int]]) -> list[str | int]:
    """Cuts the special tokens out of `text`: the longest everywhere first, then the next in what is left."""
    parts = [text] if text else []
    for token, token_id in special:
        if token in text:
            parts = [piece for part in parts for piece in _split_one(part, token, token_id)]
    return parts


def _split_one(part, token, token_id):
    if isinstance(part, int):
        return [part]
    first, *rest = part.split(token)
    pieces = [first]
    for piece in rest:
        pieces += [token_id, piece]
    return [piece for piece in pieces if piece != ""]


def _eog_ids(vocabulary, ids):
    yield from (ids[text] for text in _EOG_TEXTS if text in ids)
    for field in ("eos_id", "eot_id", "eom_id"):
        if getattr(vocabulary, field) is not None:
            yield getattr(vocabulary, field)
    for field, texts in _FIM_EOG_TEXTS.items():
        if getattr(vocabulary, field) is not None:
            yield getattr(vocabulary, field)
        else:
            yield from [ids[text] for text in texts if text in ids][:1]


def merges_by_rank(tokens: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Returns every pair of tokens that joins to a third, by the third's id: what tiktoken merges by.

    Where several pairs join to one token, the order among them decides nothing but ties within a piece.

    Raises:
      ValueError: if there are far more pairs than in any vocabulary that was trained.
    """
    known, lengths = {token: token for token in tokens}, {len(token) for token in tokens}
    limit = _MAX_JOINED * sum(map(len, tokens))
    merges, num_joined = [], 0
    for token in tokens:
        for cut in range(1, len(token)):
            if cut not in lengths or len(token) - cut not in lengths:
                continue  # or a long token would take time with its square
            left, right = known.get(token[:cut]), known.get(token[cut:])
            if left is not None and right is not None:
                merges.append((left, right))
                num_joined += len(token)
        if num_joined > limit:
            raise ValueError(
                f"{_PREFIX}merges must be given when tokens join in so many ways, got more than {limit} "
                "characters of them."
            )
    return tuple(merges)


def _merge(index, entry):
    left, space, right = entry.partition(" ")
    if not (left and space and right) or " " in right:
        raise ValueError(
            f"{_PREFIX}merges[{index}] must be two tokens with a space between, got {entry!r:.60}."
        )
    return left, right


def _text(metadata, name, *, prefix=_PREFIX, required=False):
    key = prefix + name
    if key not in metadata:
        if required:
            raise ValueError(f"{key} is missing, so the file has no vocabulary.")
        return None
    return _as_str(key, metadata[key])


def _texts(metadata, name):
    key = _PREFIX + name
    if key not in metadata:
        raise ValueError(f"{key} is missing, so the file has no vocabulary.")
    entries = metadata[key]
    if isinstance(entries, str | bytes) or not hasattr(entries, "__len__"):
        raise ValueError(f"{key} must be an array of strings, got {type(entries).__name__}.")
    return [_as_str(key, entry, index) for index, entry in enumerate(entries)]


def _as_str(key, entry, index=None):
    name = key if index is None else f"{key}[{index}]"
    if not isinstance(entry, str | bytes):
        raise ValueError(f"{name} must be a string, got {type(entry).__name__}.")
    try:
        # the container keeps bytes that are no UTF-8 as lone surrogates, which do not encode
        return entry.encode().decode() if isinstance(entry, str) else entry.decode()
    except UnicodeError:
        raise ValueError(f"{name} must be UTF-8 text, got {entry[:32]!r}.") from None


def _integers(name, entries):
    try:
        return tuple(_integer(entry) for entry in entries)
    except TypeError:
        raise ValueError(f"{_PREFIX}{name} must be an array of integers, got {entries!r:.60}.") from None


def _integer(entry):
    if isinstance(entry, bool):
        raise TypeError
    return operator.index(entry)


def _token_id(metadata, name):
    entry = metadata.get(_PREFIX + name)
    try:
        return None if entry is None else _integer(entry)
    except TypeError:
        raise ValueError(f"{_PREFIX}{name} must be an integer, got {entry!r:.60}.") from None


def _flag(metadata, name):
    entry = metadata.get(_PREFIX + name, False)
    if entry not in (False, True):
        raise ValueError(f"{_PREFIX}{name} must be a boolean, got {entry!r:.60}.")
    return bool(entry)
