"""Importance matrices of both kinds are read as they were meant, and bad files refused in a sentence."""

import os
import re
import struct

import numpy as np
import pytest

from checkpoints_tools import GGUFError, TensorData, write_gguf
from checkpoints_tools.ggml_types import IDS
from checkpoints_tools.imatrix import fit, read_imatrix
from mla_jax import quant

WEIGHT, EXPERTS = "blk.0.attn_q_a.weight", "blk.1.ffn_down_exps.weight"
NUM_CALLS = 7
TAIL = struct.pack("<ii", 7, 9) + b"some text"


def _entry(name, values, num_calls=NUM_CALLS):
    raw = name if isinstance(name, bytes) else name.encode()
    values = np.asarray(values, "<f4")
    return struct.pack("<i", len(raw)) + raw + struct.pack("<ii", num_calls, values.size) + values.tobytes()


def _legacy(*entries, count=None, tail=TAIL):
    return struct.pack("<i", len(entries) if count is None else count) + b"".join(entries) + tail


def _gguf(path, tensors, kind="imatrix", ggml_type="f32"):
    metadata = {"imatrix.chunk_count": 7, "imatrix.datasets": ["some text"]}
    metadata |= {} if kind is None else {"general.type": kind}
    kinds = {"f32": "<f4", "f16": "<f2"}
    arrays = {name: np.asarray(array, kinds[ggml_type]) for name, array in tensors.items()}
    write_gguf(path, metadata, [TensorData(n, a.shape, IDS[ggml_type], a) for n, a in arrays.items()])


def _write(path, content):
    if isinstance(content, dict):
        _gguf(path, **content)
    else:
        path.write_bytes(content)


@pytest.fixture
def means():
    rng = np.random.default_rng(0)
    return {
        WEIGHT: rng.chisquare(1, 96).astype(np.float32),
        EXPERTS: rng.chisquare(1, (4, 32)).astype(np.float32),
    }


@pytest.mark.parametrize("tail", [b"", struct.pack("<ii", 7, 0), TAIL], ids=["no tail", "no text", "text"])
def test_legacy_sums_are_divided_by_calls(tmp_path, means, tail):
    path = tmp_path / "imatrix.dat"
    path.write_bytes(_legacy(*(_entry(name, NUM_CALLS * mean) for name, mean in means.items()), tail=tail))
    found = read_imatrix(path)
    assert list(found) == [WEIGHT, EXPERTS] and all(v.dtype == np.float32 for v in found.values())
    np.testing.assert_allclose(found[WEIGHT], means[WEIGHT], rtol=1e-6)
    np.testing.assert_allclose(found[EXPERTS], means[EXPERTS].reshape(-1), rtol=1e-6)
    fitted = fit(found[EXPERTS], (4, 5, 32))
    np.testing.assert_array_equal(fitted, found[EXPERTS].reshape(4, 1, 32))
    assert np.broadcast_shapes(fitted.shape, (4, 5, 32)) == (4, 5, 32)


def test_legacy_numbers_without_calls_are_means(tmp_path, means):
    path = tmp_path / "imatrix.dat"
    path.write_bytes(_legacy(_entry(WEIGHT, means[WEIGHT], num_calls=0)))
    np.testing.assert_array_equal(read_imatrix(path)[WEIGHT], means[WEIGHT])


def test_fit_leaves_what_it_need_not_shape():
    row, experts = np.ones(64, np.float32), np.ones((4, 1, 32), np.float32)
    assert fit(row, (8, 64)) is row and fit(row, (4, 5, 64)) is row and fit(row, (1, 5, 64)) is row
    assert fit(experts, (4, 5, 32)) is experts


