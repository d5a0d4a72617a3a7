"""A table of crafted GGUF files, each with one thing wrong and the words its sentence must have.

    python tests/checkpoints_tools/crafted.py FOLDER

writes them all, each in a folder of its own, and prints what is wrong with each.
"""

import pathlib
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

import crafted_containers
import crafted_models
from gguf_pieces import (
    BOOL,
    HUGE,
    I64,
    U16,
    U64,
    container,
    pair,
    row,
    scalar,
    text,
    u32,
)


class Crafted(NamedTuple):
    """Files of which the first is to be opened.

    Attributes:
      level: who must refuse it: the reader of the "container", the check of the "model", or that of the
        "vocabulary".
      words: regular expression that the sentence must match.
      files: gives name -> bytes.
    """

    level: str
    words: str
    files: Callable[[], dict[str, bytes]]


def _part(number, count=2, tensors="t", total=2, keys=()):
    values = {"split.no": number, "split.count": count, "split.tensors.count": total}
    pairs = [
        pair(key, value if isinstance(value, tuple) else scalar(U16, value))
        for key, value in values.items()
        if value is not None
    ]
    rows = [row(name, (4,), 0, 32 * index) for index, name in enumerate(tensors)]
    return container([*pairs, *keys], rows)


_NAMES = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
_FIRST, _SECOND = _part(0), _part(1, tensors="u")
_ARCHITECTURES = [(pair("general.architecture", text(name)),) for name in ("deepseek2", "llama")]

SPLITS = {  # the bytes of the first part and of the second
    "part missing": ("00002-of-00002.gguf: cannot be read: No such file", [_FIRST]),
    "part twice": ("00002-of-.*'split.no' must be 1, got 0", [_FIRST, _FIRST]),
    "parts the wrong way round": ("00001-of-.*'split.no' must be 0, got 1", [_SECOND, _FIRST]),
    "part without a number": ("'split.no' must be 1, got None", [_FIRST, _part(None, tensors="u")]),
    "part number a text": ("'split.no' must be 1, got '1'", [_FIRST, _part(text("1"), tensors="u")]),
    "part number true": ("'split.no' must be 1, got True", [_FIRST, _part(scalar(BOOL, True), tensors="u")]),
    "part of another count": ("00002-of-.*'split.count' must be 2, got 3", [_FIRST, _part(1, 3, "u")]),
    "tensor in two parts": ("00002-of-.*tensor 't' is also in .*00001-of", [_FIRST, _part(1)]),
    "too few tensors": ("'split.tensors.count' must be 2, got 3", [_part(0, total=3), _SECOND]),
    "no count of tensors": ("'split.tensors.count' must be 2, got None", [_part(0, total=None), _SECOND]),
    "part cut off": ("00002-of-.*needs 16 bytes, 8 are left", [_FIRST, _SECOND[:-56]]),
    "part of another kind": ("00002-of-.*is not a GGUF file", [_FIRST, b"PK\3\4" + bytes(60)]),
    "part of another architecture": (
        "00002-of-.*'general.architecture' must be 'deepseek2', got 'llama'",
        [_part(0, keys=_ARCHITECTURES[0]), _part(1, tensors="u", keys=_ARCHITECTURES[1])],
    ),
    "more parts than the name says": (
        "is one of 9 parts, .* must end in -00001-of-00009",
        [_part(0, 9), _SECOND],
    ),
    "99999 parts": ("is one of 99999 parts, so its name must end in", [_part(0, scalar(U64, 99_999))]),
    "100000 parts": (
        r"'split.count' must be an integer in \[0, 99999\], got 100000",
        [_part(0, u32(100_000))],
    ),
    "2**64 - 1 parts": (f"'split.count' must be an integer .*, got {HUGE}", [_part(0, scalar(U64, HUGE))]),
    "-1 parts": ("'split.count' must be an integer .*, got -1", [_part(0, scalar(I64, -1))]),
    "a text of parts": ("'split.count' must be an integer .*, got '2'", [_part(0, text("2"))]),
    "a long text of parts": (r"'split.count' must be .*, got '2{76}\.\.\.", [_part(0, text("2" * 900_000))]),
}


def _table():
    table = {}
    for name, (words, data) in crafted_containers.CONTAINERS.items():
        table[name] = Crafted("container", words, lambda data=data: {"bad.gguf": data})
    for name, (words, parts) in SPLITS.items():
        files = dict(zip(_NAMES, parts, strict=False))
        table[name] = Crafted("container", words, lambda files=files: files)
    for name, (words, make) in crafted_containers.COSTLY.items():
        table[name] = Crafted("model", words, lambda make=make: {"bad.gguf": make()})
    for level, part in (("model", crafted_models.MODELS), ("vocabulary", crafted_models.VOCABULARIES)):
        for name, (words, make) in part.items():
            table[name] = Crafted(level, words, lambda make=make: {"bad.gguf": make()})
    return table


TABLE = _table()


def write(entry, folder):
    """Writes the files of an entry and returns the path of the one to open."""
    paths = []
    for name, data in entry.files().items():
        paths.append(folder / name)
        paths[-1].write_bytes(data)
    return paths[0]


def main(folder):
    for name, entry in TABLE.items():
        place = pathlib.Path(folder) / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        place.mkdir(parents=True)
        print(f"{write(entry, place)}: {name} ({entry.level})")


if __name__ == "__main__":
    main(sys.argv[1])
