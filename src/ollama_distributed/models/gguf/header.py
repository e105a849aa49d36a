"""Reads a GGUF header strictly: nothing that lies gets past it to a runner.

Works on the first bytes of a file and its true size; opens nothing itself. Each count,
length and offset is checked against what is really there before it is used, so a lying
count never allocates. Big arrays (vocabularies) are walked, not kept, unless asked for.
Sources: ggml `docs/gguf.md`, `gguf.cpp`; flaws it must stop: security table, row C.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from ollama_distributed.base.errors import InvalidModel
from ollama_distributed.models.gguf.types import ARRAY, BOOL, SCALARS, STRING, TENSOR_TYPES, TensorType

MAGIC = b"GGUF"
VERSIONS = frozenset({2, 3})

MAX_METADATA_BYTES = 64 << 20
"""A vocabulary of 262,000 tokens with its merges takes 16 MiB; past this it is an attack on memory."""
MAX_HEADER_BYTES = MAX_METADATA_BYTES + (8 << 20)
"""With the table of as many tensors as there may be."""
MAX_PAIRS = 65_536
MAX_TENSORS = 65_536
"""The largest models known have about 5,000."""
MAX_KEY_BYTES = 65_535
MAX_TENSOR_NAME_BYTES = 63
"""ggml's names hold 64 bytes with their end (`GGML_MAX_NAME`)."""
MAX_STRING_BYTES = 4 << 20
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 64 << 10
MAX_ELEMENTS = (1 << 63) - 1
DEFAULT_ALIGNMENT = 32
KEPT_ARRAY = 1_024
"""Arrays up to this length are kept without being asked for: tags, numbers per layer."""
MAX_ARRAYS_BYTES = 96 << 20
"""Memory of the arrays that are kept; the others are walked. Python's objects take up to 20 times what the
file does; a vocabulary of 262,000 tokens with its merges takes 72 MiB, and is kept only on demand."""
MAX_TEXTS_BYTES = 24 << 20
"""Memory of keys and texts; past it the file is refused. A template takes 0.1 MiB."""
_NUMBER_BYTES = 40
"""A number that is an object of its own, and the place that holds it."""
_PAIR_BYTES = 150
"""What a pair takes beside its key's text and its value."""

_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")


class NeedMore(Exception):
    """The bytes given end before the header does; the file itself goes on."""


class Array(msgspec.Struct, frozen=True):
    """An array of metadata; `values` is None when it was too long to keep."""

    length: int
    values: tuple[bool | int | float | str, ...] | None


Scalar = bool | int | float | str
Value = Scalar | Array


class Tensor(msgspec.Struct, frozen=True):
    name: str
    type: TensorType
    shape: tuple[int, ...]
    """Innermost dimension first, as in the file."""
    offset: int
    """Bytes from the start of the data section."""
    elements: int
    size: int
    """Bytes."""