def test_gguf_sums_are_divided_by_the_tokens_of_each_expert(tmp_path, means):
    path, counts = tmp_path / "imatrix.gguf", np.array([3, 1000, 0, 1], np.float32)
    tensors = {
        f"{WEIGHT}.in_sum2": 512 * means[WEIGHT],
        f"{WEIGHT}.counts": [512],
        f"{EXPERTS}.in_sum2": counts[:, None] * means[EXPERTS],
        f"{EXPERTS}.counts": counts[:, None],
    }
    _gguf(path, tensors | {f"{WEIGHT}.something": [1.0]})
    found = read_imatrix(path)
    assert list(found) == [WEIGHT, EXPERTS] and all(v.dtype == np.float32 for v in found.values())
    np.testing.assert_allclose(found[WEIGHT], means[WEIGHT], rtol=1e-6)
    expected = np.where(counts[:, None] > 0, means[EXPERTS], 1)
    assert found[EXPERTS].shape == (4, 1, 32)
    np.testing.assert_allclose(found[EXPERTS][:, 0], expected, rtol=1e-6)


def test_importance_of_experts_goes_into_the_encoder(tmp_path, means):
    path = tmp_path / "imatrix.dat"
    path.write_bytes(_legacy(_entry(EXPERTS, means[EXPERTS])))
    weight = np.random.default_rng(1).standard_normal((4, 5, 32), dtype=np.float32)
    together = quant.encode(weight, "q4_0", fit(read_imatrix(path)[EXPERTS], weight.shape)).blocks
    alone = [quant.encode(weight[i], "q4_0", means[EXPERTS][i] / NUM_CALLS).blocks for i in range(4)]
    np.testing.assert_array_equal(together, np.stack(alone))


ONE = np.ones(4, np.float32)
BAD_LEGACY = {
    "empty": (b"", "the number of entries, .* needs 4 bytes, 0 are left"),
    "text": (
        b"hello, this is a text\n",
        r"at byte 0: the number of entries, .* must be 1 to 1000000, got 1819043176",
    ),
    "no entries": (_legacy(), "at byte 0: the number of entries, .* must be 1 to 1000000, got 0"),
    "negative count": (_legacy(count=-1), "must be 1 to 1000000, got -1"),
    "more entries than bytes": (
        _legacy(_entry("a", ONE), count=900_000, tail=b""),
        "at byte 33: the length of a name needs 4 bytes, 0 are left",
    ),
    "name of nothing": (_legacy(_entry("", ONE)), "at byte 4: the length of a name must be 1 to 1024, got 0"),
    "huge name": (struct.pack("<ii", 1, 2**31 - 1), "at byte 4: .* must be 1 to 1024, got 2147483647"),
    "negative name": (struct.pack("<ii", 1, -5), "must be 1 to 1024, got -5"),
    "name past the end": (struct.pack("<ii", 1, 1000), "at byte 8: a name needs 1000 bytes, 0 are left"),
    "name not UTF-8": (_legacy(_entry(b"\xff\xfe", ONE)), "at byte 4: a name must be UTF-8"),
    "negative calls": (_legacy(_entry("a", ONE, -1)), "at byte 9: the number of calls of 'a' must be 0 to"),
    "no numbers": (_legacy(_entry("a", [])), "at byte 13: the size of 'a' must be 1 to 2147483647, got 0"),
    "numbers past the end": (
        struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 2**31 - 1) + bytes(64),
        "at byte 17: entry 'a' needs 8589934588 bytes, 64 are left",
    ),
    "cut in the numbers": (_legacy(_entry("a", ONE), tail=b"")[:-1], "entry 'a' needs 16 bytes, 15 are left"),
    "twice": (_legacy(_entry("a", ONE), _entry("a", ONE)), "at byte 33: entry 'a' is there twice"),
    "nan": (_legacy(_entry("a", [1, np.nan])), "entry 'a' at byte 17 must hold finite numbers"),
    "infinite": (_legacy(_entry("a", [1, np.inf])), "entry 'a' at byte 17 must hold finite numbers"),
    "negative": (_legacy(_entry("a", [1, -1e-30])), "that are not negative, got another one"),
    "half a tail": (_legacy(_entry("a", ONE), tail=b"\1\0"), "the number of the last call needs 4 bytes, 2"),
    "tail past the end": (
        _legacy(_entry("a", ONE), tail=struct.pack("<ii", 7, 100)),
        "the name of the data needs 100 bytes, 0 are left",
    ),
    "something after the tail": (
        _legacy(_entry("a", ONE), tail=TAIL + b"x"),
        "must end here, got 1 bytes more",
    ),
}
PAIR = {"a.in_sum2": np.ones((2, 4)), "a.counts": [1, 1]}
BAD_GGUF = {
    "no type": (dict(tensors=PAIR, kind=None), "key 'general.type' must be 'imatrix', got None"),
    "a model": (dict(tensors=PAIR, kind="model"), "key 'general.type' must be 'imatrix', got 'model'"),
    "no sums": (dict(tensors={"a.counts": [1]}), r"must hold tensors named \*.in_sum2, got none"),
    "no counts": (dict(tensors={"a.in_sum2": ONE}), "tensor 'a.counts' must be beside 'a.in_sum2'"),
    "too few counts": (dict(tensors=PAIR | {"a.counts": [1]}), "'a.counts' must have 2 numbers, .* got 1"),
    "too many counts": (dict(tensors=PAIR | {"a.counts": [1] * 8}), "must have 2 numbers, .* got 8"),
    "other type": (dict(tensors=PAIR, ggml_type="f16"), r"'a.in_sum2' at byte \d+ must be f32, got f16"),
    "nan": (
        dict(tensors=PAIR | {"a.in_sum2": np.full((2, 4), np.nan)}),
        r"'a.in_sum2' at byte \d+ must hold",
    ),
    "negative": (dict(tensors=PAIR | {"a.in_sum2": -np.ones((2, 4))}), "that are not negative"),
    "negative count": (
        dict(tensors=PAIR | {"a.counts": [1, -1]}),
        r"'a.counts' at byte \d+ must hold finite",
    ),
    "infinite count": (
        dict(tensors=PAIR | {"a.counts": [1, np.inf]}),
        "'a.counts' at byte .* must hold finite",
    ),
    "overflow": (
        dict(tensors=PAIR | {"a.counts": [1, 1e-39], "a.in_sum2": np.full((2, 4), 1e30)}),
        "'a.in_sum2' must have finite means",
    ),
}


