"""Seeded mutations of the small model of `gguf_pieces`, made knowing where its numbers and rows are."""

import functools
import random
import struct

import gguf_pieces as pieces

_HEAD_BYTES = 24
_NUMBERS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 24, 31, 32, 33, 64, 127, 128, 255, 256, 4096, 65_535]
_NUMBERS += [2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 33, 2**64 - 1]
_SCALAR_BYTES = {value_type: struct.calcsize(letter) for value_type, letter in pieces.LETTERS.items()}


class Mutator:
    """Makes files that differ from the small model in one to four places.

    Args:
      seed: what they are depends on it alone.
      keys: changes to the keys of the small model.
    """

    def __init__(self, seed, keys=None):
        self.random = random.Random(seed)
        values = pieces.changed(pieces.KEYS, keys or {})
        self.pairs = [pieces.pair(key, value) for key, value in values.items()]
        self.rows, num_bytes = pieces.model_rows(pieces.TENSORS)
        self.data = bytes(num_bytes)

    def __call__(self):
        """Returns the bytes of the next file."""
        pairs, rows = list(self.pairs), list(self.rows)
        counts = None
        if self.random.random() < 0.4:
            self._mutate_items(self.random.choice((pairs, pairs, rows)))
            if self.random.random() < 0.2:
                counts = len(self.rows), len(self.pairs)
        counts = counts or (len(rows), len(pairs))
        head = bytearray(pieces.start(*counts))
        for item in pairs + rows:
            head += item
        if len(pairs) == len(self.pairs) and len(rows) == len(self.rows) and self.random.random() < 0.6:
            self._mutate_field(head, pairs, rows)
        while self.random.random() < 0.4:
            self._mutate_bytes(head)
        data = self.data[: self._number(len(self.data))] if self.random.random() < 0.05 else self.data
        return bytes(head) + bytes(-len(head) % pieces.ALIGNMENT) + data

    def _number(self, size):
        """Returns a number that is likely to hurt where a number of `size` would do."""
        near = [size - 1, size + 1, size // 2, 2 * size, self.random.randrange(300)]
        return max(0, self.random.choice(_NUMBERS + near * 3))

    def _mutate_items(self, items):
        """Swaps, repeats, drops or reorders key-values or rows, or swaps what is in two of them."""
        one, other = self.random.randrange(len(items)), self.random.randrange(len(items))
        kind = self.random.randrange(5)
        if kind == 0:
            items[one], items[other] = items[other], items[one]
        elif kind == 1:
            items.insert(other, items[one])
        elif kind == 2:
            del items[one]
        elif kind == 3:
            self.random.shuffle(items)
        else:
            cuts = [8 + struct.unpack_from("<Q", items[place])[0] for place in (one, other)]
            items[one], items[other] = (
                items[one][: cuts[0]] + items[other][cuts[1] :],
                items[other][: cuts[1]] + items[one][cuts[0] :],
            )

    def _mutate_field(self, head, pairs, rows):
        """Overwrites a length, a count, a type, a dimension, an offset or a value."""
        index = self.random.randrange(len(pairs) + len(rows) + 1)
        if index == len(pairs) + len(rows):
            place, size = self.random.choice(((4, 4), (8, 8), (16, 8)))
        else:
            fields = _fields_of_pair if index < len(pairs) else _fields_of_row
            items = pairs + rows
            place, size = self.random.choice(fields(items[index]))
            place += _HEAD_BYTES + sum(map(len, items[:index]))
        old = int.from_bytes(head[place : place + size], "little")
        head[place : place + size] = (self._number(old) % 256**size).to_bytes(size, "little")

    def _mutate_bytes(self, head):
        """Flips a bit, overwrites a number anywhere, or deletes, repeats or inserts a few bytes."""
        place, kind = self.random.randrange(len(head)), self.random.randrange(6)
        length = min(self.random.choice((1, 1, 2, 4, 8, 8, 20, 100)), len(head) - place)
        if kind == 0:
            head[place] ^= 1 << self.random.randrange(8)
        elif kind == 1:
            head[place] = self.random.randrange(256)
        elif kind == 2:
            number = self._number(len(head)) % 256**length
            head[place : place + length] = number.to_bytes(length, "little")
        elif kind == 3 and len(head) > 200:
            del head[place : place + length]
        elif kind == 4:
            head[place:place] = head[place : place + length]
        else:
            head[place:place] = self.random.randbytes(length)


@functools.cache
def _fields_of_pair(item):
    """Returns (place, bytes) of the numbers in a key-value."""
    value_type_at = 8 + struct.unpack_from("<Q", item)[0]
    (value_type,) = struct.unpack_from("<I", item, value_type_at)
    at = value_type_at + 4
    fields = [(0, 8), (value_type_at, 4)]
    if value_type == pieces.ARRAY:
        (element_type,) = struct.unpack_from("<I", item, at)
        fields += [(at, 4), (at + 4, 8)]
        at += 12
        value_type = element_type
    size = 8 if value_type == pieces.STRING else _SCALAR_BYTES[value_type]
    return [*fields, (at, size)] if at + size <= len(item) else fields


@functools.cache
def _fields_of_row(item):
    """Returns (place, bytes) of the numbers in a row of the tensor table."""
    at = 8 + struct.unpack_from("<Q", item)[0]
    (num_dims,) = struct.unpack_from("<I", item, at)
    dims = [(at + 4 + 8 * axis, 8) for axis in range(num_dims)]
    after = at + 4 + 8 * num_dims
    return [(0, 8), (at, 4), *dims, (after, 4), (after + 4, 8)]
