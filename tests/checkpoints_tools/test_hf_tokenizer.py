"""Tokenizers of checkpoints come out of a GGUF file encoding as they did."""

import base64
import functools
import itertools
import json
import re

import pytest
import tokenizers
from hf_folder import write_json
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from checkpoints_tools import GGUFError
from checkpoints_tools.gguf_metadata import Metadata
from checkpoints_tools.hf_tokenizer import tokenizer_metadata
from mla_jax import pretokenize
from mla_jax.tokenizer import BYTE_CHARACTERS, Tokenizer, Vocabulary

BOS, EOS, USER = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>"
VOCAB_SIZE = 700

# As published; how ik_llama.cpp's of the same name differ is told in mla_jax/pretokenize.py.
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
GLM = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
)
QWEN = (GLM[0].replace("{1,3}", ""),)
DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{pretokenize._ranges(pretokenize._CASED_LETTERS)}]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    "[一-龥ࠀ-一가-퟿]+",
)
PATTERNS = {"deepseek-v3": DEEPSEEK_V3, "glm4": GLM, "deepseek-llm": DEEPSEEK_LLM}
TEXTS = (
    "",
    "Hello, world! It's 12345.678 and 1e-7; ok?\n\n  new\r\nlines  ",
    "中文字符和 mixed 英文abc123「引号」 ひらがなカタカナ 한국어",
    f"{BOS}{USER}What is 2 + 2?<think>four</think>{EOS}",
    "def f(x: int) -> str:\n    return f'{x!r:>10}'  # ok\n\tif a&&b||c: x<<=2\n",
    "Привет, мир! Ωμέγα café 👍 \u200b x\x00y",
    "the theory of the other thing and that there",
)


