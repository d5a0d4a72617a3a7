"""The key-values of a GGUF file: exact bytes for the writer, plain Python values for everyone else."""

import dataclasses
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

# Numbers of the value types in the file, and struct letters of those with a fixed size.
BOOL, STRING, ARRAY = 7, 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", BOOL: "?", 10: "Q", 11: "q", 12: "d"}
_NAMES = dict(zip(range(13), "u8 i8 u16 i16 u32 i32 f32 bool string array u64 i64 f64".split(), strict=True))
_TYPES = {name: value_type for value_type, name in _NAMES.items()}


@dataclasses.dataclass(frozen=True)
class Field:
    """One value as it is in the file.

    Attributes:
      type: number of the value type.
      raw: the value's bytes; those of an array begin with its element type and count, those of a string with
        its length.
    """

    type: int
    raw: bytes

    @property
    def type_name(self) -> str:
        """Name of the type, for example "u32" or "string[]"."""
        return _NAMES[self.type] if self.type != ARRAY else f"{_NAMES[self._element_type]}[]"

    @property
    def count(self) -> int | None:
        """Number of elements of an array; None for anything else."""
        return struct.unpack_from("<Q", self.raw, 4)[0] if self.type == ARRAY else None

    @property
    def _element_type(self) -> int:
        return struct.unpack_from("<I", self.raw)[0]

    def value(self, limit: int | None = None) -> Any:
        """Decodes to bool, int, float, str, or a list of these, of which at most `limit` are decoded."""
        return _decode(self.type, self.raw, 0, limit)[0]

    @classmethod
    def of(cls, value: Any, type_name: str | None = None) -> "Field":
        """Encodes a Python value.

        Args:
          value: bool, int, float, str, or a list or NumPy array of one of these.
          type_name: "u8" to "f64", "bool" or "string", of the elements for a list. None: bool and str as they
            are, float as "f32", int as the first that fits of "u32", "i32", "u64" and "i64", in a list of
            "i32", "u32", "i64" and "u64" as other writers do; arrays keep their dtype.

        Returns:
          The field.

        Raises:
          ValueError: if the value has no such type or does not fit it.
        """
        if isinstance(value, np.ndarray):
            type_name = type_name or _name_of_dtype(value.dtype)
            value = value.tolist()
        is_array = isinstance(value, list | tuple)
        elements = value if is_array else [value]
        element_type = _TYPES[type_name or _infer(elements, is_array)]
        raw = _encode(element_type, elements)
        if is_array:
            return cls(ARRAY, struct.pack("<IQ", element_type, len(elements)) + raw)
        return cls(element_type, raw)


class Metadata(Mapping[str, Any]):
    """Key-values of a file in their order: a mapping from key to plain Python value, decoded when asked for.

    Attributes:
      fields: the same key-values with exact types and bytes.
    """

    def __init__(self, fields: Mapping[str, Field]):
        self.fields = dict(fields)
        self._values: dict[str, Any] = {}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Metadata":
        """Encodes plain values as `Field.of` does; fields are taken as they are."""
        return cls({k: v if isinstance(v, Field) else Field.of(v) for k, v in values.items()})

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            self._values[key] = self.fields[key].value()
        return self._values[key]

    def __contains__(self, key: object) -> bool:
        return key in self.fields

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields)

    def __len__(self) -> int:
        return len(self.fields)

    def __repr__(self) -> str:
        return f"Metadata({len(self)} keys)"


def _decode(value_type: int, raw: bytes, at: int, limit: int | None) -> tuple[Any, int]:
    if value_type == ARRAY:
        element_type, count = struct.unpack_from("<IQ", raw, at)
        return _decode_array(element_type, raw, at + 12, count if limit is None else min(count, limit))
    if value_type == STRING:
        values, at = _decode_array(STRING, raw, at, 1)
        return values[0], at
    (value,) = struct.unpack_from("<" + SCALARS[value_type], raw, at)
    return value, at + struct.calcsize("<" + SCALARS[value_type])


def _decode_array(element_type: int, raw: bytes, at: int, count: int) -> tuple[list, int]:
    if element_type in SCALARS:
        elements = np.frombuffer(raw, np.dtype(SCALARS[element_type]).newbyteorder("<"), count, at)
        return elements.tolist(), at + elements.nbytes
    values = []
    if element_type == ARRAY:
        for _ in range(count):
            value, at = _decode(ARRAY, raw, at, None)
            values.append(value)
        return values, at
    unpack_length = struct.Struct("<Q").unpack_from
    for _ in range(count):
        start = at + 8
        at = start + unpack_length(raw, at)[0]
        # Token texts need not be whole characters; surrogates keep their bytes.
        values.append(raw[start:at].decode("utf-8", "surrogateescape"))
    return values, at


def _infer(elements: list | tuple, is_array: bool) -> str:
    kinds = {type(element) for element in elements}
    if kinds == {bool}:
        return "bool"
    if kinds == {str}:
        return "string"
    if kinds == {int, float} or kinds == {float}:
        return "f32"
    if kinds == {int}:
        low, high = min(elements), max(elements)
        for name in ("i32", "u32", "i64", "u64") if is_array else ("u32", "i32", "u64", "i64"):
            limits = np.iinfo(SCALARS[_TYPES[name]])
            if limits.min <= low and high <= limits.max:
                return name
    found = ", ".join(sorted(kind.__name__ for kind in kinds)) or "an empty list, which needs a type name"
    raise ValueError(
        f"a GGUF value must be bool, int up to 64 bits, float, str or a list of one, got {found}."
    )


def _name_of_dtype(dtype: np.dtype) -> str:
    for value_type, letter in SCALARS.items():
        if np.dtype(letter) == dtype:
            return _NAMES[value_type]
    raise ValueError(f"a GGUF array must have an integer, float32, float64 or bool dtype, got {dtype}.")


def _encode(element_type: int, elements: list | tuple) -> bytes:
    if element_type == STRING:
        texts = [element.encode("utf-8", "surrogateescape") for element in elements]
        return b"".join(struct.pack("<Q", len(text)) + text for text in texts)
    try:
        return struct.pack(f"<{len(elements)}{SCALARS[element_type]}", *elements)
    except (struct.error, OverflowError) as error:
        raise ValueError(f"a value does not fit {_NAMES[element_type]}: {error}.") from None