@pytest.mark.parametrize(
    ("content", "message"),
    [*BAD_LEGACY.values(), *BAD_GGUF.values()],
    ids=[*(f"legacy, {name}" for name in BAD_LEGACY), *(f"gguf, {name}" for name in BAD_GGUF)],
)
def test_bad_file_is_refused_in_a_sentence(tmp_path, content, message):
    path = tmp_path / "imatrix"
    _write(path, content)
    with pytest.raises(GGUFError, match=f"^{re.escape(str(path))}: .*{message}") as info:
        read_imatrix(path)
    assert str(info.value).endswith(".") and "\n" not in str(info.value)


@pytest.mark.parametrize("kind", ["legacy", "gguf"])
def test_every_cut_is_refused(tmp_path, kind):
    path, cut = tmp_path / "whole", tmp_path / "cut"
    _write(path, _legacy(_entry("a", ONE), _entry("b", ONE)) if kind == "legacy" else dict(tensors=PAIR))
    whole, first = path.read_bytes(), len(_legacy(_entry("a", ONE), _entry("b", ONE), tail=b""))
    read_imatrix(path)
    complete = {first} if kind == "legacy" else set(range(len(whole) - 24, len(whole)))  # the last padding
    for size in set(range(len(whole))) - complete:
        cut.write_bytes(whole[:size])
        with pytest.raises(GGUFError):
            read_imatrix(cut)


def test_what_is_no_file_is_refused(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (tmp_path / "nowhere", tmp_path, pipe):
        with pytest.raises(GGUFError, match="cannot be read"):
            read_imatrix(path)
