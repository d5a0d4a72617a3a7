"""Interleaved rows: every bit once, there and back, and the values that the definition of each type gives."""

import dataclasses

import jax
import numpy as np
import pytest
from interleaved import GROUPS, SIZE, SUPPORTED, decoded, random_data, sane_data, write_twins

import checkpoints_tools
from checkpoints_tools import gguf_file, interleave, load, names, save
from checkpoints_tools.ggml_types import IDS, TYPES
from checkpoints_tools.gguf_writer import TensorData, write_gguf
from checkpoints_tools.interleaved_layouts import LAYOUTS

each_type = pytest.mark.parametrize("name", interleave.BASES)


@each_type
def test_fields_have_every_bit_once(name):
    entry = LAYOUTS[name]
    assert entry.fields.keys() == entry.base_fields.keys()
    for field, stored in entry.fields.items():
        assert stored.shape == (entry.rows, *entry.base_fields[field].shape)
    for fields, rows in ((entry.base_fields, 1), (entry.fields, entry.rows)):
        bits = np.sort(np.concatenate([field.ravel() for field in fields.values()]))
        np.testing.assert_array_equal(bits, np.arange(8 * rows * interleave.BASES[name].block_bytes))


def test_table_has_every_interleaved_type_and_its_sizes():
    assert {name for name in IDS if name.endswith(("_r4", "_r8", "_r16"))} == interleave.BASES.keys()
    for name, base in interleave.BASES.items():
        entry = TYPES[IDS[name]]
        assert base.rows == entry.rows_per_group and SIZE % base.block_size == 0
        if base.name not in interleave.BASES:
            assert base.row_bytes(SIZE) == TYPES[IDS[base.name]].row_bytes(SIZE)
        assert base.row_bytes(SIZE) - entry.row_bytes(SIZE) == (4 if name == "q8_KV_r8" else 0)


