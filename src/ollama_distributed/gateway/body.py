"""The body of one request as it comes, and how much all bodies together hold. No I/O."""

from __future__ import annotations

from ollama_distributed.base.errors import BodyTooLarge, Unavailable
from ollama_distributed.gateway.gate import too_large_text

_PIECE_BYTES = 16 * 1024
"""Pieces smaller than this are joined as they come."""


class Bodies:
    """What the bodies of all exchanges that have not ended hold together."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.held_bytes = 0


class RequestBody:
    """The pieces of one body, within its own limit and that of all."""

    __slots__ = ("_all", "_limit_bytes", "_pieces", "size_bytes")

    def __init__(self, limit_bytes: int, together: Bodies) -> None:
        self._limit_bytes = limit_bytes
        self._all = together
        self._pieces: list[bytes | bytearray] = []
        self.size_bytes = 0

    def add(self, data: bytes) -> None:
        """Raises `BodyTooLarge` and `Unavailable`; the caller then drops the body."""
        self.size_bytes += len(data)
        self._all.held_bytes += len(data)
        if self.size_bytes > self._limit_bytes:
            raise BodyTooLarge(too_large_text(self._limit_bytes))
        if self._all.held_bytes > self._all.most_bytes:
            raise Unavailable("too many large requests at once; try again")
        if self._pieces and len(self._pieces[-1]) < _PIECE_BYTES:
            # A client may send a byte a chunk: a list of those takes fifty times their size.
            last = self._pieces[-1]
            if isinstance(last, bytes):
                last = self._pieces[-1] = bytearray(last)
            last += data
        else:
            self._pieces.append(data)

    def take(self) -> bytes:
        """The whole body, once."""
        pieces, self._pieces = self._pieces, []
        # Of `bytes` only, and many: then the join lets other threads run.
        return bytes(pieces[0]) if len(pieces) == 1 else b"".join(map(bytes, pieces))

    def drop(self) -> None:
        """Its exchange ended. Idempotent."""
        self._pieces = []
        self._all.held_bytes -= self.size_bytes
        self.size_bytes = 0
