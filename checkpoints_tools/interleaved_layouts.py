"""Where each bit of each number lies in blocks, plain ones and those of several rows interleaved.

A field is an array of bit positions [numbers, bits of a number], the lowest bit first; bit p is bit p % 8 of
byte p // 8. The fields of a block have every bit of it once. Interleaved blocks hold one block of each row of
a group, so that their fields have an axis of rows in front: [rows, numbers, bits].

Letters: `k` row in the group, `e` weight in the block, `b` its run of 32 and `r` its place there, `s` run of
16, `d` scale of the block.

Source: the formats as ik_llama.cpp decodes them (`iqk_quantize.cpp`), and as the package `gguf` does.
"""

from typing import NamedTuple

import numpy as np

Fields = dict[str, np.ndarray]


class Layout(NamedTuple):
    """An interleaved type and the format that its rows have one by one.

    Attributes:
      base: name of that format: a key of `quant.FORMATS`, or "bf16".
      rows: number of rows in a group.
      base_fields: fields of its block.
      fields: the same fields of the interleaved block.
      summed: name of a field in which a stored bit is the exclusive or of the bits up to its place; the base
        has these bits themselves.
      flipped: name of a field whose highest bit is stored inverted.
    """

    base: str
    rows: int
    base_fields: Fields
    fields: Fields
    summed: str | None = None
    flipped: str | None = None


def _at(byte, shift, width: int) -> np.ndarray:
    """Returns the positions of numbers of `width` bits that begin at bit `shift` of a byte."""
    return (8 * np.asarray(byte) + np.asarray(shift))[..., None] + np.arange(width)


def _join(*parts: np.ndarray) -> np.ndarray:
    """Returns the positions of numbers of which each part has some bits, the lowest first."""
    shape = np.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return np.concatenate([np.broadcast_to(part, (*shape, part.shape[-1])) for part in parts], axis=-1)


_E32, _E64, _E256 = np.arange(32), np.arange(64), np.arange(256)
_B, _R = _E256 // 32, _E256 % 32
_RUNS8, _RUNS16 = np.arange(8), np.arange(16)
_K4, _K8, _K16 = (np.arange(rows)[:, None] for rows in (4, 8, 16))
_D = _at([0], 0, 16)


