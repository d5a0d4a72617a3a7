"""Tokenizer: by hand on small vocabularies, against a definition of BPE, and against ik_llama.cpp."""

import ctypes
import itertools
import json
import random
import time
import unicodedata

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from mla_jax import pretokenize
from mla_jax.tokenizer import StreamDecoder, Tokenizer, Vocabulary

# GPT-2's printable alphabet of bytes: those one cannot see take the next character from U+0100 on.
_HIDDEN = itertools.count(0x100)
_SEEN = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
BYTES = [chr(byte if byte in _SEEN else next(_HIDDEN)) for byte in range(256)]
BOS, EOS, USER = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>"

AWKWARD = (
    "",
    " ",
    "Hello, world! It's 12345.678 and 1e-7; ok?",
    "中文字符和 mixed 英文abc123、。「引号」",
    "ひらがなカタカナ漢字ー゠〇々〆 一二三",
    "한국어 텍스트 조선글abc ㄱㄴㄷ",
    "👩‍👩‍👧‍👦 👍🏽 🇩🇪🇫🇷 ❤️‍🔥😀😀 #️⃣",
    "1 12 123 1234 12345 1234567890123456789 ٣٤٥ १२३ ½²Ⅷ 3.14159",
    "a1b2c3 abc123def 0x7f 1st 2nd x2y",
    "   leading and trailing   ",
    "a b  c   d    e\t\tf \t g",
    "tabs\t\tand\nnew\r\nlines\r\r\n\n  \n   x\n\n\n",
    " \n \r\n\t\n",
    "nbsp\u00a0here\u00a0\u00a0two \u2003em\u2009thin\u3000ideographic\u3000\u3000end",
    "中\u3000文\u2028line\u2029para\u0085next\u000bvt\u000cff\u001cfs",
    "e\u0301a\u0308 Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A \u0301start नमस्ते สวัสดีครับ",
    "Привет, мир! Ёлка ЩЫ γειά σου Κόσμε שלום עולם مرحبا بالعالم ١٢٣",
    "Ǆǅǆ ﬁﬂ ß ẞ ı İ ſ µ ʔ Ａｂｃ１２３！ Ωμέγα Åſ K",
    "def f(x: int) -> str:\n    return f'{x!r:>{10}}'  # ~~ ok\n\tif a&&b||c: x<<=2\n",
    "cd ~/src && ls -la ~ ~x ~é !~ a~b ~~~ `tick` ^caret^ $HOME + - = < > |",
    "I'm you're he'd she'll we've it's o'clock 'tis DON'T I'M YOU'RE WE'LL 'S 'LL'VE x'sy",
    "helloWorld HTTPServer camelCaseXML snake_case __init__ kebab-case a.b.c a/b\\c",
    f"{USER}hi{BOS}{EOS}<think>deep</think> <thinking> <｜User｜ > <unk> <｜fim▁hole｜><｜Us",
    "<think><think></think>  </think>\n<think>",
    "\u200b\u200d\ufeff\ufffd\u00ad\ue000\U000f0000 x\x00y\x01\x7f",
    "a" * 300 + " " * 300 + "x" + "1" * 100 + "\n" * 50 + "中" * 100 + "_" * 100 + "~" * 9 + "é" * 99,
    "“quotes” ‘single’ — dash… •bullet ©®™ €£¥ ±×÷ ∑∫√ →⇒ ■□ ¿¡ « »",
)


def small_vocabulary(**changes):
    """Ids: 0 BOS, 1 EOS, 2 + byte, then merges in rank order, then a control and a user-defined token."""
    merges = [
        ("h", "e"),
        ("l", "l"),
        ("he", "ll"),
        ("hell", "o"),
        ("Ġ", "w"),
        ("1", "2"),
        ("12", "3"),
        ("3", "4"),
    ]
    tokens = (BOS, EOS, *BYTES, *(a + b for a, b in merges), USER, "<think>")
    fields = dict(
        tokens=tokens,
        token_types=(3, 3, *(1,) * (256 + len(merges)), 3, 4),
        merges=tuple(merges),
        pre="deepseek-v3",
        bos_id=0,
        eos_id=1,
        add_bos=True,
    )
    return Vocabulary(**fields | changes)


def trained_vocabulary(pre):
    """BPE trained on AWKWARD without cutting it into pieces, so that merges cross every kind of border."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(vocab_size=2000, show_progress=False, initial_alphabet=sorted(BYTES))
    texts = [text for text in AWKWARD if "<think" not in text]  # a token must not be there twice
    bpe.train_from_iterator([part for text in texts for part in (text, text[1::2], text[::2])] * 2, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    special = {
        BOS: 3,
        EOS: 3,
        USER: 3,
        "<think>": 4,
        "</think>": 4,
        "<thinking>": 4,
        "<unk>": 2,
        "<|im_end|>": 1,
    }
    special |= {
        "<｜fim▁hole｜>": 3,
        "<｜fim": 4,
        "[PAD]": 3,
        "<|eom_id|>": 3,
        "<|not_known|>": 3,
        "[unused]": 5,
    }
    words = sorted(bpe.get_vocab(), key=bpe.get_vocab().get)
    return Vocabulary(
        tokens=(*special, *words),
        token_types=(*special.values(), *(1,) * len(words)),
        merges=tuple(merges),
        pre=pre,
        bos_id=0,
        eos_id=1,
        add_bos=True,
        add_eos=pre == "glm4",
    )


def merge_by_rank(symbols, rank):
    """The definition of BPE: join the leftmost pair of the lowest rank until no pair has one."""
    symbols = list(symbols)
    while len(symbols) > 1:
        ranks = [rank(left, right) for left, right in itertools.pairwise(symbols)]
        best = min(range(len(ranks)), key=ranks.__getitem__)
        if ranks[best] == np.inf:
            break
        symbols[best : best + 2] = [symbols[best] + symbols[best + 1]]
    return symbols


def metadata(**changes):
    """GGUF keys of `small_vocabulary`; a change of None takes the key away."""
    vocabulary = small_vocabulary()
    keys = dict(
        model="gpt2",
        pre="deepseek-v3",
        tokens=[token.encode() for token in vocabulary.tokens],
        token_type=np.array(vocabulary.token_types, np.int32),
        merges=[" ".join(pair) for pair in vocabulary.merges],
        bos_token_id=np.uint32(0),
        eos_token_id=1,
        add_bos_token=np.bool_(True),
    )
    keys |= changes
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


def plain(text):
    return [2 + byte for byte in text.encode()]


@pytest.mark.parametrize(
    "text, ids",
    [
        ("", []),
        ("hello", [261]),
        ("hello world", [261, 262, *plain("orld")]),
        ("helo", [258, *plain("lo")]),
        ("1234", [264, *plain("4")]),
        ("234", [*plain("2"), 265]),
        ("é~", plain("é~")),
        (f"{USER}he<think>", [266, 258, 267]),
        (f"{USER}{BOS}{USER}", [266, 0, 266]),
        ("<｜User", plain("<｜User")),
    ],
)
def test_encodes_to_the_ids_found_by_hand(text, ids):
    tokenizer = Tokenizer(small_vocabulary())
    assert tokenizer.encode(text, add_special=False) == ids
    assert tokenizer.encode(text) == [0, *ids]
    assert Tokenizer(small_vocabulary(add_eos=True)).encode(text) == [0, *ids, 1]


def test_control_tokens_are_text_unless_parsed_and_user_defined_ones_never():
    ids = Tokenizer(small_vocabulary()).encode(f"{USER}<think>", add_special=False, parse_special=False)
    assert ids == [*plain(USER), 267]


@pytest.mark.parametrize("name", pretokenize.NAMES)
def test_equals_the_definition_of_bpe(name):
    vocabulary = trained_vocabulary(name)
    tokenizer = Tokenizer(vocabulary)
    ranks = {pair: rank for rank, pair in enumerate(vocabulary.merges)}
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    for text in AWKWARD:
        if "<" not in text:
            pieces = pretokenize.pre_tokenizer(name).pre_tokenize_str(text)
            expected = [
                ids[symbol]
                for piece, _ in pieces
                for symbol in merge_by_rank(piece, lambda *pair: ranks.get(pair, np.inf))
            ]
            assert tokenizer.encode(text, add_special=False) == expected, text[:60]


def test_merges_of_kimi_follow_from_the_order_of_its_tokens():
    rng = random.Random(0)
    words = {"".join(rng.choices("ab c", k=rng.randint(2, 7))).replace(" ", "Ġ") for _ in range(60)}
    tokens = [*BYTES, *sorted(words, key=lambda word: (len(word), word))]
    rank = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(Vocabulary.from_metadata(
        {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "kimi-k2", "tokenizer.ggml.tokens": tokens}
    ))  # fmt: skip
    for _ in range(200):
        text = "".join(rng.choices("abc", k=rng.randint(1, 12)))
        expected = merge_by_rank(text, lambda left, right: rank.get(left + right, np.inf))
        assert [tokenizer.vocabulary.tokens[i] for i in tokenizer.encode(text)] == expected, text


@pytest.mark.parametrize("name", pretokenize.NAMES)
def test_decoding_gives_back_the_text(name):
    tokenizer = Tokenizer(trained_vocabulary(name))
    for text in AWKWARD:
        ids = tokenizer.encode(text, parse_special=False)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(tokenizer.encode(text, add_special=False), skip_special=False) == text


def test_every_byte_has_its_token():
    tokenizer = Tokenizer(small_vocabulary())
    assert b"".join(tokenizer.token_bytes(2 + byte) for byte in range(256)) == bytes(range(256))
    assert tokenizer.token_bytes(266) == USER.encode()
    assert tokenizer.decode([0, 266, 261, 267]) == "hello<think>"
    assert tokenizer.decode([0, 266, 261], skip_special=False) == f"{BOS}{USER}hello"


@pytest.mark.parametrize(
    "data",
    [
        "a😀b".encode(),
        b"\xf0\x9f\x98",
        b"\xff\xfea",
        b"\xe4\xb8x",
        b"\xf0\x9f\x98\xf0\x9f\x98\x80",
        b"\x80ok\xc3",
    ],
)
def test_streamed_text_is_whole_characters_and_adds_up(data):
    tokenizer = Tokenizer(small_vocabulary())
    decoder = StreamDecoder(tokenizer)
    parts = [decoder.feed(2 + byte) for byte in data]
    assert (
        "".join(parts) + decoder.flush()
        == data.decode("utf-8", "replace")
        == tokenizer.decode(plain_bytes(data))
    )
    assert decoder.flush() == ""


def plain_bytes(data):
    return [2 + byte for byte in data]


def test_a_split_emoji_is_held_back():
    decoder = StreamDecoder(Tokenizer(small_vocabulary()))
    assert [decoder.feed(2 + byte) for byte in "😀".encode()] == ["", "", "", "😀"]
    assert [decoder.feed(0), decoder.feed(266), decoder.feed(267)] == ["", "", "<think>"]
    assert [decoder.feed(2 + 0xF0), decoder.flush(), decoder.feed(2 + 0x61)] == ["", "\ufffd", "a"]


def test_ends_of_generation_are_found_by_id_and_by_text():
    tokens = ("a", "<|im_end|>", "[PAD]", "stop", EOS, "<|user|>", "<|file_sep|>", "x")
    vocabulary = Vocabulary(
        tokens=tokens,
        token_types=(1, 1, 3, 3, 3, 3, 3, 1),
        merges=(),
        pre="glm4",
        eos_id=3,
        eot_id=5,
        fim_sep_id=7,
    )
    tokenizer = Tokenizer(vocabulary)
    assert tokenizer.eog_ids == {1, 2, 3, 4, 5, 7}
    assert tokenizer.decode([0, 1, 0]) == "aa"  # known to be a control token, though its type says normal


def test_vocabulary_reads_every_key():
    keys = metadata(add_eos_token=True, eot_token_id=266, fim_pad_token_id=3)
    keys["tokenizer.chat_template"] = b"{{ messages }}"
    expected = small_vocabulary(add_eos=True, eot_id=266, fim_pad_id=3, chat_template="{{ messages }}")
    assert Vocabulary.from_metadata(keys) == expected
    assert hash(expected) == hash(Vocabulary.from_metadata(keys))
    assert Vocabulary.from_metadata(metadata(pre=None)).pre == "default"
    assert set(Vocabulary.from_metadata(metadata(token_type=None)).token_types) == {1}


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(model=None), "tokenizer.ggml.model is missing"),
        (dict(model="llama"), "model must be 'gpt2'.*got 'llama'"),
        (dict(model=3), "model must be a string, got int"),
        (dict(pre="qwen2"), "pre must be one of deepseek-llm, .*got 'qwen2'"),
        (dict(tokens=None), "tokenizer.ggml.tokens is missing"),
        (dict(tokens=[], token_type=[], merges=[]), "tokens must not be empty"),
        (dict(tokens="abc"), "tokens must be an array"),
        (dict(tokens=["a", 3]), r"tokens\[1\] must be a string, got int"),
        (dict(tokens=[b"a", b"\xff"]), r"tokens\[1\] must be UTF-8"),
        (dict(tokens=["a", "\udcff"]), r"tokens\[1\] must be UTF-8"),
        (dict(token_type=[1, 1]), "token_type must have one entry for each of the 268"),
        (dict(token_type=["x"] * 268), "token_type must be an array of integers"),
        (dict(merges=None), "merges is missing"),
        (dict(merges=["h e", "he"]), r"merges\[1\] must be two tokens.*got 'he'"),
        (dict(merges=["h e l"]), r"merges\[0\] must be two tokens"),
        (dict(merges=[" e"]), r"merges\[0\] must be two tokens"),
        (dict(bos_token_id=268), r"bos_token_id must be in \[0, 268\), got 268"),
        (dict(token_type=[True] * 268), "token_type must be an array of integers, got .True"),
        (dict(token_type=7), "token_type must be an array of integers, got 7"),
        (dict(token_type=[1] * 267 + [7]), r"token_type\[267\] must be in \[0, 6\], got 7"),
        (dict(eos_token_id="1"), "eos_token_id must be an integer, got '1'"),
        (dict(eos_token_id=True), "eos_token_id must be an integer, got True"),
        (dict(eos_token_id=[1]), r"eos_token_id must be an integer, got \[1\]"),
        (dict(bos_token_id=None), "bos_token_id must be given"),
        (dict(add_eos_token=True, eos_token_id=None), "eos_token_id must be given"),
        (dict(add_bos_token="yes"), "add_bos_token must be a boolean"),
    ],
)
def test_bad_metadata_is_refused_with_the_key(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        Vocabulary.from_metadata(metadata(**changes))


@pytest.mark.parametrize(
    "fields, sentence",
    [
        (dict(tokens=("a", "b", "a"), merges=()), "tokens must differ from each other, got 'a' 2 times"),
        (
            dict(tokens=("a", "b", "c"), merges=(("a", "b"),)),
            r"merges\[0\] must join two tokens to a third, got 'a' and 'b'",
        ),
    ],
)
def test_a_vocabulary_that_makes_no_tokenizer_is_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        Tokenizer(Vocabulary(token_types=(1, 1, 1), pre="deepseek-v3", **fields))


def test_text_and_ids_outside_the_vocabulary_are_refused():
    tokenizer = Tokenizer(small_vocabulary())
    with pytest.raises(ValueError, match=r"lone surrogate U\+D83D at position 2"):
        tokenizer.encode("ab\ud83d")
    with pytest.raises(ValueError, match="at most 2097152 characters, got 2097153"):
        tokenizer.encode(" " * 2097153)
    for token_id in (-1, 268, 2**40):
        with pytest.raises(ValueError, match=rf"token id must be in \[0, 268\), got {token_id}"):
            tokenizer.decode([token_id])
    few = Tokenizer(Vocabulary(tokens=("a", "b"), token_types=(1, 1), merges=(), pre="deepseek-v3"))
    with pytest.raises(ValueError, match="byte 0x7A"):
        few.encode("abz")


@pytest.mark.parametrize("unit", ["a", " ", "_", "中", "\r "])
def test_long_runs_take_linear_time(unit):
    for name in ("deepseek-llm", "deepseek-v3"):
        tokenizer = Tokenizer(small_vocabulary(pre=name))
        start = time.process_time()
        assert len(tokenizer.encode(unit * 100_000 + "1")) == 2 + 100_000 * len(unit.encode())
        assert time.process_time() - start < 15  # under 1 s; a minute where each place is tried anew


class Peer:
    """The vocabulary of a GGUF file in ik_llama.cpp."""

    def __init__(self, path):
        self.api = pytest.importorskip("ik_llama_cpp._ctypes_api", reason="needs the extra `peers`")
        self.api.llama_backend_init()
        params = self.api.llama_model_default_params()
        params.vocab_only = True
        self.model = self.api.llama_model_load_from_file(str(path).encode(), params)

    def encode(self, text, add_special, parse_special):
        data = text.encode()
        ids = (self.api.llama_token * (len(data) + 2))()
        count = self.api.llama_tokenize(
            self.model, data, len(data), ids, len(ids), add_special, parse_special
        )
        return ids[:count]

    def token_bytes(self, token_id, special):
        text = ctypes.create_string_buffer(1 << 14)
        count = self.api.llama_token_to_piece(self.model, token_id, text, len(text), 0, special)
        return text.raw[:count]


@pytest.fixture(scope="module", params=pretokenize.NAMES)
def peer_and_tokenizer(request, tmp_path_factory):
    pytest.importorskip("ik_llama_cpp", reason="needs the extra `peers`")
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.gguf"
    vocabulary = trained_vocabulary(request.param)
    write_vocabulary(path, vocabulary)
    return Peer(path), Tokenizer(vocabulary)


def write_vocabulary(path, vocabulary):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "deepseek2")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_leading_dense_block_count(1)
    writer.add_q_lora_rank(16)
    writer.add_kv_lora_rank(16)
    writer.add_expert_feed_forward_length(16)
    writer.add_expert_shared_count(1)
    writer.add_expert_weights_scale(1.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.token_types)
    writer.add_token_merges([" ".join(pair) for pair in vocabulary.merges])
    writer.add_bos_token_id(vocabulary.bos_id)
    writer.add_eos_token_id(vocabulary.eos_id)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.peer
@pytest.mark.parametrize("parse_special", [False, True])
def test_equals_the_peer_on_awkward_text(peer_and_tokenizer, parse_special):
    peer, tokenizer = peer_and_tokenizer
    for text in AWKWARD:
        expected = peer.encode(text, True, parse_special)
        assert tokenizer.encode(text, parse_special=parse_special) == expected, text[:60]


@pytest.mark.peer
def test_equals_the_peer_on_random_text(peer_and_tokenizer):
    """Characters of Unicode 3.2: those of Unicode 16 (2024) are not in ik_llama.cpp's tables, and differ."""
    peer, tokenizer = peer_and_tokenizer
    rng = random.Random(7)
    assigned = [
        chr(c) for c in range(1, 0x30000) if unicodedata.ucd_3_2_0.category(chr(c)) not in ("Cn", "Cs")
    ]
    common = sorted(set("".join(AWKWARD)) - {"\0"}) + list(" \n\r\t'~12ab中") * 20
    for count in range(400):
        pool = common if count % 2 else [*rng.choices(assigned, k=40), *" \na1!~"]
        text = "".join(rng.choices(pool, k=rng.randint(1, 60)))
        assert tokenizer.encode(text, add_special=False) == peer.encode(text, False, True), ascii(text)


@pytest.mark.peer
def test_equals_the_peer_in_tokens_and_ends_of_generation(peer_and_tokenizer):
    peer, tokenizer = peer_and_tokenizer
    ids = range(len(tokenizer.vocabulary.tokens))
    assert [tokenizer.decode([i]) for i in ids] == [
        peer.token_bytes(i, False).decode("utf-8", "replace") for i in ids
    ]
    assert tokenizer.eog_ids == {i for i in ids if peer.api.llama_token_is_eog(peer.model, i)}
