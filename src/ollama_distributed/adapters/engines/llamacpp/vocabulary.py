"""Finds the ids of tokens that llama-server does not send.

While the text ends inside a UTF-8 sequence the server sends nothing, and then only the
token that completed the character: an emoji of four byte tokens arrives with one id.
`tokens_predicted` tells how many are missing and the text tells their bytes, so they
follow from the vocabulary. Exact wherever the bytes have one decomposition; where they
have several, the one that BPE itself would write (merges of the lowest rank first).

Reads the GGUF's vocabulary once per file, keeping only pieces that are not UTF-8 alone.
Source: `server_context::process_token` and `validate_utf8` of llama.cpp b11549.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ollama_distributed.base.errors import InvalidModel
from ollama_distributed.models.gguf.header import (
    MAX_HEADER_BYTES,
    Array,
    Header,
    NeedMore,
    Scalar,
    Value,
    read_header,
)

_TYPE_NORMAL, _TYPE_BYTE = 1, 6
"""`tokenizer.ggml.token_type`"""
FIRST_READ_BYTES = 8 * 1024 * 1024
"""Holds the header of a model with 150,000 tokens."""
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
MAX_WITHHELD = 8
"""Tokens to look for at once; a character has at most four bytes."""
MAX_PIECE = 128
"""Bytes of such a token: those of trained vocabularies have up to some twenty."""
MAX_LOOKS = 10_000
"""For the tokens of one text: a few milliseconds. Trained vocabularies need some hundred; one that was made
for it has more ways to write a text than can ever be tried."""


class Fragments:
    """Tokens whose bytes are not whole characters."""

    def __init__(self, pieces: Mapping[int, bytes]) -> None:
        self._bytes = dict(pieces)
        self._ids: dict[bytes, list[int]] = {}
        for token in sorted(pieces):
            self._ids.setdefault(pieces[token], []).append(token)
        self._longest = min(max(map(len, self._ids), default=0), MAX_PIECE)
        self._looks = 0

    def withheld(self, count: int, text: str, last: int) -> tuple[int, ...] | None:
        """The `count` ids that came before `last` and made `text` with it; None: unknown."""
        ending = self._bytes.get(last)
        if not 0 < count <= MAX_WITHHELD or ending is None or len(text) > MAX_WITHHELD * MAX_PIECE:
            return None
        data = text.encode()
        if not data.endswith(ending):
            return None
        self._looks = 0
        found = self._cuts(data[: len(data) - len(ending)], count, last)
        best = min(found, key=self._merge_order, default=None)
        return best if self._looks < MAX_LOOKS else None

    def _cuts(self, data: bytes, count: int, following: int) -> Iterator[tuple[int, ...]]:
        """Every way to write `data`, whose end is incomplete, with `count` tokens."""
        if count == 0:
            if not data:
                yield ()
            return
        if not ends_incomplete(data):
            return
        for start in range(max(0, len(data) - self._longest), len(data)):
            self._looks += 1
            if self._looks >= MAX_LOOKS:
                return
            ids = self._ids.get(data[start:])
            if ids:
                # Of entries with equal bytes (no trained vocabulary has any) the nearest to the next.
                token = min(ids, key=lambda i: abs(i - following))
                for before in self._cuts(data[:start], count - 1, token):
                    yield (*before, token)

    def _merge_order(self, ids: tuple[int, ...]) -> tuple[list[int], tuple[int, ...]]:
        return sorted(i for i in ids if len(self._bytes[i]) > 1), ids


def ends_incomplete(data: bytes) -> bool:
    """Whether the last character is cut off, as the server sees it."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:
            length = (
                2 if byte & 0xE0 == 0xC0 else 3 if byte & 0xF0 == 0xE0 else 4 if byte & 0xF8 == 0xF0 else 1
            )
            return back < length
    return False


def read_fragments(path: str) -> Fragments:
    """From a GGUF file. Blocks: for a worker thread.

    Raises:
        InvalidModel: the file is damaged.
    """
    return fragments_in(_header(Path(path)).metadata)


def fragments_in(metadata: Mapping[str, Value]) -> Fragments:
    tokens, kinds = (
        _values(metadata.get("tokenizer.ggml.tokens")),
        _values(metadata.get("tokenizer.ggml.token_type")),
    )
    names = [str(token) for token in tokens]
    numbers = [kind if isinstance(kind, int) else 0 for kind in kinds] or [_TYPE_NORMAL] * len(names)
    return Fragments(fragments_of(str(metadata.get("tokenizer.ggml.model")), names, numbers))


def _header(path: Path) -> Header:
    size = path.stat().st_size
    with path.open("rb") as file:
        for wanted in (FIRST_READ_BYTES, MAX_HEADER_BYTES):
            file.seek(0)
            with suppress(NeedMore):  # then with all that a header may be
                return read_header(file.read(wanted), size, verbose=True)
    raise InvalidModel(f"the GGUF header of {path} is too long")


def _values(value: Value | None) -> tuple[Scalar, ...]:
    return (value.values or ()) if isinstance(value, Array) else ()


def fragments_of(model: str, tokens: Sequence[str], kinds: Sequence[int]) -> dict[int, bytes]:
    """Id -> bytes of every token that is not UTF-8 alone."""
    pieces = {}
    for token, (text, kind) in enumerate(zip(tokens, kinds, strict=False)):
        if kind == _TYPE_BYTE:
            written = _BYTE.match(text)
            if written is not None and (byte := int(written[1], 16)) >= 0x80:
                pieces[token] = bytes([byte])
        elif model == "gpt2" and kind == _TYPE_NORMAL and not text.replace("Ġ", "").isascii():
            raw = _gpt2_bytes(text)
            if raw is not None and not _is_utf8(raw):
                pieces[token] = raw
    return pieces


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _gpt2_alphabet() -> dict[int, int]:
    """GPT-2's printable stand-ins for bytes: code point -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {b: b for b in printable} | {256 + i: b for i, b in enumerate(others)}


_GPT2_BYTES = _gpt2_alphabet()


def _gpt2_bytes(text: str) -> bytes | None:
    try:
        return bytes(_GPT2_BYTES[ord(c)] for c in text)
    except KeyError:  # an added token in plain text
        return None