def _short_bases() -> dict[str, Fields]:
    """Returns the fields of blocks that have no scales of their own, or one."""
    halves = lambda byte: _at(byte + _E32 % 16, _E32 // 16 * 4, 4)
    high_pairs = _at(2 + _E32 % 8, _E32 % 16 // 8 * 4 + _E32 // 16 * 2, 2)
    indices = _at(np.arange(4), 0, 8)
    return {
        "q4_0": {"d": _D, "codes": halves(2)},
        "q5_0": {"d": _D, "codes": _join(halves(6), _at(2, _E32, 1))},
        "q6_0": {"d": _D, "codes": _join(halves(10), high_pairs)},
        "q8_0": {"d": _D, "codes": _at(2 + _E32, 0, 8)},
        "iq4_nl": {"d": _D, "codes": halves(2)},
        "mxfp4": {"exponent": _at([0], 0, 8), "codes": halves(1)},
        "iq2_bn": {"codes": _at(_E64 % 16, _E64 // 16 * 2, 2)},
        "q8_KV": {"codes": _at(_E32, 0, 8)},
        "q8_k_r8": {"d": _D, "codes": _at(2 + _E256, 0, 8)},
        "bf16": {"values": _at([0, 2], 0, 16)},
        "iq1_s_r4": {"indices": indices, "rest": _at([4], 0, 16)},
        "iq1_m_r4": {"indices": indices, "rest": _at([4, 5], 0, 8), "scales": _at([6], 0, 8)},
    }


def _nibbles(byte: int, run: int) -> np.ndarray:
    """Returns 256 nibbles of 128 bytes; `run` bytes have the low ones of a run, then the high ones."""
    return _at(byte + _E256 // (2 * run) * run + _E256 % run, _E256 // run % 2 * 4, 4)


def _pairs(byte: int) -> np.ndarray:
    """Returns 256 pairs of bits of 64 bytes; 32 bytes have those of four runs of 32."""
    return _at(byte + _E256 // 128 * 32 + _R, _B % 4 * 2, 2)


def _plane(byte: int) -> np.ndarray:
    """Returns 256 bits of 32 bytes, each of which has one of every run of 32."""
    return _at(byte + _R, _B, 1)


def _scale_nibbles(byte: int, numbers: np.ndarray) -> np.ndarray:
    return _at(byte + numbers // 2, numbers % 2 * 4, 4)


def _k_bases() -> dict[str, Fields]:
    """Returns the fields of k-quants."""
    s, b, is_low = _RUNS16, _RUNS8, _RUNS8 < 4
    scales = _join(
        _at(np.where(is_low, 4, 8) + b, 0, 4), _at(np.where(is_low, 4, 0) + b, np.where(is_low, 4, 6), 2)
    )
    minima = _join(
        _at(8 + b, np.where(is_low, 0, 4), 4), _at(np.where(is_low, 8, 4) + b, np.where(is_low, 4, 6), 2)
    )
    q4_k = {"d": _at([0, 2], 0, 16), "scales": scales, "minima": minima, "codes": _nibbles(16, 32)}
    return {
        "q2_K": {"scales": _at(s, 0, 8), "codes": _pairs(16), "d": _at([80, 82], 0, 16)},
        "q3_K": {
            "codes": _join(_pairs(32), _plane(0)),
            "scales": _join(_at(96 + s % 8, s // 8 * 4, 4), _at(104 + s % 4, s // 4 * 2, 2)),
            "d": _at([108], 0, 16),
        },
        "q4_K": q4_k,
        "q5_K": q4_k | {"codes": _join(_nibbles(48, 32), _plane(16))},
        "q6_K": {
            "codes": _join(_nibbles(0, 64), _pairs(128)),
            "scales": _at(192 + s, 0, 8),
            "d": _at([208], 0, 16),
        },
    }


def _iqk_bases() -> dict[str, Fields]:
    """Returns the fields of the formats that pick from tables of numbers, one for each weight."""
    s, b = _RUNS16, _RUNS8
    shared = {"d": _D, "table": _at(2, s, 1)}
    six_bits = _join(_scale_nibbles(8, s), _at(4 + s // 4, s % 4 * 2, 2))
    return {
        "iq2_k": shared | {"scales": _scale_nibbles(4, s), "codes": _pairs(12)},
        "iq3_k": shared
        | {
            "scales": _join(_scale_nibbles(6, s), _at(4, s, 1)),
            "codes": _join(_pairs(14), _plane(78)),
        },
        "iq4_k": shared | {"scales": six_bits, "codes": _nibbles(16, 16)},
        "iq5_k": shared | {"scales": six_bits, "codes": _join(_nibbles(16, 32), _plane(144))},
        "iq4_ks": {"scales": _at(b, 0, 8), "codes": _nibbles(8, 16)},
        "iq5_ks": {"scales": _at(b, 0, 8), "codes": _join(_nibbles(8, 32), _plane(136))},
        "iq4_xs": {
            "d": _D,
            "scales": _join(_scale_nibbles(4, b), _at(2, 2 * b, 2)),
            "codes": _nibbles(8, 16),
        },
    }


def _sign_words(byte: int, step: int) -> Fields:
    """Returns the fields of 8 words, `step` bytes apart: 7 signs of each group of 8 weights, and a scale."""
    signs = _at(byte + _E32 // 4 * step, _E32 % 4 * 7, 7)
    return {"signs": signs, "scales": _at(byte + _RUNS8 * step, 28, 4)}


def _grid_bases() -> dict[str, Fields]:
    """Returns the fields of the formats that pick from tables of 8 or 4 numbers."""
    s, b, g, four = _RUNS16, _RUNS8, _E32, _E64  # g: groups of 8 weights; four: groups of 4
    return {
        "iq2_xxs": {"d": _D, "indices": _at(2 + g // 4 * 8 + g % 4, 0, 8)} | _sign_words(6, 8),
        "iq2_xs": {
            "d": _D,
            "indices": _at(2 + 2 * g, 0, 9),
            "signs": _at(2 + 2 * g, 9, 7),
            "scales": _scale_nibbles(66, s),
        },
        "iq2_s": {
            "d": _D,
            "indices": _join(_at(2 + g, 0, 8), _at(66 + g // 4, g % 4 * 2, 2)),
            "signs": _at(34 + g, 0, 8),
            "scales": _scale_nibbles(74, s),
        },
        "iq3_xxs": {"d": _D, "indices": _at(2 + four, 0, 8)} | _sign_words(66, 4),
        "iq3_s": {
            "d": _D,
            "indices": _join(_at(2 + four, 0, 8), _at(66, four, 1)),
            "signs": _at(74, _E256, 1),
            "scales": _scale_nibbles(106, b),
        },
    }


def _fours(byte: int, k: np.ndarray, e: np.ndarray) -> np.ndarray:
    """Returns bytes of weights, of which four of each row lie together."""
    return _at(byte + e // 4 * 4 * len(k) + 4 * k + e % 4, 0, 8)


def _nibbles_of_four(byte: int, e: np.ndarray) -> np.ndarray:
    """Returns nibbles of four rows, 64 bytes for each 32 weights."""
    part = e % 32 // 4
    place = 16 * (part // 4 + part % 2 * 2) + 4 * _K4 + e % 4
    return _at(byte + e // 32 * 64 + place, part // 2 % 2 * 4, 4)


def _pairs_of_four(byte: int, order: tuple[int, ...] = (0, 1, 2, 3)) -> np.ndarray:
    """Returns pairs of bits of four rows, 16 bytes for each 16 weights; `order` is that of the fours."""
    shift = 2 * np.array(order)[_E256 % 16 // 4]
    return _at(byte + _E256 // 16 * 16 + 4 * _K4 + _E256 % 4, shift, 2)


def _plane_of_four(byte: int, order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)) -> np.ndarray:
    """Returns bits of four rows, 16 bytes for each 32 weights; `order` is that of the fours."""
    return _at(byte + 16 * _B + 4 * _K4 + _E256 % 4, np.array(order)[_R // 4], 1)


def _split_scales(low: int, high: int, places: np.ndarray) -> np.ndarray:
    """Returns scales of four bits from 32 bytes, and two more from 16."""
    return _join(_at(low + places % 32, places // 32 * 4, 4), _at(high + places % 16, places // 16 * 2, 2))


def _short_fields() -> dict[str, Fields]:
    """Returns the interleaved fields of the formats in `_short_bases`."""
    k4, k8, k16 = _K4, _K8, _K16
    part = _E32 // 4
    l, n = part // 4 + part % 2 * 2, part // 2 % 2  # byte and nibble of `_nibbles_of_four`
    halves = lambda byte: _at(byte + _E32 % 16 // 4 * 32 + 4 * k8 + _E32 % 4, _E32 // 16 * 4, 4)
    q5_high = _at(8 + 4 * k4 + _E32 % 4, l + 4 * n, 1)
    q6_high = _at(8 + l % 2 * 16 + 4 * k4 + _E32 % 4, l // 2 * 2 + 4 * n, 2)
    indices = _at(4 * np.arange(4) + k4, 0, 8)
    d4, d8, d16 = (_at(2 * k, 0, 16) for k in (k4, k8, k16))
    return {
        "q4_0_r8": {"d": d8, "codes": halves(16)},
        "q5_0_r4": {"d": d4, "codes": _join(_nibbles_of_four(24, _E32), q5_high)},
        "q6_0_r4": {"d": d4, "codes": _join(_nibbles_of_four(40, _E32), q6_high)},
        "q8_0_r8": {"d": d8, "codes": _fours(16, k8, _E32)},
        "iq4_nl_r4": {"d": d4, "codes": _nibbles_of_four(8, _E32)},
        "mxfp4_r8": {"exponent": _at(k8, 0, 8), "codes": halves(8)},
        "iq2_bn_r4": {"codes": _at(_E64 // 16 * 16 + 4 * k4 + _E64 % 4, _E64 % 16 // 4 * 2, 2)},
        "q8_KV_r8": {"codes": _fours(0, k8, _E32)},
        "q8_k_r8": {"d": d8, "codes": _fours(16, k8, _E256)},
        "q8_k_r16": {"d": d16, "codes": _fours(32, k16, _E256)},
        "bf16_r16": {"values": _at(4 * k16 + np.array([0, 2]), 0, 16)},
        "iq1_s_r4": {"indices": indices, "rest": _at(16 + 2 * k4, 0, 16)},
        "iq1_m_r4": {
            "indices": indices,
            "rest": _at(16 + 4 * np.arange(2) + k4, 0, 8),
            "scales": _at(24 + k4, 0, 8),
        },
    }


def _k_fields() -> dict[str, Fields]:
    """Returns the interleaved fields of the formats in `_k_bases`."""
    run, half_run = 4 * _RUNS8 + _K4, 4 * _RUNS16 + _K4
    d, d_and_min = _at(2 * _K4, 0, 16), _at(2 * _K4 + np.array([0, 8]), 0, 16)
    scales = _join(_at(32 + run, 0, 4), _at(16 + run % 16, run // 16 * 4, 2))
    minima = _join(_at(32 + run, 4, 4), _at(16 + run % 16, run // 16 * 4 + 2, 2))
    q4_k = {"d": d_and_min, "scales": scales, "minima": minima, "codes": _nibbles_of_four(64, _E256)}
    fifth_bits = _plane_of_four(64, (0, 2, 1, 3, 4, 6, 5, 7))
    return {
        "q2_k_r4": {"scales": _at(16 + half_run, 0, 8), "codes": _pairs_of_four(80), "d": d_and_min},
        "q3_k_r4": {
            "codes": _join(_pairs_of_four(184), _plane_of_four(56)),
            "scales": _split_scales(24, 8, half_run),
            "d": d,
        },
        "q4_k_r4": q4_k,
        "q5_k_r4": q4_k | {"codes": _join(_nibbles_of_four(192, _E256), fifth_bits)},
        "q6_k_r4": {
            "codes": _join(_nibbles_of_four(328, _E256), _pairs_of_four(72, (0, 2, 1, 3))),
            "scales": _at(8 + half_run, 0, 8),
            "d": d,
        },
    }


def _iqk_fields() -> dict[str, Fields]:
    """Returns the interleaved fields of the formats in `_iqk_bases`."""
    run, half_run = 4 * _RUNS8 + _K4, 4 * _RUNS16 + _K4
    shared = {"d": _at(2 * _K4, 0, 16), "table": _at(8 + _K4 + _RUNS16 % 2 * 4, _RUNS16 // 2, 1)}
    four_bits = lambda byte: _at(byte + half_run % 32, half_run // 32 * 4, 4)
    six_bits = _split_scales(32, 16, half_run)
    order = (0, 4, 1, 5, 2, 6, 3, 7)
    place = _R // 8 * 32 + 4 * _K8 + _E256 % 4
    return {
        "iq2_k_r4": shared | {"scales": four_bits(16), "codes": _pairs_of_four(48)},
        "iq3_k_r4": shared
        | {
            "scales": _join(four_bits(24), _at(16 + half_run % 8, half_run // 8, 1)),
            "codes": _join(_pairs_of_four(56), _plane_of_four(312)),
        },
        "iq4_k_r4": shared | {"scales": six_bits, "codes": _nibbles_of_four(64, _E256)},
        "iq5_k_r4": shared
        | {
            "scales": six_bits,
            "codes": _join(_nibbles_of_four(64, _E256), _plane_of_four(576, order)),
        },
        "iq4_ks_r4": {"scales": _at(run, 0, 8), "codes": _nibbles_of_four(32, _E256)},
        "iq5_ks_r4": {
            "scales": _at(run, 0, 8),
            "codes": _join(_nibbles_of_four(32, _E256), _plane_of_four(544, order)),
        },
        "iq4_xs_r8": {
            "d": _at(2 * _K8, 0, 16),
            "scales": _split_scales(32, 16, 8 * _RUNS8 + _K8),
            "codes": _at(64 + 128 * _B + place, _R // 4 % 2 * 4, 4),
        },
    }


def _grid_fields() -> dict[str, Fields]:
    """Returns the interleaved fields of those in `_grid_bases`; a byte of a word has a bit of a scale."""
    k, d = _K4, _at(2 * _K4, 0, 16)
    run = 4 * _RUNS8 + k
    eights = _E32 // 4 * 16 + 4 * k + _E32 % 4
    run64, four = _E64 // 8, _E64 % 8
    run_scales = lambda byte: _at(byte + _RUNS16 // 2 * 4 + k, _RUNS16 % 2 * 4, 4)
    words = {
        "scales": _at(8 + 4 * run, 0, 25)[..., ::8],
        "signs": _at(8 + eights, 1, 7),
    }
    return {
        "iq2_xxs_r4": {"d": d, "indices": _at(136 + eights, 0, 8)} | words,
        "iq2_xs_r4": {
            "d": d,
            "indices": _at(8 + 2 * eights, 0, 9),
            "signs": _at(8 + 2 * eights, 9, 7),
            "scales": run_scales(264),
        },
        "iq2_s_r4": {
            "d": d,
            "indices": _join(_at(8 + eights, 0, 8), _at(136 + _E32 // 4 * 4 + k, _E32 % 4 * 2, 2)),
            "signs": _at(168 + eights, 0, 8),
            "scales": run_scales(296),
        },
        "iq3_xxs_r4": {"d": d, "indices": _at(136 + 32 * run64 + 8 * k + four, 0, 8)} | words,
        "iq3_s_r4": {
            "d": d,
            "indices": _join(
                _at(8 + 32 * run64 + k + four % 4 * 8 + four // 4 * 4, 0, 8),
                _at(264 + 4 * run64 + k, four, 1),
            ),
            "signs": _at(296 + 16 * _B + 4 * k + _E256 % 4, _R // 4, 1),
            "scales": _at(424 + run % 16, run // 16 * 4, 4),
        },
    }


def _layouts() -> dict[str, Layout]:
    bases = _short_bases() | _k_bases() | _iqk_bases() | _grid_bases()
    stems = {base.lower(): base for base in bases}
    stems |= {"q8_k": "q8_k_r8", "iq1_s": "iq1_s_r4", "iq1_m": "iq1_m_r4"}
    layouts = {}
    for name, fields in (_short_fields() | _k_fields() | _iqk_fields() | _grid_fields()).items():
        stem, _, rows = name.lower().rpartition("_r")
        layouts[name] = Layout(stems[stem], int(rows), bases[stems[stem]], fields)
    for name in ("iq2_xxs_r4", "iq2_xs_r4", "iq3_xxs_r4"):
        layouts[name] = layouts[name]._replace(summed="signs")
    layouts["q8_k_r16"] = layouts["q8_k_r16"]._replace(flipped="codes")
    return layouts


LAYOUTS = _layouts()
