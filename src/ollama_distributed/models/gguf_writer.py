"""Writes a GGUF v3 file into memory: only what small made-up models need.

Pure and without numpy, so that the self-test of an engine can make its model anywhere
the node runs. Source: ggml's `docs/gguf.md` (little-endian, alignment 32).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from enum import IntEnum

import msgspec

ALIGNMENT = 32
"""Bytes; GGUF's default, so that no `general.alignment` has to be written."""


class TensorType(IntEnum):
    """`ggml_type` of the tensors written here."""

    F32 = 0
    F16 = 1


class U32(int):
    """An unsigned 32-bit value; a plain `int` is written as signed 32-bit."""


class I32Array(tuple[int, ...]):
    """An array of signed 32-bit values."""


class F32Array(tuple[float, ...]):
    """An array of 32-bit floats."""


class StringArray(tuple[bytes, ...]):
    """An array of byte strings."""


Value = U32 | bool | float | str | I32Array | F32Array | StringArray


class Tensor(msgspec.Struct, frozen=True):
    name: str
    shape: tuple[int, ...]
    """GGUF's order: the length of a row first."""
    type: TensorType
    data: bytes


_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


def write_gguf(metadata: Mapping[str, Value], tensors: Sequence[Tensor]) -> bytes:
    """The whole file. `metadata` needs `general.architecture`; order is kept."""
    head = bytearray(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        head += _string(key.encode()) + _value(value)
    offset = 0
    for tensor in tensors:
        head += _string(tensor.name.encode())
        head += struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
        head += struct.pack("<IQ", tensor.type, offset)
        offset += _padded(len(tensor.data))
    head += bytes(_padded(len(head)) - len(head))
    for tensor in tensors:
        head += tensor.data + bytes(_padded(len(tensor.data)) - len(tensor.data))
    return bytes(head)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _value(value: Value) -> bytes:
    match value:
        case bool():
            return struct.pack("<I?", _BOOL, value)
        case U32():
            return struct.pack("<II", _UINT32, value)
        case float():
            return struct.pack("<If", _FLOAT32, value)
        case str():
            return struct.pack("<I", _STRING) + _string(value.encode())
        case StringArray():
            body = b"".join(map(_string, value))
            return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + body
        case I32Array():
            return struct.pack(f"<IIQ{len(value)}i", _ARRAY, _INT32, len(value), *value)
        case F32Array():
            return struct.pack(f"<IIQ{len(value)}f", _ARRAY, _FLOAT32, len(value), *value)