def _train(patterns, *, digits=False):
    splits = [pre_tokenizers.Split(tokenizers.Regex(regex), "isolated") for regex in patterns]
    splits += [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    found = tokenizers.Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    found.train_from_iterator(
        ["the thing that there 1234 12 中文 hello wórld\n\n"] * 9 + list(TEXTS), trainer
    )
    found.add_tokens(["<think>", "</think>", USER])
    return found


@functools.cache
def trained(name):
    return _train(PATTERNS[name], digits=name == "deepseek-llm")


def write(folder, tokenizer, **config):
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", dict(bos_token=BOS, eos_token=dict(content=EOS)) | config)


@pytest.mark.parametrize("name", PATTERNS)
def test_texts_are_encoded_as_by_the_checkpoint(tmp_path, name):
    reference = trained(name)
    write(tmp_path, reference, add_bos_token=True)
    values = tokenizer_metadata(tmp_path, VOCAB_SIZE)
    assert values["tokenizer.ggml.pre"] == name
    found = Tokenizer(Vocabulary.from_metadata(values))
    for text in TEXTS:
        ids = reference.encode(text).ids
        assert found.encode(text, add_special=False) == ids
        assert found.encode(text) == [0, *ids]
        assert found.decode(ids, skip_special=False) == text


def test_ids_without_a_token_are_filled(tmp_path):
    write(tmp_path, trained("glm4"))
    values = tokenizer_metadata(tmp_path, VOCAB_SIZE)
    tokens, types = (values[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    size = trained("glm4").get_vocab_size()
    assert len(tokens) == len(types) == VOCAB_SIZE
    assert tokens[size:] == [f"[PAD{token_id}]" for token_id in range(size, VOCAB_SIZE)]
    assert set(types[size:]) == {5}
    assert types[:2] == [3, 3] and set(types[2 : size - 3]) == {1}
    assert types[size - 3 : size] == [4, 4, 3]  # <think>, </think> and what looks like a control token


@pytest.mark.parametrize("name", pretokenize.NAMES)
def test_every_pre_tokenizer_known_here_is_found(tmp_path, name):
    tokenizer = trained("glm4")
    declared, tokenizer.pre_tokenizer = tokenizer.pre_tokenizer, pretokenize.pre_tokenizer(name)
    write(tmp_path, tokenizer)
    tokenizer.pre_tokenizer = declared
    found = tokenizer_metadata(tmp_path, VOCAB_SIZE)["tokenizer.ggml.pre"]
    assert found == ("glm4" if name == "chatglm-bpe" else name)  # one expression under two names


def test_how_digits_are_cut_matters_where_tokens_hold_several(tmp_path):
    write(tmp_path, _train(QWEN))
    assert tokenizer_metadata(tmp_path, VOCAB_SIZE)["tokenizer.ggml.pre"] == "glm4"
    tokenizer = _train(GLM)
    tokenizer.pre_tokenizer = _train(QWEN).pre_tokenizer
    write(tmp_path, tokenizer)
    with pytest.raises(GGUFError, match="'pre_tokenizer' must cut text like one of deepseek-llm"):
        tokenizer_metadata(tmp_path, VOCAB_SIZE)


@pytest.mark.parametrize(
    "config, in_template, adds_bos",
    [
        (dict(), False, False),
        (dict(), True, True),
        (dict(add_bos_token=False), True, False),
        (dict(add_bos_token=True), False, True),
        (dict(bos_token=EOS), True, False),
    ],
)
def test_whether_texts_begin_with_bos(tmp_path, config, in_template, adds_bos):
    tokenizer = tokenizers.Tokenizer.from_str(trained("glm4").to_str())
    if in_template:
        template = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template])
    write(tmp_path, tokenizer, **config)
    values = tokenizer_metadata(tmp_path, VOCAB_SIZE)
    assert values["tokenizer.ggml.add_bos_token"] is adds_bos
    assert values["tokenizer.ggml.add_eos_token"] is False


def test_all_tokens_that_end_a_generation_are_named(tmp_path):
    """GLM has three in its configs, of which one is the eos; Kimi's configs differ."""
    write(tmp_path, trained("glm4"), pad_token=EOS, unk_token=None)
    write_json(tmp_path / "generation_config.json", dict(eos_token_id=[1, 600]))
    write_json(tmp_path / "config.json", dict(eos_token_id=[600, 1, 602]))
    values = tokenizer_metadata(tmp_path, VOCAB_SIZE)
    ids = {key: value for key, value in values.items() if key.endswith("_id")}
    names = {"bos": 0, "eos": 1, "padding": 1, "eot": 600, "eom": 602}
    assert ids == {f"tokenizer.ggml.{name}_token_id": token_id for name, token_id in names.items()}


def test_the_end_may_be_in_the_configs_alone(tmp_path):
    write(tmp_path, trained("glm4"), eos_token=None)
    write_json(tmp_path / "config.json", dict(eos_token_id=600))
    values = tokenizer_metadata(tmp_path, VOCAB_SIZE)
    assert values["tokenizer.ggml.eos_token_id"] == 600 and "tokenizer.ggml.eot_token_id" not in values


@pytest.mark.parametrize(
    "files, template",
    [
        ({}, None),
        ({"tokenizer_config.json": dict(chat_template="own")}, "own"),
        ({"tokenizer_config.json": dict(chat_template=[dict(name="tool_use", template="t")])}, None),
        ({"tokenizer_config.json": dict(chat_template=[dict(name="default", template="d")])}, "d"),
        ({"tokenizer_config.json": dict(chat_template=[dict(name=["default"], template="d")])}, None),
        ({"chat_template.json": dict(chat_template="file")}, "file"),
        ({"tokenizer_config.json": dict(chat_template="own"), "chat_template.jinja": "{{ a }}é"}, "{{ a }}é"),
    ],
)
def test_chat_templates(tmp_path, files, template):
    write(tmp_path, trained("glm4"))
    for name, content in files.items():
        if isinstance(content, dict):
            write_json(tmp_path / name, content)
        else:
            (tmp_path / name).write_text(content, encoding="utf-8")
    assert tokenizer_metadata(tmp_path, VOCAB_SIZE).get("tokenizer.chat_template") == template


def test_a_tokenizer_without_merges(tmp_path):
    _broken(model=dict(merges=[]))(tmp_path)
    values = Metadata.of(tokenizer_metadata(tmp_path, VOCAB_SIZE))
    assert values["tokenizer.ggml.merges"] == [] and values.fields["tokenizer.ggml.merges"].count == 0


def test_a_folder_may_have_no_tokenizer(tmp_path):
    assert tokenizer_metadata(tmp_path, VOCAB_SIZE) == {}


def _write_ranks(folder, words):
    """Writes Kimi's form of a tokenizer: bytes, then words by rank, then special tokens."""
    ranked = [bytes([byte]) for byte in range(256)] + [word.encode() for word in words]
    lines = [base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(ranked)]
    (folder / "tiktoken.model").write_bytes(b"".join(lines))
    special = {"[BOS]": True, "[EOS]": True, "<think>": False, "<|im_user|>": False}
    added = {
        str(len(ranked) + index): dict(content=text, special=is_special)
        for index, (text, is_special) in enumerate(special.items())
    }
    config = dict(added_tokens_decoder=added, bos_token="[BOS]", eos_token="[EOS]")
    write_json(folder / "tokenizer_config.json", config)
    return {token: rank for rank, token in enumerate(ranked)}


def _merge_by_rank(ranks, piece):
    """Definition of tiktoken: whole pieces first, then the pair that joins to the lowest rank."""
    if piece in ranks:
        return [ranks[piece]]
    parts = [bytes([byte]) for byte in piece]
    while True:
        joined = [ranks.get(left + right) for left, right in itertools.pairwise(parts)]
        best = min((rank for rank in joined if rank is not None), default=None)
        if best is None:
            return [ranks[part] for part in parts]
        at = joined.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_ranks_of_kimi_become_merges(tmp_path):
    words = "th he the in ing hin thing at an and ther there 12 123 中 文 中文".split()
    ranks = _write_ranks(tmp_path, words)
    size = len(ranks)
    values = tokenizer_metadata(tmp_path, size + 300)
    assert values["tokenizer.ggml.pre"] == "kimi-k2" and not values["tokenizer.ggml.add_bos_token"]
    found = Tokenizer(Vocabulary.from_metadata(values))
    for word in ["thing", "theand", "hing", "thather", "12312", "中文中", "anthere", "x"]:
        assert found.encode(word) == _merge_by_rank(ranks, word.encode())
    assert found.encode("[BOS]the<think>a<|im_user|>") == [size, ranks[b"the"], size + 2, 97, size + 3]
    tokens, types = (values[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    assert tokens[65] == "A" and tokens[32] == BYTE_CHARACTERS[32] == "Ġ"
    assert types[size : size + 4] == [3, 3, 4, 3]
    assert tokens[size + 255] == f"<|reserved_token_{size + 255}|>" and types[size + 255] == 3
    assert tokens[size + 256] == f"[PAD{size + 256}]" and types[size + 256] == 5


def _broken(**changes):
    def make(folder):
        content = json.loads(trained("glm4").to_str())
        content["model"] |= changes.pop("model", {})
        write_json(folder / "tokenizer.json", content | changes)

    return make


def _ranks(text):
    return lambda folder: (folder / "tiktoken.model").write_bytes(text)


def _config(**config):
    return lambda folder: write(folder, trained("glm4"), **config)


def _sentencepiece(folder):
    (folder / "tokenizer.model").write_bytes(b"\n")


def _template(folder):
    write(folder, trained("glm4"))
    (folder / "chat_template.jinja").write_bytes(b"\xff")


BAD = {
    "no JSON": (lambda folder: (folder / "tokenizer.json").write_bytes(b"{"), "must be a JSON object"),
    "a folder for a file": (lambda folder: (folder / "tokenizer.json").mkdir(), "Is a directory"),
    "SentencePiece": (_sentencepiece, "must come with a tokenizer.json"),
    "another model": (_broken(model=dict(type="Unigram")), "must be byte-level BPE"),
    "byte fallback": (_broken(model=dict(byte_fallback=True)), "must be byte-level BPE"),
    "no vocabulary": (_broken(model=dict(vocab=None)), "'model.vocab'"),
    "an id out of range": (
        _broken(model=dict(vocab={"a": 10**6})),
        r"token 'a' must have an id in \[0, 700\)",
    ),
    "an id of no integer": (_broken(model=dict(vocab={"a": 1.0})), "token 'a' must have an id"),
    "a merge of one": (_broken(model=dict(merges=["ab"])), r"'model.merges\[0\]' must be two tokens"),
    "a merge of three": (_broken(model=dict(merges=[["a", "b", "c"]])), r"'model.merges\[0\]' must be two"),
    "a merge to no token": (_broken(model=dict(merges=["q q"])), "must join two tokens to a third"),
    "an id with two texts": (_broken(added_tokens=[dict(id=2, content="x")]), "token 2 must have one text"),
    "a token twice": (_broken(added_tokens=[dict(id=650, content="a")]), "must differ from each other"),
    "an added token of no text": (_broken(added_tokens=[dict(id=650)]), "an added token must have an id"),
    "no pre-tokenizer": (_broken(pre_tokenizer=None), "'pre_tokenizer' is missing"),
    "an unknown pre-tokenizer": (_broken(pre_tokenizer=dict(type="Magic")), "'pre_tokenizer' cannot be used"),
    "another pre-tokenizer": (_broken(pre_tokenizer=dict(type="Whitespace")), "must cut text like one of"),
    "a bos that is no token": (_config(bos_token="<nowhere>"), "key 'bos_token' must be a token"),
    "a bos of no text": (_config(bos_token=3), "key 'bos_token' must be a token"),
    "no bos to add": (_config(bos_token=None, add_bos_token=True), "bos_token_id must be given"),
    "a flag of no bool": (_config(add_bos_token="yes"), "key 'add_bos_token' must be true or false"),
    "a template of no text": (_config(chat_template=7), "key 'chat_template' must be a text"),
    "a template that is no UTF-8": (_template, "must be UTF-8"),
    "added tokens of no object": (
        _config(added_tokens_decoder=[1]),
        "'added_tokens_decoder' must be an object",
    ),
    "an added id of no number": (
        _config(added_tokens_decoder={"x": {"content": "y"}}),
        "token 'y' must have an id",
    ),
    "ranks that are no base64": (_ranks(b"!! 0\n"), "line 1 must be base64 of bytes and the rank 0"),
    "ranks in disorder": (_ranks(b"YQ== 0\nYg== 2\n"), "line 2 must be base64 of bytes and the rank 1"),
    "ranks without a rank": (_ranks(b"YQ==\n"), "line 1 must be base64"),
    "a rank of nothing": (_ranks(b" 0\n"), "line 1 must be base64"),
    "ranks that join in too many ways": (
        _ranks(b"".join(base64.b64encode(b"a" * (rank + 1)) + b" %d\n" % rank for rank in range(200))),
        "merges must be given",
    ),
    "bytes twice": (_ranks(b"YQ== 0\nYQ== 1\n"), "must differ from each other"),
}


@pytest.mark.parametrize("make, message", BAD.values(), ids=BAD)
def test_bad_tokenizers_are_refused_in_a_sentence(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(GGUFError, match=message) as caught:
        tokenizer_metadata(tmp_path, VOCAB_SIZE)
    assert re.fullmatch(rf"{re.escape(str(tmp_path))}[^\n]{{10,500}}\.", str(caught.value))


def test_more_tokens_than_rows_of_the_embedding(tmp_path):
    write(tmp_path, trained("glm4"))
    with pytest.raises(GGUFError, match=r"must have an id in \[0, 400\), the vocabulary of config.json"):
        tokenizer_metadata(tmp_path, 400)