class Header(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    metadata: dict[str, Value]
    tensors: tuple[Tensor, ...]
    alignment: int
    data_offset: int
    """Where the data section starts in the file."""
    file_size: int


def read_header(
    data: bytes | memoryview,
    file_size: int | None = None,
    *,
    verbose: bool = False,
    enough: Callable[[Mapping[str, Value]], bool] | None = None,
) -> Header:
    """Read the header at the start of `data`, the first bytes of a file of `file_size` bytes.

    `verbose` keeps arrays of any length, within `MAX_ARRAYS_BYTES`. `enough`: asked before each array (of
    which it sees the length) whether what came before it will do; then nothing more is read, and the
    header has no tensors.

    Raises:
        NeedMore: `data` is shorter than the file and ends inside the header.
        InvalidModel: the file is no GGUF, or is damaged or hostile; the message says where.
    """
    size = len(data) if file_size is None else file_size
    cursor = _Cursor(memoryview(data), size)
    try:
        return _read(cursor, size, verbose=verbose, enough=enough)
    except (struct.error, IndexError):
        # Only reads behind the end of `data` come here; every other bound is checked before use.
        raise cursor.at_end() from None


class _Cursor:
    """Position in the bytes; refuses every length that the file cannot hold."""

    def __init__(self, view: memoryview, file_size: int) -> None:
        self.view = view
        self.position = 0
        self.file_size = file_size
        self._arrays = self._texts = 0

    def keeps(self, count: int) -> bool:
        """Whether an array, or a part of one, may take so many bytes of memory; then they are taken."""
        if self._arrays + count > MAX_ARRAYS_BYTES:
            return False
        self._arrays += count
        return True

    def keep_text(self, text: str, beside: int = 0) -> None:
        self._texts += sys.getsizeof(text) + beside
        if self._texts > MAX_TEXTS_BYTES:
            raise InvalidModel(f"GGUF metadata takes over {MAX_TEXTS_BYTES >> 20} MiB of memory")

    def at_end(self) -> Exception:
        if len(self.view) < self.file_size:
            return NeedMore()
        return InvalidModel("GGUF file is cut short: it ends inside its header")

    def u32(self) -> int:
        value: int = _U32.unpack_from(self.view, self.position)[0]
        self.position += 4
        return value

    def u64(self) -> int:
        value: int = _U64.unpack_from(self.view, self.position)[0]
        self.position += 8
        return value

    def take(self, length: int, what: str) -> bytes:
        """The next `length` bytes, which the header may not run out of."""
        end = self.position + length
        if end > self.file_size:
            raise InvalidModel(f"GGUF file is cut short: {what} of {length} bytes does not fit in the file")
        if end > MAX_METADATA_BYTES:
            raise InvalidModel(f"GGUF header is over {MAX_METADATA_BYTES >> 20} MiB")
        if end > len(self.view):
            raise NeedMore()
        piece = bytes(self.view[self.position : end])
        self.position = end
        return piece

    def string(self, what: str, limit: int) -> bytes:
        length = self.u64()
        if length > limit:
            raise InvalidModel(f"GGUF {what} claims {length} bytes; at most {limit} are allowed")
        return self.take(length, what)


def _read(
    cursor: _Cursor,
    file_size: int,
    *,
    verbose: bool,
    enough: Callable[[Mapping[str, Value]], bool] | None,
) -> Header:
    if file_size < 4 or bytes(cursor.view[:4]) != MAGIC:
        raise InvalidModel("supplied file was not in GGUF format")
    if file_size < 24:
        raise InvalidModel("GGUF file is cut short: it ends inside its header")
    cursor.position = 4
    version = cursor.u32()
    if version not in VERSIONS:
        if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
            raise InvalidModel("GGUF file is big-endian; only little-endian files can be run")
        raise InvalidModel(f"GGUF version {version} is not supported; versions 2 and 3 are")
    tensor_count = cursor.u64()
    pair_count = cursor.u64()
    if tensor_count > MAX_TENSORS:
        raise InvalidModel(f"GGUF header claims {tensor_count} tensors; at most {MAX_TENSORS} are allowed")
    if pair_count > MAX_PAIRS:
        raise InvalidModel(f"GGUF header claims {pair_count} metadata pairs; at most {MAX_PAIRS} are allowed")

    metadata: dict[str, Value] = {}
    for _ in range(pair_count):
        key = _name(cursor.string("metadata key", MAX_KEY_BYTES), "metadata key")
        if key in metadata:
            raise InvalidModel(f"GGUF metadata has the key {key!r} twice")
        cursor.keep_text(key, _PAIR_BYTES)
        if enough is not None and (coming := _coming(cursor)) is not None:
            metadata[key] = coming
            if enough(metadata):
                return Header(
                    version=version,
                    metadata=metadata,
                    tensors=(),
                    alignment=DEFAULT_ALIGNMENT,
                    data_offset=0,
                    file_size=file_size,
                )
        metadata[key] = _value(cursor, key, verbose=verbose)
    alignment = _alignment(metadata)
    tensors = tuple(_tensor(cursor, alignment) for _ in range(tensor_count))

    data_offset = _padded(cursor.position, alignment)
    _check_ranges(tensors, data_offset, file_size)
    return Header(
        version=version,
        metadata=metadata,
        tensors=tensors,
        alignment=alignment,
        data_offset=data_offset,
        file_size=file_size,
    )


def _coming(cursor: _Cursor) -> Array | None:
    """The array that comes next, without its values; None: it is no array."""
    start = cursor.position
    try:
        if cursor.u32() != ARRAY:
            return None
        cursor.u32()
        return Array(cursor.u64(), None)
    finally:
        cursor.position = start


def _value(cursor: _Cursor, key: str, *, verbose: bool) -> Value:
    kind = cursor.u32()
    if kind == STRING:
        text = cursor.string(f"value of {key!r}", MAX_STRING_BYTES).decode("utf-8", "replace")
        cursor.keep_text(text)
        return text
    if kind == ARRAY:
        return _array(cursor, key, verbose=verbose)
    return _scalar(cursor, kind, key)


def _scalar(cursor: _Cursor, kind: int, key: str) -> Scalar:
    if kind not in SCALARS:
        raise InvalidModel(f"GGUF metadata {key!r} has the unknown type {kind}")
    code, size = SCALARS[kind]
    (value,) = struct.unpack("<" + code, cursor.take(size, f"value of {key!r}"))
    if kind == BOOL:
        if value > 1:
            raise InvalidModel(f"GGUF metadata {key!r} is a bool with the value {value}")
        return bool(value)
    scalar: Scalar = value
    return scalar


def _array(cursor: _Cursor, key: str, *, verbose: bool) -> Array:
    kind = cursor.u32()
    length = cursor.u64()
    what = f"array {key!r}"
    if kind == ARRAY:
        raise InvalidModel(f"GGUF {what} holds arrays; no runner reads nested arrays")
    keep = verbose or length <= KEPT_ARRAY
    if kind == STRING:
        # 8 bytes is the least that a string takes: refuse a count that cannot fit before walking.
        _check_count(cursor, length, 8, what)
        kept = _kept_strings(cursor, length, what) if keep else None
        if kept is None:
            _skip_strings(cursor, length, what)
        return Array(length, kept)
    if kind not in SCALARS:
        raise InvalidModel(f"GGUF {what} holds the unknown type {kind}")
    code, size = SCALARS[kind]
    _check_count(cursor, length, size, what)
    packed = cursor.take(length * size, what)
    if not keep or not cursor.keeps(length * (_NUMBER_BYTES if size > 1 else 8)):
        return Array(length, None)
    values = struct.unpack(f"<{length}{code}", packed)
    return Array(length, tuple(bool(value) for value in values) if kind == BOOL else values)


def _check_count(cursor: _Cursor, length: int, size: int, what: str) -> None:
    if length * size > min(MAX_METADATA_BYTES, cursor.file_size) - cursor.position:
        raise InvalidModel(f"GGUF {what} claims {length} elements, more than the header can hold")


def _kept_strings(cursor: _Cursor, length: int, what: str) -> tuple[str, ...] | None:
    """None, and the cursor where it was: they take too much memory."""
    start = cursor.position
    kept: list[str] = []
    for _ in range(length):
        text = cursor.string(what, MAX_STRING_BYTES).decode("utf-8", "replace")
        if not cursor.keeps(8 + sys.getsizeof(text)):
            cursor.position = start
            return None
        kept.append(text)
    return tuple(kept)


def _skip_strings(cursor: _Cursor, length: int, what: str) -> None:
    """Walk over strings without making them: 300,000 take about 30 ms."""
    view, position = cursor.view, cursor.position
    unpack = _U64.unpack_from
    end = len(view)
    for _ in range(length):
        (size,) = unpack(view, position)
        if size > MAX_STRING_BYTES:
            raise InvalidModel(f"GGUF {what} has a string that claims {size} bytes")
        position += 8 + size
        if position > end:
            if position > cursor.file_size:
                raise InvalidModel(f"GGUF file is cut short: {what} does not fit in the file")
            raise NeedMore()
    if position > MAX_METADATA_BYTES:
        raise InvalidModel(f"GGUF header is over {MAX_METADATA_BYTES >> 20} MiB")
    cursor.position = position


def _alignment(metadata: dict[str, Value]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or isinstance(alignment, bool):
        raise InvalidModel("GGUF general.alignment is no number")
    if not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise InvalidModel(f"GGUF alignment {alignment} is no power of two up to {MAX_ALIGNMENT}")
    return alignment


def _tensor(cursor: _Cursor, alignment: int) -> Tensor:
    name = _name(cursor.string("tensor name", MAX_TENSOR_NAME_BYTES), "tensor name")
    dimensions = cursor.u32()
    if dimensions > MAX_DIMENSIONS:
        raise InvalidModel(f"GGUF tensor {name!r} has {dimensions} dimensions; at most 4 are allowed")
    shape = tuple(cursor.u64() for _ in range(dimensions))
    elements = 1
    for extent in shape:
        elements *= extent
        # 0 would make ggml divide by zero; over 2^63 its sums wrap round.
        if extent == 0 or elements > MAX_ELEMENTS:
            raise InvalidModel(f"GGUF tensor {name!r} has the impossible shape {list(shape)}")
    kind = cursor.u32()
    if kind not in TENSOR_TYPES:
        raise InvalidModel(f"GGUF tensor {name!r} has the unknown type {kind}")
    packing = TENSOR_TYPES[kind]
    row = shape[0] if shape else 1
    if row % packing.block:
        raise InvalidModel(
            f"GGUF tensor {name!r}: rows of {row} are no multiple of the block of {packing.block} "
            f"that {packing.name} needs"
        )
    size = elements // packing.block * packing.size
    if size > MAX_ELEMENTS:
        raise InvalidModel(f"GGUF tensor {name!r} has the impossible shape {list(shape)}")
    offset = cursor.u64()
    if offset % alignment:
        raise InvalidModel(f"GGUF tensor {name!r} starts at {offset}, not at a multiple of {alignment}")
    return Tensor(name=name, type=packing, shape=shape, offset=offset, elements=elements, size=size)


def _check_ranges(tensors: tuple[Tensor, ...], data_offset: int, file_size: int) -> None:
    """Each tensor lies inside the file and on no other one; names are unique."""
    names: set[str] = set()
    for tensor in tensors:
        if tensor.name in names:
            raise InvalidModel(f"GGUF file has the tensor {tensor.name!r} twice")
        names.add(tensor.name)
        if data_offset + tensor.offset + tensor.size > file_size:
            raise InvalidModel(
                f"GGUF tensor {tensor.name!r} reaches past the end of the file "
                f"({data_offset + tensor.offset + tensor.size} of {file_size} bytes): "
                "the file is cut short or lies"
            )
    end = 0
    previous = ""
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if tensor.offset < end:
            raise InvalidModel(f"GGUF tensors {previous!r} and {tensor.name!r} overlap")
        end = tensor.offset + tensor.size
        previous = tensor.name


def _name(raw: bytes, what: str) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidModel(f"GGUF {what} is not UTF-8") from None
    if not name or not name.isprintable():
        raise InvalidModel(f"GGUF {what} is empty or holds control characters")
    return name


def _padded(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def is_uint(value: Value | None) -> bool:
    """A whole number that is not negative (bools are no numbers here)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
