"""The corpus of a made-up library, and its vocabulary on the way into a GGUF file and back."""

import numpy as np
import pytest

from mla_jax import corpus
from mla_jax.tokenizer import CONTROL, Tokenizer, Vocabulary

SIZE = 300
DOCUMENTS = [f"def f_{i}(value):\n    return value + {i}  # größer\n" for i in range(40)]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    root = tmp_path_factory.mktemp("library")
    for i in range(300):
        folder = root / f"package_{i % 3}"
        folder.mkdir(exist_ok=True)
        (folder / f"module_{i}.py").write_text(f"VALUE = {i}\n")
    return root


@pytest.fixture(scope="module")
def vocabulary():
    return corpus.train_vocabulary(DOCUMENTS, SIZE)


def test_every_source_is_on_one_side(library):
    split = corpus.standard_library(library)
    assert sorted([*split.train, *split.held_out]) == sorted(f"VALUE = {i}\n" for i in range(300))
    assert not set(split.train) & set(split.held_out)
    assert 5 <= len(split.held_out) <= 30  # one in 20 of 300, by chance


def test_the_side_of_a_source_depends_on_its_bytes_alone(library, tmp_path):
    held_out = set(corpus.standard_library(library).held_out)
    for i in range(0, 300, 2):  # other names, half of the files, one more file
        (tmp_path / f"other_{i}.py").write_text(f"VALUE = {i}\n")
    (tmp_path / "new.py").write_text("NEW = 1\n")
    half = corpus.standard_library(tmp_path)
    texts = {f"VALUE = {i}\n" for i in range(0, 300, 2)}
    assert set(half.held_out) - {"NEW = 1\n"} == held_out & texts
    assert half == corpus.standard_library(tmp_path)


def test_what_is_left_out(tmp_path):
    kept = ["a.py", "json/decoder.py", "testing.py", "latest/b.py"]
    skipped = [
        "test/a.py",
        "json/tests/a.py",
        "site-packages/numpy/a.py",
        "dist-packages/a.py",
        "idlelib/idle_test/a.py",
        "encodings/cp1.py",
        "pydoc_data/topics.py",
        "notes.txt",
        "module.pyc",
    ]
    for name in [*kept, *skipped]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "latin.py").write_bytes(b"# \xe9t\xe9\n")
    found = corpus.standard_library(tmp_path)
    assert sorted([*found.train, *found.held_out]) == sorted(kept)


def test_a_library_in_a_folder_named_test_is_read(tmp_path):
    root = tmp_path / "test"
    root.mkdir()
    (root / "a.py").write_text("a\n")
    found = corpus.standard_library(root)
    assert [*found.train, *found.held_out] == ["a\n"]


def test_every_python_has_a_corpus():
    split = corpus.standard_library()
    assert len(split.train) > 10 * len(split.held_out) > 0
    assert any("class JSONDecoder" in text for text in [*split.train, *split.held_out])


def test_vocabulary_comes_back_from_its_metadata(vocabulary):
    metadata = corpus.vocabulary_metadata(vocabulary)
    assert len(metadata["tokenizer.ggml.tokens"]) == SIZE
    assert metadata["tokenizer.ggml.tokens"][:3] == [corpus.BOS, corpus.EOS, corpus.PAD]
    assert metadata["tokenizer.ggml.token_type"][:4] == [CONTROL] * 3 + [1]
    tokenizer = Tokenizer(Vocabulary.from_metadata(metadata))
    assert tokenizer.eog_ids == {1}
    for text in [*DOCUMENTS[:3], "Ünïcode 漢字 🙂\t\n\n  x=12345\x00"]:
        ids = tokenizer.encode(text, add_special=False)
        assert ids == vocabulary.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == [0, *ids]
        assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode(DOCUMENTS[0])) < len(DOCUMENTS[0].encode()) / 1.5  # merges were learnt


def test_the_same_documents_make_the_same_vocabulary(vocabulary):
    assert corpus.train_vocabulary(DOCUMENTS, SIZE).to_str() == vocabulary.to_str()


def test_a_stream_is_documents_between_their_marks(vocabulary):
    stream = corpus.encode_documents(vocabulary, ["one", "two\n", ""])
    assert stream.dtype == np.uint16
    ids = lambda text: vocabulary.encode(text, add_special_tokens=False).ids
    assert stream.tolist() == [0, *ids("one"), 1, 0, *ids("two\n"), 1, 0, 1]
