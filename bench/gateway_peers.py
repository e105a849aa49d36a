"""Our whole gateway beside routers in Rust and nginx: `python -m bench.gateway_peers`.

All stand before the same mock backend, alone on a core; load and backend have the other one. What
is compared is the CPU time of a gateway's processes for a piece of work, which hardly depends on
how fast the load is: requests/s per core is its inverse. Ours asks for an API key, routes, counts,
logs a line for each request and keeps its journal; the others do what they do with nothing
switched on. By default our node sends on together what a stream brings within 20 ms; a second one
sends each token by itself, as the others do.

The gateways take turns, `--rounds` times, and of each the round counts that took least: what else
the machine does can only add to it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import uvloop
from rich.console import Console
from rich.table import Table

from bench import peers
from bench.mock_backend import ANSWER_TOKENS, TOKEN
from bench.nodes import HOST
from bench.peers import Peer
from bench.requests import offer

REQUEST_RATIO = 1.5
"""Requests/s per core over those of the fastest router in Rust; the goal is 2.4."""
CHUNK_RATIO = 1.0
"""CPU per chunk over its."""
CONNECTIONS = 32
STREAMS = 64
KIB = "word " * 205
WARM_S = 0.3
UNCUT = 0.95
"""Of the tokens; the network may cut one in two, and then it is not counted."""

console = Console(width=110)


class Args(argparse.Namespace):
    rounds: int
    seconds: float
    check: bool
    only: bool


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for, again and again."""

    name: str
    path: str
    body: dict[str, object]
    connections: int
    units: int
    """Of which the CPU is counted, in one request: itself, or its chunks."""


WORKS = (
    Work(
        name="chat, 1 KiB each way: CPU us/request",
        path="/v1/chat/completions",
        body={"messages": [{"role": "user", "content": KIB}]},
        connections=CONNECTIONS,
        units=1,
    ),
    Work(
        name="streamed chat: CPU us/chunk",
        path="/v1/chat/completions",
        body={"messages": [{"role": "user", "content": KIB}], "max_tokens": ANSWER_TOKENS, "stream": True},
        connections=STREAMS,
        units=ANSWER_TOKENS,
    ),
    Work(
        name="streamed completion, journal of ids: CPU us/chunk",
        path="/v1/completions",
        body={"prompt": KIB, "max_tokens": ANSWER_TOKENS, "stream": True},
        connections=STREAMS,
        units=ANSWER_TOKENS,
    ),
)


async def measure(peer: Peer, work: Work, seconds: float) -> float:
    """CPU microseconds for each unit."""
    model = peer.model_with_ids if "prompt" in work.body else "mock"
    body = msgspec.json.encode({"model": model, **work.body})
    wire = (
        f"POST {work.path} HTTP/1.1\r\nhost: {HOST}:{peer.port}\r\n{peer.headers}"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode() + body
    try:
        await offer(HOST, peer.port, wire, work.connections, WARM_S)
    except RuntimeError as error:
        raise RuntimeError(f"{peer.name}, {work.name}: {error}") from error
    before = peer.cpu_s()
    done = await offer(HOST, peer.port, wire, work.connections, seconds, TOKEN)
    used_s = peer.cpu_s() - before
    if work.units > 1 and done.counted < UNCUT * done.answers * work.units:
        raise RuntimeError(f"{peer.name} lost chunks: {done.counted} of {done.answers * work.units}")
    return used_s / (done.answers * work.units) * 1e6


async def run(args: Args) -> list[str]:
    os.sched_setaffinity(0, {peers.LOAD_CORE})
    async with contextlib.AsyncExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory()))
        log = running.enter_context((folder / "log").open("wb"))
        ports = await running.enter_async_context(peers.backend(log))
        starting = [
            peers.nginx(ports[0], folder, log),
            peers.router("vllm_router", "round_robin", ports[0], log),
            peers.router("sglang_router", "round_robin", ports[0], log),
            peers.router("sglang_router", "cache_aware", ports[0], log),
        ]
        if args.only:
            starting = []
        found = [await running.enter_async_context(one) for one in starting]
        for at_once in (False, True):
            ours = peers.ours(ports, folder / "store", at_once=at_once)
            found.append(await running.enter_async_context(ours))
        took: dict[str, dict[str, list[float]]] = {}
        started = time.monotonic()
        for _ in range(args.rounds):
            for peer in found:
                for work in WORKS:
                    spent = took.setdefault(peer.name, {}).setdefault(work.name, [])
                    spent.append(await measure(peer, work, args.seconds))
        least = {name: {work: min(values) for work, values in row.items()} for name, row in took.items()}
        _print(least, time.monotonic() - started)
        return _failures(least) if not args.only else []


def _print(least: dict[str, dict[str, float]], took_s: float) -> None:
    table = Table(title=f"gateways on one core before one backend ({took_s:.0f} s)")
    for column in ("gateway", "requests/s per core", *(work.name for work in WORKS)):
        table.add_column(column)
    for name, row in least.items():
        table.add_row(name, f"{1e6 / row[WORKS[0].name]:,.0f}", *(f"{us:.1f}" for us in row.values()))
    console.print(table)


def _failures(least: dict[str, dict[str, float]]) -> list[str]:
    """The limits that were not met; prints all."""
    ours = least[peers.OURS]
    routers = [row for name, row in least.items() if "Rust" in name]
    failures = []
    for number, work in enumerate(WORKS):
        fastest = min(row[work.name] for row in routers)
        if number == 0:
            ratio = fastest / ours[work.name]
            text = f"requests/s per core {ratio:.2f} x the fastest Rust router, limit >= {REQUEST_RATIO}"
            met = ratio >= REQUEST_RATIO
        else:
            ratio = ours[work.name] / fastest
            text = f"{work.name} {ratio:.2f} x the fastest Rust router, limit <= {CHUNK_RATIO}"
            met = ratio <= CHUNK_RATIO
        console.print(text)
        failures += [] if met else [text]
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gateway_peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=4, help="of which the one counts that took least")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of each load")
    parser.add_argument("--only", action="store_true", help="our node alone")
    parser.add_argument("--assert", dest="check", action="store_true", help="fail when a limit is not met")
    args = parser.parse_args(namespace=Args())
    failures = uvloop.run(run(args))
    for failure in failures:
        console.print(f"[red]limit not met:[/red] {failure}")
    return bool(failures) and args.check


if __name__ == "__main__":
    sys.exit(main())
