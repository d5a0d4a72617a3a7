"""Crafted files that are no sound containers, and what costs most to read; see `crafted`."""

import struct

from gguf_pieces import (
    ARRAY,
    BOOL,
    HUGE,
    STRING,
    U8,
    U64,
    array,
    container,
    counted,
    f32,
    i32,
    numbers,
    pair,
    row,
    scalar,
    start,
    text,
    texts,
    u32,
)

K = "key 'k'"
Q8_0, IQ4_KS, IQ4_NL_R4, Q8_K_R16 = 8, 144, 220, 397


def _alignment(value):
    return container([pair("general.alignment", value)])


def _key(value):
    return container([pair("k", value)])


def _last(value):
    """Returns a file that ends with the value of its only key."""
    return container([pair("k", value)], data=0, alignment=1)


def _rows(*rows, **changes):
    return container(rows=rows, **changes)


HEADS = {
    "empty file": ("not a GGUF file: it must begin with b'GGUF', got b''", b""),
    "one byte": ("not a GGUF file: .* got b'G'", b"G"),
    "text": ("not a GGUF file: .* got b'#!/b'", b"#!/bin/sh\necho hello\n"),
    "magic alone": ("at byte 4: the version needs 4 bytes, 0 are left", b"GGUF"),
    "magic of GGML": ("not a GGUF file: .* got b'GGML'", container(magic=b"GGML")),
    "magic in lower case": ("not a GGUF file: .* got b'gguf'", container(magic=b"gguf")),
    "magic backwards": ("not a GGUF file: .* got b'FUGG'", container(magic=b"FUGG")),
    "zeros": ("not a GGUF file: .* got b'.x00.x00.x00.x00'", bytes(4096)),
    "version 0": ("GGUF version must be 2 or 3, got 0", container(version=0)),
    "version 1": ("GGUF version must be 2 or 3, got 1", container(version=1)),
    "version 4": ("GGUF version must be 2 or 3, got 4", container(version=4)),
    "version 2**32 - 1": ("version must be 2 or 3, got 4294967295", container(version=2**32 - 1)),
    "big endian 2": ("is a big-endian GGUF file", container(version=2 << 24)),
    "big endian 3": ("is a big-endian GGUF file", b"GGUF" + struct.pack(">IQQ", 3, 1, 1)),
    "no counts": ("at byte 8: the number of tensors needs 8 bytes, 0 are left", start(0, 0)[:8]),
    "half a count": ("at byte 16: the number of keys needs 8 bytes, 4 are left", start(0, 0)[:20]),
    "huge tensor count": (f"at most 10000000 tensors are supported, {HUGE}", container(num_rows=HUGE)),
    "more tensors than rows": (
        "tensor name must have 1 to 127 bytes, got 0",
        _rows(row("t" * 9, (4,)), num_rows=9)[:96],
    ),
    "9 million tensors": ("tensor name must have 1 to 127 bytes, got 0", container(num_rows=9_000_000)),
    "huge key count": (f"at most 100000 keys are supported, {HUGE} are declared", container(num_pairs=HUGE)),
    "100001 keys": ("at most 100000 keys are supported, 100001", container(num_pairs=100_001)),
    "more keys than there are": (
        "the length of a key needs 8 bytes, 0 are left",
        container(num_pairs=5)[:24],
    ),
    "counts the wrong way round": (
        "tensor 'k' needs 44 bytes, 3 are left",
        container([pair("k", u32(1))], num_pairs=0, num_rows=1)[:40],
    ),
}

