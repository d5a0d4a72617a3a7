"""Prefixes and mutations of a small model: a file is refused with one sentence, or it is read as it is.

All that a file says is read and checked; of what is still sound, samples are compared with what the reader of
the `gguf` package finds, and made a tokenizer of.
"""

import collections
import json
import os
import pathlib
import re
import subprocess
import sys

import gguf
import gguf_pieces as pieces
import pytest
from mutations import Mutator

import checkpoints_tools
from checkpoints_tools import GGUFError, gguf_file, hparams, model_file
from mla_jax.tokenizer import Tokenizer

NUM_MUTATIONS, NUM_SEEDS = 100_000, 10
_SAMPLED = 40  # of so many sound mutations, one is looked at more closely
_MAX_SECONDS, _MAX_BYTES = 5, 256 << 20


class _File:
    """A file that is written over and over."""

    def __init__(self, path):
        self.path, self._name = path, str(path)
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT)

    def write(self, data):
        os.pwrite(self._handle, data, 0)
        os.ftruncate(self._handle, len(data))

    def read(self):
        """Returns the container and its vocabulary, or the sentence of its refusal."""
        try:
            file = gguf_file.open_gguf(self.path)
            dict(file.metadata)  # whatever the container holds can be decoded
            config, _ = model_file.check_model(file)
            return file, hparams.vocabulary(file.metadata, config, file.path)
        except GGUFError as error:
            sentence = str(error)
        assert sentence.startswith(self._name) and sentence.endswith(".") and sentence.isprintable(), sentence
        return sentence.removeprefix(self._name)

    def close(self):
        os.close(self._handle)


@pytest.fixture
def scratch(tmp_path):
    file = _File(tmp_path / "any.gguf")
    yield file
    file.close()


@pytest.mark.parametrize("keys", [{}, pieces.LATENT_KEYS], ids=["heads", "latent"])
def test_every_prefix_is_refused(scratch, keys):
    whole = pieces.model(keys)
    scratch.write(whole)
    file, _ = scratch.read()
    needed = max(info.offset + info.num_bytes for info in file.tensors.values())
    for length in [*range(4096), *range(4096, needed, 97), needed - 1]:
        scratch.write(whole[:length])
        assert isinstance(scratch.read(), str), length
    scratch.write(whole[:needed])
    assert not isinstance(scratch.read(), str)


def _agrees_with_the_gguf_package(file):
    """Compares keys, types and tensors; returns False for a file that the package refuses, or cannot name."""
    try:
        theirs = gguf.GGUFReader(file.path)
    except (ValueError, KeyError):
        return False
    keys = {key: field.types[0] for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert {key: field.type for key, field in file.metadata.fields.items()} == keys
    assert list(file.metadata) == list(keys)
    ours = [(info.name, info.shape, info.ggml_type, info.offset) for info in file.tensors.values()]
    assert ours == [
        (t.name, tuple(map(int, t.shape[::-1])), t.tensor_type, t.data_offset) for t in theirs.tensors
    ]
    return True


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_mutations_are_refused_or_read_as_they_are(scratch, seed):
    mutator = Mutator(seed, pieces.LATENT_KEYS if seed % 2 else None)
    kinds, sound, agreed = collections.Counter(), 0, []
    for number in range(NUM_MUTATIONS // NUM_SEEDS):
        scratch.write(mutator())
        try:
            found = scratch.read()
            if isinstance(found, str):
                kinds[re.sub(r"'[^']*'|\d+", "", found)] += 1
                continue
            sound += 1
            if sound % _SAMPLED == 0:
                file, vocabulary = found
                agreed.append(_agrees_with_the_gguf_package(file))
                Tokenizer(vocabulary).encode("abc ab")
        except Exception as error:
            error.add_note(f"mutation {number} of seed {seed}")
            raise
    assert len(kinds) > 80 and sound > 500  # they reach far, and are not all alike
    assert sum(agreed) > 0.8 * len(agreed) > 10


def test_what_is_sound_loads(tmp_path, scratch):
    mutator, num_loaded = Mutator("load"), 0
    for _ in range(200):
        scratch.write(mutator())
        if not isinstance(scratch.read(), str):
            checkpoints_tools.load_gguf(scratch.path)
            num_loaded += 1
    assert num_loaded > 20


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="measures memory as Linux tells it")
def test_time_and_memory_of_bad_files():
    script = pathlib.Path(__file__).with_name("read_and_measure.py")
    process = subprocess.run(
        [sys.executable, script, "300"],
        env=os.environ | {"PYTHONPATH": str(script.parents[2])},
        check=True,
        capture_output=True,
        timeout=600,
        text=True,
    )
    found = json.loads(process.stdout)
    assert len(found) > 500
    slowest, largest = (max(found, key=lambda name: found[name][part]) for part in (0, 1))
    assert found[slowest][0] < _MAX_SECONDS, slowest
    assert found[largest][1] < _MAX_BYTES, largest
