"""Files of examples for fine-tuning: plain text, or JSON lines of texts, prompts and conversations."""

import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from mla_jax import chat, corpus
from mla_jax.finetune import Stream
from mla_jax.tokenizer import Tokenizer

_SHAPES = '{"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [...]}'

_PIECE = 1 << 20  # characters

Example = tuple[list[int], list[int]]  # tokens that are read, and those after them that are learned


def read_stream(path: str | os.PathLike, tokenizer: Tokenizer, template: str | None = None) -> Stream:
    """Reads a file of examples, each ended by the token that ends a text.

    Args:
      path: text in UTF-8, which is one example; or, named `*.jsonl`, an object a line: a "text", a "prompt"
        with a "completion", or "messages" of which the last is the assistant's. Of the latter two the answer
        alone is learned.
      tokenizer: the model's.
      template: the chat template, None for the model's own.

    Raises:
      ValueError: if the file is no UTF-8 or a line is none of these.
      OSError: if the file cannot be read.
    """
    text = corpus.read_text(path)
    if not text.strip():
        raise ValueError(f"{path} must hold something to learn, got an empty file.")
    is_lines = os.fspath(path).endswith(".jsonl")
    examples = _examples(path, text, tokenizer, template) if is_lines else [([], _encode(text, tokenizer))]
    tokens, counts, vocabulary = [], [], tokenizer.vocabulary
    for context, answer in examples:
        end = vocabulary.eos_id if vocabulary.eot_id is None or not context else vocabulary.eot_id
        if end is not None and answer[-1:] != [end]:
            answer = [*answer, end]
        tokens += [*context, *answer]
        counts += [False] * len(context) + [True] * len(answer)
    return Stream(tokens=np.asarray(tokens, np.int32), counts=np.asarray(counts, bool))


def _encode(text, tokenizer):
    """Encodes a text of any length, some whole lines at a time."""
    ids, piece, size = [], [], 0
    for line in [*text.splitlines(keepends=True), None]:
        if line is None or size + len(line) > _PIECE:
            ids += tokenizer.encode("".join(piece), add_special=not ids)
            piece, size = [], 0
        if line is not None:
            piece.append(line)
            size += len(line)
    return ids


def _examples(path, text, tokenizer, template) -> Iterator[Example]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield _example(json.loads(line), tokenizer, template)
        except json.JSONDecodeError as error:
            where = f"{path}, line {number}, column {error.colno}"
            raise ValueError(f"{where}: must be JSON: {error.msg}.") from None
        except RecursionError:
            raise ValueError(f"{path}, line {number}: must be {_SHAPES}, got JSON too deep.") from None
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None


def _example(value: Any, tokenizer: Tokenizer, template: str | None) -> Example:
    fields = value if isinstance(value, dict) else {}
    match fields:
        case {"messages": [*context, {"role": "assistant", "content": str(answer)}]}:
            ids = chat.encode(context, tokenizer, template)
        case {"prompt": str(prompt), "completion": str(answer)}:
            ids = tokenizer.encode(prompt)
        case {"text": str(text)}:
            return [], tokenizer.encode(text)
        case _:
            raise ValueError(f"must be {_SHAPES}, the last message the assistant's, got {value!r:.80}.")
    return ids, tokenizer.encode(answer, add_special=False, parse_special=False)