KEYS = {
    "huge key": (f"at byte 24: a key must have 1 to 65535 bytes, got {HUGE}", container([b"\xff" * 8])),
    "long key": ("a key must have 1 to 65535 bytes, got 65536", container([pair("k" * 65_536, u32(1))])),
    "empty key": ("a key must have 1 to 65535 bytes, got 0", container([pair("", u32(1))])),
    "key past the end": (
        "a key needs 5000 bytes, 96 are left",
        container([struct.pack("<Q", 5000)], data=96),
    ),
    "key of bytes": ("a key must be UTF-8", container([pair(b"\xff\xfe", u32(1))])),
    "key with half a character": ("a key must be UTF-8", container([pair("é".encode()[:1], u32(1))])),
    "key with a surrogate": ("a key must be UTF-8", container([pair(b"\xed\xa0\x80", u32(1))])),
    "key in overlong UTF-8": ("a key must be UTF-8", container([pair(b"\xc0\xaf", u32(1))])),
    "key twice": (f"{K} is there twice", container([pair("k", u32(1))] * 2)),
    "key twice with other values": (
        f"{K} is there twice",
        container([pair("k", u32(1)), pair("k", text("1"))]),
    ),
    "key of control characters twice": (
        r"key '.x1b\[2J.n.x00' is there twice",
        container([pair("\x1b[2J\n\0", u32(1))] * 2),
    ),
    "long key twice": ("key 'k{76}... is there twice", container([pair("k" * 65_535, u32(1))] * 2)),
    "no value type": (
        f"the type of {K} needs 4 bytes, 0 are left",
        container([counted("k")], data=0, alignment=1),
    ),
    "value type 13": (f"{K} has the unknown value type 13", _key((13, b""))),
    "value type 2**32 - 1": (f"{K} has the unknown value type 4294967295", _key((2**32 - 1, b""))),
    "no value": (f"{K} needs 8 bytes, 0 are left", _last((U64, b""))),
    "bool 2": (f"{K} must be a bool of byte 0 or 1, got 2", _key((BOOL, b"\2"))),
    "bool 255": (f"{K} must be a bool of byte 0 or 1, got 255", _key((BOOL, b"\xff"))),
    "bools of 2": (f"{K} must hold bools of byte 0 or 1", _key(array(BOOL, 3, b"\1\0\2"))),
    "string of 2**63 bytes": (
        f"{K} has a string that ends after the file",
        _key((STRING, struct.pack("<Q", 2**63))),
    ),
    "string one byte too long": (
        f"{K} has a string that ends after the file, of 72 bytes",
        _last((STRING, struct.pack("<Q", 28) + bytes(27))),
    ),
    "string without a length": (
        f"{K} declares 1 strings, 7 bytes are left",
        _last((STRING, bytes(7))),
    ),
}

ARRAYS = {
    "array without a count": (
        f"the array of {K} needs 12 bytes, 4 are left",
        _last((ARRAY, bytes(4))),
    ),
    "elements of type 77": (f"{K} has elements of the unknown value type 77", _key(array(77, HUGE))),
    "elements of type 13 and none": (f"{K} has elements of the unknown value type 13", _key(array(13, 0))),
    "2**61 numbers": (f"{K}, {2**61} elements, needs {2**64} bytes", _key(array(U64, 2**61))),
    "2**64 - 1 bytes": (f"{K}, {HUGE} elements, needs {HUGE} bytes", _key(array(U8, HUGE))),
    "one number too many": (
        f"{K}, 8 elements, needs 32 bytes, 31 are left",
        _last(array(5, 8, bytes(31))),
    ),
    "2**60 strings": (f"{K} declares {2**60} strings", _key(array(STRING, 2**60))),
    "2**61 strings of 0 bytes, wrapping": (f"{K} declares {2**61} strings", _key(array(STRING, 2**61))),
    "string of 2**62 bytes among others": (
        f"{K} has a string that ends after",
        _key(array(STRING, 2, struct.pack("<Q", 2**62))),
    ),
    "strings that wrap around to the first": (
        f"{K} has a string that ends after",
        _key(array(STRING, 3, struct.pack("<Q", 2**64 - 8) * 3)),
    ),
    "last string passes the end": (
        f"{K} has a string that ends after the file",
        _key(array(STRING, 2, counted("a") + struct.pack("<Q", 500))),
    ),
    "2**60 arrays": (
        f"the array of {K} needs 12 bytes|has elements of|unknown value",
        _key(array(ARRAY, 2**60)),
    ),
    "2**60 arrays of none": (
        f"the array of {K} needs 12 bytes",
        container([pair("k", array(ARRAY, 2**60))], data=b"\0" * 12 * 30, alignment=1),
    ),
    "arrays nested 3 deep": (
        f"{K} nests arrays deeper than 2",
        _key(array(ARRAY, 1, struct.pack("<IQ", ARRAY, 1) + struct.pack("<IQ", U8, 0))),
    ),
    "arrays nested without end": (
        f"{K} nests arrays deeper than 2",
        container([pair("k", (ARRAY, struct.pack("<IQ", ARRAY, 1) * 50_000))]),
    ),
    "array in an array passes the end": (
        f"{K}, 99 elements, needs 99 bytes",
        _key(array(ARRAY, 2, struct.pack("<IQ", U8, 0) + struct.pack("<IQ", U8, 99))),
    ),
    "string in an array in an array passes the end": (
        f"{K} has a string that ends after",
        _key(array(ARRAY, 2, struct.pack("<IQQ", STRING, 1, 999))),
    ),
}

