"""A corpus that every machine has: the sources of Python's standard library, and a vocabulary of it."""

import dataclasses
import hashlib
import json
import os
import pathlib
import sysconfig

import numpy as np
import tokenizers

from mla_jax.pretokenize import pre_tokenizer
from mla_jax.tokenizer import CONTROL, NORMAL

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
PRE_TOKENIZER = "deepseek-v3"
_SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",  # Linux distributions leave the tests out
    "tests",
    "idle_test",
    "encodings",  # tables of code points, not code
    "pydoc_data",
}
_HELD_OUT_ONE_IN = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents to train on, and documents never trained on, chosen by the hash of their bytes."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


def read_text(path: str | os.PathLike) -> str:
    """Returns a text file as it is, line ends included.

    Raises:
      ValueError: if it is no UTF-8.
      OSError: if it cannot be read.
    """
    try:
        return pathlib.Path(path).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8, but byte {error.start} is none.") from None


def standard_library(root: pathlib.Path | None = None) -> Corpus:
    """Returns the sources below `root` (the standard library of this Python), one file in 20 held out."""
    root = pathlib.Path(root or sysconfig.get_paths()["stdlib"])
    train, held_out = [], []
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
            continue
        data = path.read_bytes()
        try:
            text = data.decode()
        except UnicodeDecodeError:
            continue
        digest = int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
        (train if digest % _HELD_OUT_ONE_IN else held_out).append(text)
    return Corpus(train=tuple(train), held_out=tuple(held_out))


def train_vocabulary(documents, vocab_size: int) -> tokenizers.Tokenizer:
    """Trains a byte-level BPE of `vocab_size` tokens; ids 0, 1, 2 begin, end and pad a document."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer(PRE_TOKENIZER)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode_documents(tokenizer: tokenizers.Tokenizer, documents) -> np.ndarray:
    """Returns all documents as one stream uint16[tokens], each between a begin and an end token."""
    begin, end = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    encoded = tokenizer.encode_batch(list(documents), add_special_tokens=False)
    return np.concatenate([np.asarray([begin, *e.ids, end], np.uint16) for e in encoded])


def vocabulary_metadata(tokenizer: tokenizers.Tokenizer) -> dict:
    """Returns the `tokenizer.*` key-values of a GGUF file with this vocabulary."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    special = {BOS, EOS, PAD}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": PRE_TOKENIZER,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL if token in special else NORMAL for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": model["vocab"][BOS],
        "tokenizer.ggml.eos_token_id": model["vocab"][EOS],
        "tokenizer.ggml.padding_token_id": model["vocab"][PAD],
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }
