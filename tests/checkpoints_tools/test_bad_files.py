"""The crafted files of `crafted`, and every key of a model with every kind of wrong value."""

import collections
import logging
import math
import os
import re
import socket

import crafted
import crafted_containers
import crafted_models
import gguf_pieces as pieces
import pytest
from crafted import TABLE
from gguf_pieces import A, T

import checkpoints_tools
import mla_jax
from checkpoints_tools import GGUFError, check, gguf_file, hparams, model_file

_LONGEST_SENTENCE = 600  # the list of supported pre-tokenizers is in one


def _check_sentence(error, folder, words):
    """Checks that a message is one short sentence that a terminal shows as it is, begun by the file."""
    message = str(error)
    assert re.match(rf"{re.escape(str(folder))}/[^ ]*\.gguf: ", message)
    sentence = message.replace(str(folder), "")
    assert re.search(words, message), message
    assert sentence.isprintable() and sentence.endswith(".") and len(sentence) < _LONGEST_SENTENCE


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "sound.gguf"
    path.write_bytes(pieces.model())
    return model_file.check_model(gguf_file.open_gguf(path))[0]


def test_the_table_has_every_entry_once():
    parts = (
        crafted_containers.CONTAINERS,
        crafted_containers.COSTLY,
        crafted.SPLITS,
        crafted_models.MODELS,
        crafted_models.VOCABULARIES,
    )
    assert len(TABLE) == sum(map(len, parts)) >= 150
    assert {level for level, *_ in TABLE.values()} == {"container", "model", "vocabulary"}
    for name, entry in TABLE.items():
        assert all(len(data) < 1_000_000 for data in entry.files().values()), name


@pytest.mark.parametrize("name", TABLE)
def test_crafted_file(tmp_path, name, config):
    level, words, _ = TABLE[name]
    path = crafted.write(TABLE[name], tmp_path)
    if level == "container":
        for read in (gguf_file.open_gguf, checkpoints_tools.load_gguf, checkpoints_tools.describe):
            with pytest.raises(GGUFError) as caught:
                read(path)
            _check_sentence(caught.value, tmp_path, words)
        return
    file = gguf_file.open_gguf(path)
    description = checkpoints_tools.describe(path)
    if level == "vocabulary":
        with pytest.raises(GGUFError) as caught:
            hparams.vocabulary(file.metadata, config, file.path)
    else:
        assert "cannot be run" in description
        with pytest.raises(GGUFError) as caught:
            checkpoints_tools.load_gguf(path)
    _check_sentence(caught.value, tmp_path, words)
    lines = collections.Counter(line.split()[0] for line in description.splitlines() if line)
    assert all(lines[tensor.split()[0]] for tensor in file.tensors)


@pytest.mark.parametrize("keys", [{}, pieces.LATENT_KEYS], ids=["heads", "latent"])
def test_the_sound_model_that_the_others_break(tmp_path, keys):
    path = tmp_path / "sound.gguf"
    path.write_bytes(pieces.model(keys))
    model = mla_jax.load(path, ctx_size=64)
    assert len(model.generate("abc ab", max_tokens=2, temperature=0.0).tokens) <= 2
    assert "cannot be run" not in checkpoints_tools.describe(path)


def test_what_is_said_of_sound_files_is_short_and_shown_as_it_is(tmp_path, caplog):
    path = tmp_path / "sound.gguf"
    path.write_bytes(pieces.model(tensors={"\x1b[2J\n": ((8,), pieces.F32_TENSOR)}))
    logging.getLogger("absl").propagate = True
    with caplog.at_level(logging.INFO, "absl"):
        checkpoints_tools.load_gguf(path)
    assert r"kept for saving: '\x1b[2J\n'." in caplog.text and "\x1b" not in caplog.text
    path.write_bytes(pieces.model({"general.architecture": pieces.text("\n" * 900_000)}))
    assert len(check.check(path).checked) < 500 and "\n" not in check.check(path).checked


def test_the_whole_way_names_the_file_of_a_bad_vocabulary(tmp_path):
    path = crafted.write(TABLE["token twice"], tmp_path)
    with pytest.raises(GGUFError, match=r"bad\.gguf: tokenizer\.ggml\.tokens must differ from each other"):
        mla_jax.load(path)


def test_the_script_writes_every_file(tmp_path, capsys):
    crafted.main(tmp_path / "all")
    printed = capsys.readouterr().out
    assert printed.count("\n") == len(TABLE) == len(list((tmp_path / "all").iterdir()))
    assert (
        f"{tmp_path / 'all' / 'part-missing' / 'm-00001-of-00002.gguf'}: part missing (container)" in printed
    )


def test_the_sound_container_that_the_others_break(tmp_path):
    path = tmp_path / "sound.gguf"
    rows = [pieces.row("t", (8,)), pieces.row("u", (4,), 0, 32)]
    path.write_bytes(pieces.container([pieces.pair("k", pieces.u32(1))], rows))
    file = gguf_file.open_gguf(path)
    assert dict(file.metadata) == {"k": 1} and list(file.tensors) == ["t", "u"]


@pytest.mark.parametrize("missing", ["absent.gguf", "."], ids=["no file", "folder"])
def test_no_file(tmp_path, missing):
    with pytest.raises(GGUFError, match="cannot be read: "):
        checkpoints_tools.load_gguf(tmp_path / missing)


def test_what_is_no_regular_file_is_neither_waited_for_nor_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    os.mkfifo(tmp_path / "pipe.gguf")
    os.symlink("/dev/zero", tmp_path / "device.gguf")
    for name in ("pipe.gguf", "device.gguf"):
        with pytest.raises(GGUFError, match=rf"{name}: cannot be read: it must be a regular file"):
            gguf_file.open_gguf(tmp_path / name)
    os.symlink("loop.gguf", tmp_path / "loop.gguf")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.gguf")
        for name in ("loop.gguf", "socket.gguf"):
            with pytest.raises(GGUFError, match=rf"{name}: cannot be read: [A-Z]"):
                gguf_file.open_gguf(tmp_path / name)


def test_a_link_to_a_sound_file_is_read(tmp_path):
    (tmp_path / "sound.gguf").write_bytes(pieces.model())
    os.symlink("sound.gguf", tmp_path / "link.gguf")
    file = gguf_file.open_gguf(os.fsencode(tmp_path / "link.gguf"))
    assert file.path == str(tmp_path / "link.gguf") and file.read("output.weight").size == 12 * 8 * 2