ALIGNMENTS = {
    "alignment 0": ("'general.alignment' must be a power of two up to 1048576, got 0", _alignment(u32(0))),
    "alignment 48": ("'general.alignment' must be a power of two .*, got 48", _alignment(u32(48))),
    "alignment -32": ("'general.alignment' must be a power of two .*, got -32", _alignment(i32(-32))),
    "alignment 2 MiB": (
        "'general.alignment' must be a power of two .*, got 2097152",
        _alignment(u32(1 << 21)),
    ),
    "alignment 2**63": (
        f"'general.alignment' must be a power .*, got {2**63}",
        _alignment(scalar(U64, 2**63)),
    ),
    "alignment 32.0": ("'general.alignment' must be a power of two .*, got 32.0", _alignment(f32(32.0))),
    "alignment true": (
        "'general.alignment' must be a power of two .*, got True",
        _alignment(scalar(BOOL, True)),
    ),
    "alignment a text": ("'general.alignment' must be a power of two .*, got '32'", _alignment(text("32"))),
    "alignment an array": (
        r"'general.alignment' must be a power of two .*, got \[32\]",
        _alignment(numbers(U8, [32])),
    ),
    "alignment moves the data past the end": (
        "tensor 't' at byte 4096 needs 16 bytes, 0 are left",
        container([pair("general.alignment", u32(4096))], [row("t", (4,))]),
    ),
}

TENSORS = {
    "empty tensor name": ("a tensor name must have 1 to 127 bytes, got 0", _rows(row("", (4,)))),
    "long tensor name": ("a tensor name must have 1 to 127 bytes, got 128", _rows(row("n" * 128, (4,)))),
    "huge tensor name": (f"a tensor name must have 1 to 127 bytes, got {HUGE}", _rows(b"\xff" * 8)),
    "tensor name of bytes": ("a tensor name must be UTF-8", _rows(row(b"\x80", (4,)))),
    "tensor name cut off": ("a tensor name needs 100 bytes", _rows(struct.pack("<Q", 100), data=64)),
    "tensor twice": ("tensor 't' is there twice", _rows(row("t", (4,)), row("t", (4,), 0, 32))),
    "tensor of control characters twice": (
        r"tensor '.x1b\[31m' is there twice",
        _rows(row("\x1b[31m", (4,)), row("\x1b[31m", (4,))),
    ),
    "row cut off": (
        "tensor 't' needs 20 bytes, 19 are left",
        _rows(row("t", (4,)), data=0, alignment=1)[:-1],
    ),
    "row without dimensions": (
        "tensor 't' needs 4 bytes, 0 are left",
        _rows(counted("t"), data=0, alignment=1),
    ),
    "5 dimensions": ("tensor 't' must have at most 4 dimensions, got 5", _rows(row("t", (1,) * 5))),
    "2**32 - 1 dimensions": ("at most 4 dimensions, got 4294967295", _rows(counted("t") + b"\xff" * 4)),
    "dimension 0": (r"positive multiple of 1 weights, got shape \(0, 4\)", _rows(row("t", (4, 0)))),
    "row of no weights": (
        r"rows of a positive multiple of 32 weights, got shape \(4, 0\)",
        _rows(row("t", (0, 4), Q8_0)),
    ),
    "all dimensions 0": (
        r"positive multiple of 1 weights, got shape \(0, 0, 0, 0\)",
        _rows(row("t", (0,) * 4)),
    ),
    "type 4, which is gone": ("tensor 't' has the unknown type 4", _rows(row("t", (4,), 4))),
    "type 1000": ("tensor 't' has the unknown type 1000", _rows(row("t", (4,), 1000))),
    "type 2**32 - 1": ("tensor 't' has the unknown type 4294967295", _rows(row("t", (4,), 2**32 - 1))),
    "row of half a block": (
        r"type q8_0 must have rows of a positive multiple of 32 weights, got shape \(48,\)",
        _rows(row("t", (48,), Q8_0)),
    ),
    "no dimensions in blocks": (r"multiple of 32 weights, got shape \(\)", _rows(row("t", (), Q8_0))),
    "header of a row cut off": (
        "'t' at byte 96 needs 280 bytes, 272 are left",
        _rows(row("t", (256, 2), IQ4_KS), data=272),
    ),
    "3 rows of 4 interleaved": (
        r"type iq4_nl_r4 must have a multiple of 4 rows, got shape \(3, 32\)",
        _rows(row("t", (32, 3), IQ4_NL_R4)),
    ),
    "group of rows over two experts": (
        r"multiple of 16 rows, got shape \(2, 8, 256\)",
        _rows(row("t", (256, 8, 2), Q8_K_R16)),
    ),
    "vector of an interleaved type": (
        r"must have a multiple of 4 rows, got shape \(32,\)",
        _rows(row("t", (32,), IQ4_NL_R4)),
    ),
    "product wraps to 0": (f"needs {2**68} bytes", _rows(row("t", (2**33, 2**33)))),
    "product wraps to little": (f"needs {2**66} bytes", _rows(row("t", (2**16,) * 4))),
    "product wraps to what is there": (f"needs {4 * (2**62 + 1) * 4} bytes", _rows(row("t", (2**62 + 1, 4)))),
    "dimensions of 2**64 - 1": (f"needs {4 * HUGE**4} bytes", _rows(row("t", (HUGE,) * 4))),
    "odd offset": ("'t' must begin at a multiple of 32, got offset 8", _rows(row("t", (4,), 0, 8))),
    "offset past the end": (
        "'t' at byte .* needs 16 bytes, 0 are left; the file is cut off or damaged",
        _rows(row("t", (4,), 0, 2**20)),
    ),
    "offset that wraps": ("'t' at byte .* needs 16 bytes, 0 are left", _rows(row("t", (4,), 0, 2**64 - 32))),
    "end past the end": ("'t' at byte .* needs 68 bytes, 64 are left", _rows(row("t", (17,)))),
    "no data": ("'t' at byte 64 needs 16 bytes, 0 are left", _rows(row("t", (4,)), data=0)),
    "overlap": (
        "'u' at byte 128 overlaps tensor 't', which ends at byte 132",
        _rows(row("t", (9,)), row("u", (4,), 0, 32)),
    ),
    "overlap in the other order": (
        "'u' at byte 128 overlaps tensor 't', which",
        _rows(row("u", (4,), 0, 32), row("t", (9,))),
    ),
    "same place": ("'u' at byte 96 overlaps tensor 't'", _rows(row("t", (4,)), row("u", (4,)))),
    "one tensor within another": (
        "'u' at byte 128 overlaps tensor 't'",
        _rows(row("t", (32,)), row("u", (4,), 0, 32), data=128),
    ),
}


def _many_keys(first=()):
    return container([*first, *(pair(f"{index:x}", (U8, b"\0")) for index in range(50_000))])


def _many_tensors(step):
    names = [f"{index:x}" for index in range(29_000)]
    rows = [row(name, (), 24, index) for index, name in enumerate(names)]
    return container([pair("general.alignment", u32(1))], rows[::step], data=29_000)


_NO_MODEL = "key 'general.architecture' is None, supported is 'deepseek2'"

COSTLY = {  # under 1 MB each, and sound as containers
    "50000 keys": (_NO_MODEL, _many_keys),
    "50000 keys and a wide one": (_NO_MODEL, lambda: _many_keys([pair("k" * 65_535, u32(1))])),
    "29000 tensors": (_NO_MODEL, lambda: _many_tensors(1)),
    "29000 tensors from the last to the first": (_NO_MODEL, lambda: _many_tensors(-1)),
    "120000 strings of no bytes": (_NO_MODEL, lambda: _key(array(STRING, 120_000, bytes(960_000)))),
    "80000 arrays of none": (_NO_MODEL, lambda: _key(array(ARRAY, 80_000, bytes(960_000)))),
    "a million numbers": (_NO_MODEL, lambda: _key(array(U8, 990_000, bytes(990_000)))),
    "a million bools": (_NO_MODEL, lambda: _key(array(BOOL, 990_000, bytes(990_000)))),
    "a string of a million bytes": (_NO_MODEL, lambda: _key(text(b"\xff" * 990_000))),
    "an architecture of a million bytes": (
        r"'general.architecture' is '.udcff.*\.\.\., supported",
        lambda: container([pair("general.architecture", text(b"\xff" * 990_000))]),
    ),
    "an architecture of 120000 texts": (
        r"'general.architecture' is \['', '', .*\.\.\., supported",
        lambda: container([pair("general.architecture", texts([""] * 120_000))]),
    ),
}


CONTAINERS = HEADS | KEYS | ARRAYS | ALIGNMENTS | TENSORS
