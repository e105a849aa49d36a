"""What a hop to another node costs: `python -m bench.hop`.

Two processes over mutual TLS on loopback. The serving side answers from a source that says
what it is told, so the figures are the hop's own: CPU of each side per request and per
chunk, and the time from the call to the first event.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table

from bench.members import certify, opened, tls_of
from ollama_distributed.adapters.identity.handshake_server import ClusterListener
from ollama_distributed.adapters.identity.tls import peer_of
from ollama_distributed.adapters.peers.door import PeerDoor
from ollama_distributed.adapters.peers.pool import PeerPool
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import NodeId, RequestId
from ollama_distributed.base.inference import InferenceRequest, TextPrompt
from ollama_distributed.base.tokens import Done, Prepared, SourceEvent, SourceSink, Tokens
from ollama_distributed.gateway.errors import status_of

REQUESTS = 6_000
CHUNKS = 60_000
KIB = "x" * 1024
DONE = Done(reason="stop", prompt_tokens=1, cached_tokens=0, completion_tokens=1)


class Talker:
    """A `Source`: the prompt says how many chunks, one each turn of the loop."""

    def start(self, request: InferenceRequest, sink: SourceSink, _ids: tuple[int, ...] = ()) -> Talk:
        prompt = request.prompt
        assert isinstance(prompt, TextPrompt)
        return Talk(int(prompt.text.split(maxsplit=1)[0]), sink)


class Talk:
    def __init__(self, chunks: int, sink: SourceSink) -> None:
        self._left = chunks
        self._sink = sink
        self._loop = asyncio.get_running_loop()
        self._paused = self._over = False
        sink(Prepared())
        self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        if self._over or self._paused:
            return
        if self._left == 0:
            self._over = True
            self._sink(DONE)
            return
        self._left -= 1
        self._sink(Tokens((self._left,), KIB if self._left == 0 else "token"))
        self._loop.call_soon(self._turn)

    def cancel(self) -> None:
        self._over = True

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False
        self._loop.call_soon(self._turn)


def serve(folder: Path, pipe: Connection) -> None:
    talker: Any = Talker()
    door = PeerDoor(NodeId("b"), talker, talker, talker.start, draining=lambda: False, status_of=status_of)
    nobody: Any = None
    app: Any = ClusterListener(door, nobody, check_peer=lambda _peer: None, status_of=status_of)

    async def run() -> None:
        listener = await opened(app, tls_of(folder, "b"), "127.0.0.1", 0)
        pipe.send(listener.port)
        while await asyncio.to_thread(pipe.recv) == "cpu":
            pipe.send(time.process_time())
        await listener.close(0.0)

    uvloop.run(run())


class Peer:
    """The calling side, beside the serving process."""

    def __init__(self, pool: PeerPool, pipe: Connection) -> None:
        self.pool = pool
        self._pipe = pipe

    def server_cpu_s(self) -> float:
        self._pipe.send("cpu")
        return float(self._pipe.recv())

    async def call(self, chunks: int) -> float:
        """Seconds to the first event."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        began, first = time.perf_counter(), 0.0

        def hear(event: SourceEvent) -> None:
            nonlocal first
            if not first:
                first = time.perf_counter() - began
            if isinstance(event, Done):
                ended.set_result(None)
            assert type(event) in (Prepared, Tokens, Done), event

        self.pool.start(NodeId("b"), request(f"{chunks} {KIB}"), hear)
        await ended
        return first


def request(text: str) -> InferenceRequest:
    return InferenceRequest(
        request_id=RequestId("r" * 20), identity=Identity("local"), model="m", prompt=TextPrompt(text=text)
    )


@contextlib.asynccontextmanager
async def peers(folder: Path) -> AsyncIterator[Peer]:
    certify(folder, ("a", "b"))
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=serve, args=(folder, theirs))
    process.start()
    try:
        port = await asyncio.to_thread(ours.recv)
        pool = PeerPool(
            lambda _node: (f"127.0.0.1:{port}",),
            tls_of(folder, "a"),
            lambda connection, node: peer_of(connection, expected=node),
        )
        async with pool:
            yield Peer(pool, ours)
    finally:
        ours.send("stop")
        process.join(10)


async def measured(peer: Peer, calls: int, chunks: int, at_once: int) -> tuple[float, float, float, float]:
    """Seconds of CPU here and there, of wall, and the median to the first event."""
    firsts: list[float] = []

    async def several(count: int) -> None:
        firsts.extend([await peer.call(chunks) for _ in range(count)])

    await several(20)
    firsts.clear()
    there, here, wall = peer.server_cpu_s(), time.process_time(), time.perf_counter()
    await asyncio.gather(*(several(calls // at_once) for _ in range(at_once)))
    wall, here = time.perf_counter() - wall, time.process_time() - here
    return here, peer.server_cpu_s() - there, wall, statistics.median(firsts)


async def main() -> None:
    table = Table("hop", "calling side, us CPU", "serving side, us CPU", "rate/s", "first event p50, us")
    with tempfile.TemporaryDirectory() as folder:
        async with peers(Path(folder)) as peer:
            for at_once in (1, 8, 32):
                calls = REQUESTS if at_once > 1 else REQUESTS // 3
                here, there, wall, first = await measured(peer, calls, 1, at_once)
                row = (here / calls, there / calls, calls / wall, first)
                _add(table, f"request and answer of 1 KiB, {at_once} at once", row)
            for at_once in (1, 8):
                here, there, wall, first = await measured(peer, at_once, CHUNKS // at_once, at_once)
                row = (here / CHUNKS, there / CHUNKS, CHUNKS / wall, first)
                _add(table, f"chunk, one each turn, {at_once} streams", row)
    Console().print(table)


def _add(table: Table, name: str, row: tuple[float, float, float, float]) -> None:
    here_s, there_s, rate, first_s = row
    table.add_row(name, f"{here_s * 1e6:.1f}", f"{there_s * 1e6:.1f}", f"{rate:,.0f}", f"{first_s * 1e6:.0f}")


if __name__ == "__main__":
    uvloop.run(main())