WRONG = {
    "missing": None,
    "0": pieces.u32(0),
    "-1": pieces.i32(-1),
    "-2**63": pieces.scalar(pieces.I64, -(2**63)),
    "2**31": pieces.u32(2**31),
    "2**63": pieces.scalar(pieces.U64, 2**63),
    "2**64 - 1": pieces.scalar(pieces.U64, pieces.HUGE),
    "nan": pieces.f32(math.nan),
    "inf": pieces.f64(math.inf),
    "1e300": pieces.f64(1e300),
    "1e-300": pieces.f64(1e-300),
    "1.0": pieces.f32(1.0),
    "true": pieces.boolean(True),
    "false": pieces.boolean(False),
    "text": pieces.text("x"),
    "no text": pieces.text(""),
    "bytes": pieces.text(b"\xff"),
    "no numbers": pieces.numbers(pieces.I32, []),
    "one number": pieces.numbers(pieces.I32, [1]),
    "three numbers": pieces.numbers(pieces.I32, [1, 2, 3]),
    "bools": pieces.numbers(pieces.BOOL, [1, 1]),
    "nans": pieces.numbers(pieces.F32, [math.nan] * 2),
    "texts": pieces.texts(["a", "b"]),
    "no texts": pieces.texts([]),
    "arrays": pieces.array(pieces.ARRAY, 2, pieces.counted("")[:4] + bytes(20)),
}
# Values above that a key may have all the same; where it is missing, its default fits the small model.
SOUND = {
    "general.name": set(WRONG),
    A + "nextn_predict_layers": {"missing", "0"},
    A + "vocab_size": {"missing"},
    A + "attention.head_count_kv": {"missing"},
    A + "rope.freq_base": {"missing", "2**31"},
    A + "rope.scaling.type": {"missing"},
    A + "rope.scaling.factor": {"missing", "0", "1.0"},
    A + "rope.scaling.original_context_length": {"missing"},
    A + "rope.scaling.attn_factor": {"missing", "1.0"},
    A + "rope.scaling.yarn_log_multiplier": {"missing", "0", "1e-300", "1.0"},
    A + "rope.scaling.yarn_beta_fast": {"missing", "1.0"},
    A + "rope.scaling.yarn_beta_slow": {"missing", "1.0"},
    A + "expert_shared_count": {"0"},
    A + "expert_weights_scale": {"1.0"},
    A + "expert_weights_norm": {"missing", "true", "false"},
    A + "expert_gating_func": {"missing", "0"},
    A + "expert_group_count": {"missing", "0"},
    A + "expert_group_used_count": {"missing", "0"},
    T + "pre": {"missing", "no text"},
    T + "token_type": {"missing"},
    T + "merges": {"no numbers", "no texts"},
    T + "bos_token_id": {"0"},
    T + "eos_token_id": {"missing", "0"},
    T + "add_bos_token": {"missing", "0", "1.0", "true", "false"},
    T + "add_eos_token": {"missing", "0", "1.0", "true", "false"},
    "tokenizer.chat_template": {"missing", "text", "no text"},
}
SOUND_LATENT = {A + "rope.scaling.type": {"missing"}, A + "rope.scale_linear": {"missing", "0", "1.0"}}
# Where the sentence names what no longer fits the key instead.
NAMED_ELSEWHERE = {
    ("general.alignment", "missing"): "tensor 'blk.0.attn_q_b.weight' must begin at a multiple of 32",
    (A + "leading_dense_block_count", "0"): "tensor 'blk.0.ffn_gate_inp.weight' of shape",
    (A + "attention.key_length", "missing"): "tensor 'blk.0.attn_q_b.weight' must have shape",
    (A + "attention.value_length", "missing"): "tensor 'blk.0.attn_kv_b.weight' must have shape",
    (T + "tokens", "texts"): "tokenizer.ggml.token_type must have one entry for each of the 2 tokens",
}


NAMED_ELSEWHERE_LATENT = {
    (A + "attention.head_count_kv", "missing"): "tensor 'blk.0.attn_q_b.weight' must have shape",
}
LATENT = {key: value for key, value in pieces.LATENT_KEYS.items() if value is not None}


@pytest.mark.parametrize(
    "base, key, sound",
    [({}, key, SOUND.get(key, set())) for key in pieces.KEYS]
    + [(pieces.LATENT_KEYS, key, SOUND_LATENT.get(key, set())) for key in LATENT],
    ids=[*pieces.KEYS, *(f"latent {key}" for key in LATENT)],
)
def test_every_wrong_value_of_a_key(tmp_path, base, key, sound):
    path, accepted = tmp_path / "bad.gguf", set()
    for name, value in WRONG.items():
        path.write_bytes(pieces.model(base | {key: value}))
        try:
            file = gguf_file.open_gguf(path)
            found, _ = model_file.check_model(file)
            hparams.vocabulary(file.metadata, found, file.path)
            accepted.add(name)
        except GGUFError as error:
            words = (NAMED_ELSEWHERE_LATENT if base else NAMED_ELSEWHERE).get((key, name), key)
            _check_sentence(error, tmp_path, re.escape(words))
    assert accepted == sound


class _Recording(dict):
    """Key-values that remember which were asked for."""

    def __init__(self, values):
        super().__init__(values)
        self.asked = set()

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)


def test_every_key_that_is_read_is_in_the_small_models(tmp_path):
    asked, path = set(), tmp_path / "sound.gguf"
    for keys in ({}, pieces.LATENT_KEYS):
        path.write_bytes(pieces.model(keys))
        file = gguf_file.open_gguf(path)
        values = _Recording(dict(file.metadata))
        hparams.vocabulary(values, hparams.model_config(values, file.tensors))
        asked |= values.asked
    optional_ids = {T + f"{name}_token_id" for name in ("eot", "eom", "fim_pad", "fim_rep", "fim_sep")}
    assert asked - optional_ids <= pieces.KEYS.keys() | pieces.LATENT_KEYS.keys()
    assert len(asked) > 40
