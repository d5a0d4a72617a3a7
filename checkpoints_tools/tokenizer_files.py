"""The vocabulary of a GGUF file as the files that Hugging Face's libraries read a tokenizer from."""

import json
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models

from mla_jax import pretokenize
from mla_jax.tokenizer import CONTROL, UNKNOWN, UNUSED, USER_DEFINED, Tokenizer, Vocabulary

_PREFIX = "tokenizer.ggml."
_END_FIELDS = ("eos_id", "eot_id", "eom_id")


def tokenizer_files(metadata: Mapping[str, Any], context_length: int) -> dict[str, dict[str, Any]]:
    """Returns `tokenizer.json` and `tokenizer_config.json`, and `generation_config.json` if an end is known.

    The tokenizer gives the ids of `mla_jax.tokenizer`, which are those of ik_llama.cpp. Where special tokens
    overlap in a text, the one that begins first is found, and not the longest.

    Args:
      metadata: key-values of a GGUF file.
      context_length: of the model.

    Returns:
      Name of the file -> the object in it; none if the file has no vocabulary.

    Raises:
      ValueError: if the vocabulary cannot be used; the sentence names the key.
    """
    if f"{_PREFIX}tokens" not in metadata:
        return {}
    tokenizer = Tokenizer(Vocabulary.from_metadata(metadata))
    ids = special_ids(metadata)
    files = {
        "tokenizer.json": _tokenizer(tokenizer),
        "tokenizer_config.json": _tokenizer_config(tokenizer.vocabulary, ids, context_length),
    }
    if "eos_token_id" in ids:
        files["generation_config.json"] = ids
    return files


def special_ids(metadata: Mapping[str, Any]) -> dict[str, int | list[int]]:
    """Returns the ids that configs have: bos, eos, of which there may be several, and pad."""
    vocabulary = Vocabulary.from_metadata(metadata)
    ends = [getattr(vocabulary, field) for field in _END_FIELDS]
    ends = list(dict.fromkeys(token_id for token_id in ends if token_id is not None))
    pad_id = metadata.get(f"{_PREFIX}padding_token_id")
    if type(pad_id) is not int or not 0 <= pad_id < len(vocabulary.tokens):
        pad_id = None
    ids = {
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0] if ends else None,
        "pad_token_id": pad_id,
    }
    return {key: value for key, value in ids.items() if value is not None}


def _tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    vocabulary = tokenizer.vocabulary
    fillers = {f"[PAD{i}]" for i, kind in enumerate(tokenizer.token_types) if kind == UNUSED}
    used = {token: i for i, token in enumerate(vocabulary.tokens) if token not in fillers}
    built = tokenizers.Tokenizer(models.BPE(vocab=used, merges=list(vocabulary.merges)))
    built.pre_tokenizer = pretokenize.pre_tokenizer(vocabulary.pre)
    built.decoder = decoders.ByteLevel()
    added = [
        tokenizers.AddedToken(token, normalized=False, special=kind != USER_DEFINED)
        for token, kind in zip(vocabulary.tokens, tokenizer.token_types, strict=True)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    built.add_tokens(added)
    return json.loads(built.to_str()) | {"post_processor": _post_processor(vocabulary)}


def _post_processor(vocabulary: Vocabulary) -> dict[str, Any] | None:
    """Puts BOS and EOS around a text, each where the vocabulary asks for it."""
    special = {}

    def token(token_id: int) -> dict[str, Any]:
        text = vocabulary.tokens[token_id]
        special[text] = {"id": text, "ids": [token_id], "tokens": [text]}
        return {"SpecialToken": {"id": text, "type_id": 0}}

    before = [token(vocabulary.bos_id)] if vocabulary.add_bos else []
    after = [token(vocabulary.eos_id)] if vocabulary.add_eos else []
    if not special:
        return None
    text = lambda name: [*before, {"Sequence": {"id": name, "type_id": 0}}, *after]
    pair = text("A") + text("B")
    return {"type": "TemplateProcessing", "single": text("A"), "pair": pair, "special_tokens": special}


def _tokenizer_config(
    vocabulary: Vocabulary, ids: Mapping[str, int | list[int]], context_length: int
) -> dict[str, Any]:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": vocabulary.add_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
    }
    for name in ("bos", "eos", "pad"):
        token_id = ids.get(f"{name}_token_id")
        if token_id is not None:
            first = token_id[0] if isinstance(token_id, list) else token_id
            config[f"{name}_token"] = vocabulary.tokens[first]
    if vocabulary.chat_template is not None:
        config["chat_template"] = vocabulary.chat_template
    return config
