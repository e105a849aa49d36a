"""The receiving end of a piece: whatever way its bytes are cut, and whatever else comes in their place."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.adapters.peers import pieces, wire
from ollama_distributed.adapters.peers.calls import Sender
from ollama_distributed.adapters.peers.link import Link
from ollama_distributed.adapters.peers.pieces import PieceCall, PieceExchange
from ollama_distributed.adapters.peers.pool import PeerPool
from ollama_distributed.base.errors import (
    BlobNotFound,
    DeadlineExceeded,
    DigestMismatch,
    OllamaDistributedError,
    Unavailable,
)
from ollama_distributed.base.ids import NodeId
from ollama_distributed.distribution.exchange import PieceAsk, PieceHead
from ollama_distributed.testing import virtual_time

A = NodeId("a")


class FakeLink:
    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


def head(piece: int, length: int = 0) -> bytes:
    return wire.reply_frame(wire.Result(msgspec.Raw(wire.encode(PieceHead(piece=piece, length=length)))))


def data(part: bytes) -> bytes:
    return wire.frame(b"\0" + part)


END = data(b"")


def heard(*chunks: bytes, granted: Callable[[PieceHead], int] | None = None) -> tuple[PieceCall, FakeLink]:
    """A call that these bytes came for; a head is granted what it says."""

    async def main() -> tuple[PieceCall, FakeLink]:
        call, link = PieceCall(cast(Sender, None), A, b"", granted or (lambda said: said.length)), FakeLink()
        call.taken(cast(Link, link))
        try:
            for chunk in chunks:
                call.heard(chunk)
        except OllamaDistributedError as error:  # the link ends itself then and says so
            call.broke(error, answered=True, reused=False)
        return call, link

    return virtual_time.run(main)


def cut(stream: bytes, at: list[int]) -> list[bytes]:
    places = sorted({min(place, len(stream)) for place in at})
    pairs = zip([0, *places], [*places, len(stream)], strict=True)
    return [stream[begin:end] for begin, end in pairs if begin < end]


@given(
    st.lists(st.binary(max_size=40), max_size=6), st.lists(st.integers(0, 400), max_size=20), st.booleans()
)
def test_however_it_is_cut(parts: list[bytes], at: list[int], pings: bool) -> None:
    whole = b"".join(parts)
    frames = [head(3, len(whole)), *(data(part) for part in parts if part), END]
    stream = (wire.PING if pings else b"").join(frames)
    call, link = heard(*cut(stream, at))
    assert call.done.result() is None
    assert b"".join(call.piece or []) == whole
    assert call.came == len(whole)
    assert not link.closed


@pytest.mark.parametrize(
    ("stream", "error"),
    [
        (head(1, 4) + data(b"12345"), DigestMismatch),
        (head(1, 4) + data(b"123") + END, DigestMismatch),
        (data(b"1") + END, DigestMismatch),
        (END, DigestMismatch),
        (head(1, 4) + head(1, 4), DigestMismatch),
        (wire.refusal_frame(BlobNotFound("gone")), BlobNotFound),
        (head(1, 4) + wire.refusal_frame(BlobNotFound("gone")), BlobNotFound),
        (wire.frame(b"\xc1 no msgpack"), Unavailable),
        (wire.frame(b"x" * (pieces.MAX_HEAD_BYTES + 1)), Unavailable),
    ],
)
def test_what_is_no_piece_is_refused(stream: bytes, error: type[OllamaDistributedError]) -> None:
    for chunks in ([stream], [stream[i : i + 1] for i in range(len(stream))]):
        call, _ = heard(*chunks)
        with pytest.raises(error):
            call.done.result()


def test_what_was_not_asked_for_closes_the_connection() -> None:
    call, link = heard(head(9, 4), granted=lambda _: -1)
    with pytest.raises(DigestMismatch):
        call.done.result()
    assert link.closed


def test_none_now() -> None:
    call, link = heard(head(-1))
    assert call.done.result() is None
    assert call.piece is None
    assert not link.closed


def test_what_comes_after_the_end_closes_the_connection() -> None:
    call, link = heard(head(1, 2) + data(b"12") + END, data(b"more"))
    assert b"".join(call.piece or []) == b"12"
    assert link.closed


class FakePool:
    """Sends so many bytes of a piece, one a second."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.link = FakeLink()

    def send(self, call: PieceCall, _node: NodeId) -> None:
        call.taken(cast(Link, self.link))
        self.task = asyncio.get_running_loop().create_task(self._trickle(call))

    async def _trickle(self, call: PieceCall) -> None:
        call.heard(head(0, 100))
        for _ in range(self.count):
            await asyncio.sleep(1)
            call.heard(data(b"1"))
        for _ in range(1000):
            await asyncio.sleep(1)
            call.heard(wire.PING)


def test_a_node_that_lives_but_sends_nothing_is_given_up() -> None:
    async def main() -> float:
        pool = FakePool(50)
        exchange = PieceExchange(cast(PeerPool, pool))
        ask = PieceAsk(blob="", table_id=b"", offered=b"\1")
        with pytest.raises(DeadlineExceeded, match="sent nothing"):
            await exchange.piece(A, ask, lambda said: said.length)
        assert pool.link.closed
        pool.task.cancel()
        return asyncio.get_running_loop().time()

    assert 50 + pieces.QUIET_S <= virtual_time.run(main) <= 50 + 2 * pieces.QUIET_S