@pytest.mark.parametrize("chunk_bytes", [1 << 18, 5000, 1], ids=["one chunk", "blocks", "block by block"])
@each_type
def test_bytes_come_back(name, chunk_bytes, monkeypatch):
    data = random_data(name)
    rows = interleave.deinterleave(name, data, SIZE)
    monkeypatch.setattr(interleave, "_CHUNK_BYTES", chunk_bytes)
    assert rows.shape == (GROUPS * interleave.BASES[name].rows, interleave.BASES[name].row_bytes(SIZE))
    np.testing.assert_array_equal(interleave.deinterleave(name, data, SIZE), rows)
    np.testing.assert_array_equal(interleave.interleave(name, rows, SIZE), data)
    assert np.count_nonzero(rows[:, : data.size // len(rows)].ravel() != data) > data.size // 2


@each_type
def test_no_rows_are_no_bytes(name):
    rows = interleave.deinterleave(name, np.zeros(0, np.uint8), SIZE)
    assert rows.shape == (0, interleave.BASES[name].row_bytes(SIZE))
    assert interleave.interleave(name, rows, SIZE).size == 0


@pytest.mark.parametrize(
    "name, num_bytes, row_size, words",
    [
        ("q4_k_r4", 144, 256, "q4_k_r4 must have groups of 4 rows of 144 bytes, got 144 bytes"),
        ("q8_k_r16", 16 * 258 + 1, 256, "q8_k_r16 must have groups of 16 rows of 258 bytes"),
        ("q4_k_r4", 576, 255, "rows of q4_k_r4 must have a positive multiple of 256 weights, got 255"),
        ("bf16_r16", 96, 3, "rows of bf16_r16 must have a positive multiple of 2 weights, got 3"),
        ("q8_KV_r8", 64, 0, "rows of q8_KV_r8 must have a positive multiple of 32 weights, got 0"),
    ],
)
def test_odd_sizes_are_refused(name, num_bytes, row_size, words):
    for change in (interleave.deinterleave, interleave.interleave):
        with pytest.raises(ValueError, match=words):
            change(name, np.zeros(num_bytes, np.uint8), row_size)


def _half(data):
    return float(data.view(np.float16)[0])


def test_q4_k_r4_by_definition():
    data, values = sane_data("q4_k_r4", 1), np.zeros((4, SIZE))
    places = [(0, 0), (32, 0), (0, 4), (32, 4), (16, 0), (48, 0), (16, 4), (48, 4)]  # byte and shift of fours
    for row, weight in np.ndindex(4, SIZE):
        block = data.reshape(-1, 576)[weight // 256]
        run, place = weight % 256 // 32, weight % 32
        number = 4 * run + row
        d, minimum = _half(block[2 * row : 2 * row + 2]), _half(block[8 + 2 * row : 10 + 2 * row])
        low, high = int(block[32 + number]), int(block[16 + number % 16]) >> (4 * (number // 16)) & 15
        byte, shift = places[place // 4]
        code = int(block[64 + 64 * run + byte + 4 * row + place % 4]) >> shift & 15
        values[row, weight] = d * (low & 15 | (high & 3) << 4) * code
        values[row, weight] -= minimum * (low >> 4 | (high >> 2) << 4)
    np.testing.assert_allclose(decoded("q4_k_r4", data), values, rtol=1e-6, atol=1e-5)


def test_q5_0_r4_by_definition():
    data, values = sane_data("q5_0_r4", 1), np.zeros((4, SIZE))
    part = [(0, 0), (2, 0), (0, 1), (2, 1), (1, 0), (3, 0), (1, 1), (3, 1)]  # sixteen bytes, and nibble
    for row, weight in np.ndindex(4, SIZE):
        block = data.reshape(-1, 88)[weight // 32]
        (sixteen, nibble), place = part[weight % 32 // 4], 4 * row + weight % 4
        code = int(block[24 + 16 * sixteen + place]) >> (4 * nibble) & 15
        code |= (int(block[8 + place]) >> (sixteen + 4 * nibble) & 1) << 4
        values[row, weight] = _half(block[2 * row : 2 * row + 2]) * (code - 16)
    np.testing.assert_allclose(decoded("q5_0_r4", data), values, rtol=1e-6)


def test_mxfp4_r8_by_definition():
    data, values = sane_data("mxfp4_r8", 1), np.zeros((8, SIZE))
    twice = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]
    for row, weight in np.ndindex(8, SIZE):
        block, place = data.reshape(-1, 136)[weight // 32], weight % 16
        byte = int(block[8 + 32 * (place // 4) + 4 * row + place % 4])
        values[row, weight] = 2.0 ** (int(block[row]) - 128) * twice[byte >> weight % 32 // 16 * 4 & 15]
    np.testing.assert_array_equal(decoded("mxfp4_r8", data), values)


def test_q8_kv_r8_by_definition():
    data = sane_data("q8_KV_r8")
    rows = interleave.deinterleave("q8_KV_r8", data, SIZE)
    for group, row in np.ndindex(GROUPS, 8):
        stored = data.reshape(GROUPS, -1)[group]
        codes = [stored[32:][32 * (e // 4) + 4 * row + e % 4] for e in range(SIZE)]
        found = rows[8 * group + row]
        np.testing.assert_array_equal(found[8:], codes)
        np.testing.assert_array_equal(found[:4], stored[4 * row : 4 * row + 4])
        assert found[4:8].view(np.int32)[0] == np.array(codes).view(np.int8).sum(dtype=np.int64)


def test_q8_k_r16_by_definition():
    data = random_data("q8_k_r16")
    blocks = data.reshape(GROUPS, -1, 16 * 258)
    rows = interleave.deinterleave("q8_k_r16", data, SIZE).reshape(GROUPS, 16, -1, 258)
    for row, weight in np.ndindex(16, 256):
        code = blocks[..., 32 + 64 * (weight // 4) + 4 * row + weight % 4].astype(int) - 128
        np.testing.assert_array_equal(rows[:, row, :, 2 + weight].view(np.int8), code)
    np.testing.assert_array_equal(rows[:, 3, :, :2], blocks[..., 6:8])


@pytest.mark.parametrize("name, first_word, step", [("iq2_xxs_r4", 6, 8), ("iq3_xxs_r4", 66, 4)])
def test_sign_words_by_definition(name, first_word, step):
    """A sign is the difference of two neighbours in the word, the scale the lowest bit of each byte."""
    block = random_data(name, 1, 256)
    rows = interleave.deinterleave(name, block, 256)
    for row, run in np.ndindex(4, 8):
        word = int(block[8 + 4 * (4 * run + row) :][:4].view(np.uint32)[0])
        scale = sum((word >> (8 * i) & 1) << i for i in range(4))
        signs = word & 0xFEFEFEFE
        signs ^= signs >> 1
        found = int(rows[row, first_word + step * run :][:4].copy().view(np.uint32)[0])
        assert found >> 28 == scale
        for group in range(4):
            seven = found >> (7 * group) & 127
            assert seven | (seven.bit_count() & 1) << 7 == signs >> (8 * group) & 255


def test_signs_of_iq2_xs_r4_by_definition():
    block = random_data("iq2_xs_r4", 1, 256)
    rows = interleave.deinterleave("iq2_xs_r4", block, 256)
    for row, run, group in np.ndindex(4, 8, 4):
        stored = int(block[8:].view(np.uint16)[16 * run + 4 * row + group])
        found = int(rows[row, 2:66].copy().view(np.uint16)[4 * run + group])
        signs = stored >> 9 ^ (stored >> 9 << 1)
        assert found & 511 == stored & 511
        assert found >> 9 | ((found >> 9).bit_count() & 1) << 7 == signs


def test_bf16_r16_by_definition():
    data = random_data("bf16_r16")
    stored = data.view(np.uint16).reshape(GROUPS, -1)
    rows = interleave.deinterleave("bf16_r16", data, SIZE).view(np.uint16).reshape(GROUPS, 16, SIZE)
    for row, weight in np.ndindex(16, SIZE):
        np.testing.assert_array_equal(
            rows[:, row, weight], stored[:, 32 * (weight // 2) + 2 * row + weight % 2]
        )


@pytest.mark.parametrize("kv", ["kv_b", "both", "k_b_v_b", "k_b_v_b_2d"])
def test_twins_are_one_model(tmp_path, kv):
    types = write_twins(tmp_path, kv=kv)
    assert set(types.values()) == set(SUPPORTED)
    single, packed = (checkpoints_tools.load_gguf(tmp_path / f"{twin}.gguf") for twin in ("single", "packed"))
    for name, leaf in names.flatten(packed.params).items():
        expected = names.flatten(single.params)[name]
        assert leaf.shape == expected.shape and jax.tree.structure(leaf) == jax.tree.structure(expected)
        for ours, theirs in zip(jax.tree.leaves(leaf), jax.tree.leaves(expected), strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs), name)
    for name, kept in packed.unread.items():
        assert kept.ggml_type == IDS[types[name]]


@pytest.mark.parametrize("piece_bytes", [1 << 22, 1], ids=["whole", "pieces"])
@pytest.mark.parametrize("kv", ["both", "k_b_v_b_2d"])
def test_save_gives_the_same_file(tmp_path, kv, piece_bytes, monkeypatch):
    write_twins(tmp_path, kv=kv)
    monkeypatch.setattr(load, "_PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(save, "_PIECE_BYTES", piece_bytes)
    for twin in ("single", "packed"):
        checkpoint = checkpoints_tools.load_gguf(tmp_path / f"{twin}.gguf")
        checkpoints_tools.save_gguf(tmp_path / "again.gguf", checkpoint)
        assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / f"{twin}.gguf").read_bytes()


def test_other_rows_are_saved_as_they_are(tmp_path):
    types = write_twins(tmp_path)
    checkpoint = checkpoints_tools.load_gguf(tmp_path / "packed.gguf")
    leaves = names.flatten(checkpoint.params)
    name = next(name for name, kind in types.items() if kind == "q4_k_r4")
    other = next(leaf for leaf in leaves.values() if getattr(leaf, "format", "") == "iq4_nl")
    floats = np.ones(leaves[name].shape, np.float32)
    for new, kind in ((floats, "f32"), (other, "iq4_nl"), (leaves[name][:1], "q4_K")):
        params = names.unflatten(leaves | {name: new})
        changed = dataclasses.replace(checkpoint, params=params)
        checkpoints_tools.save_gguf(tmp_path / "changed.gguf", changed)
        found = gguf_file.open_gguf(tmp_path / "changed.gguf").tensors[name]
        assert (found.type_name, found.shape) == (kind, new.shape)


@pytest.mark.parametrize("piece_bytes", [1 << 22, 1], ids=["whole", "pieces"])
def test_rows_are_read_alone(tmp_path, piece_bytes, monkeypatch):
    types = write_twins(tmp_path)
    monkeypatch.setattr(load, "_PIECE_BYTES", piece_bytes)
    single, packed = (gguf_file.open_gguf(tmp_path / f"{twin}.gguf") for twin in ("single", "packed"))
    for name in types:
        for rows in ((0, None), (3, 21), (16, 17), (5, 5)):
            ours, theirs = (load.read_weight(file, name, *rows) for file in (packed, single))
            assert jax.tree.structure(ours) == jax.tree.structure(theirs)
            jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_only_the_groups_of_rows_are_read(tmp_path, monkeypatch):
    types = write_twins(tmp_path)
    file, sizes = gguf_file.open_gguf(tmp_path / "packed.gguf"), []
    read = gguf_file.GGUFFile.read
    listen = lambda *args, **options: sizes.append(args[3]) or read(*args, **options)
    monkeypatch.setattr(gguf_file.GGUFFile, "read", listen, raising=True)
    name = next(name for name, kind in types.items() if kind == "q4_k_r4")
    assert load.read_weight(file, name, 7, 9).shape == (2, 256)
    assert sizes == [8 * 144]


def test_rows_of_an_odd_size_are_refused(tmp_path):
    path = tmp_path / "odd.gguf"
    write_gguf(path, {}, [TensorData("a.weight", (16, 3), IDS["bf16_r16"], np.zeros(96, np.uint8))])
    file = gguf_file.open_gguf(path)
    words = r"'a\.weight' has type bf16_r16 \(230\), so it must have rows of a multiple of 2, got \(16, 3\)"
    with pytest.raises(checkpoints_tools.GGUFError, match=words):
        load.read_weight(file, "a.weight")
