"""Interleaved rows: every bit once, there and back, and the values that the definition of each type gives."""

import numpy as np
import pytest

from checkpoints_tools import interleave
from checkpoints_tools.ggml_types import IDS, TYPES
from checkpoints_tools.interleaved_layouts import LAYOUTS
from mla_jax import quant

GROUPS, SIZE = 3, 768

each_type = pytest.mark.parametrize("name", interleave.BASES)


def random_data(name, num_groups=GROUPS, size=SIZE, seed=0):
    """Returns random bytes of whole groups."""
    num_bytes = num_groups * interleave.BASES[name].rows * TYPES[IDS[name]].row_bytes(size)
    return np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)


def sane_data(name, num_groups=GROUPS, size=SIZE, seed=0):
    """Returns random bytes of whole groups whose scales are finite."""
    rows = interleave.deinterleave(name, random_data(name, num_groups, size, seed), size)
    rng, base, fields = np.random.default_rng(seed), interleave.BASES[name], LAYOUTS[name].base_fields
    blocks = rows[:, base.header_bytes :].reshape(len(rows), -1, base.block_bytes)
    if base.header_bytes:
        dtype = np.float16 if base.header_bytes == 2 else np.float32
        scales = rng.uniform(-0.1, 0.1, (len(rows), 1)).astype(dtype).view(np.uint8)
        rows[:, : scales.shape[1]] = scales
    for start in fields["d"][:, 0] // 8 if "d" in fields else ():
        scales = rng.uniform(-0.1, 0.1, (*blocks.shape[:2], 1)).astype(np.float16)
        blocks[..., start : start + 2] = scales.view(np.uint8)
    if "exponent" in fields:
        blocks[..., 0] = rng.integers(110, 140, blocks.shape[:2])
    if base.name == "bf16":
        rows[:, 1::2] &= 0xBF
    return interleave.interleave(name, rows, size)


def decoded(name, data, size=SIZE):
    """Returns float32[rows, size], taken apart and decoded."""
    rows, base = interleave.deinterleave(name, data, size), interleave.BASES[name]
    blocks = rows[:, base.header_bytes :].reshape(len(rows), -1, base.block_bytes)
    header = rows[:, : base.header_bytes] if base.header_bytes else None
    return np.asarray(quant.decode(quant.QuantizedTensor(blocks=blocks, header=header, format=base.name)))


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
