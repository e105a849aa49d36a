"""What copies of a model between nodes cost and how long they take: `python -m bench.swarm`.

loopback   one process to another over mutual TLS: MB/s, CPU seconds per GiB, beside one core's SHA-256
links      1 holder and N others in network namespaces with shaped links (root): the time until the last
           has it over size / rate, beside all of them fetching from the holder alone, in one run

Each node is a process with the product's store, listener, pool and swarm, and nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import logging
import os
import random
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import structlog
import uvloop
from tests import lab

from bench.members import certify, exchanging
from ollama_distributed.adapters.blobs.partial import NOTE_BYTES
from ollama_distributed.adapters.blobs.store import BlobStore
from ollama_distributed.base.clock import SystemClock
from ollama_distributed.base.ids import NodeId
from ollama_distributed.distribution.pieces import make_table
from ollama_distributed.distribution.shelves import Shelves
from ollama_distributed.distribution.swarm import Swarm
from ollama_distributed.models.names import BlobId

MIB = 1 << 20
PORT = 7443
DEADLINE_S = 3600.0
"""For what all nodes do; then something hangs."""
LATENCY_MS = 50
"""Of a shaped link's queue when it is full."""


# ── one node ────────────────────────────────────────────────────────────────────────


class Origins:
    """`swarm.Told`."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}

    def received(self, node: NodeId, count: int) -> None:
        self.bytes[node] = self.bytes.get(node, 0) + count

    def lied(self, node: NodeId) -> None:
        raise AssertionError(f"{node} lied")


async def node(folder: Path, me: str) -> None:
    """Reads `go` from stdin, fetches, prints what it took, and serves until stdin ends."""
    plan = json.loads((folder / "plan.json").read_text())
    blob, size, naive, addresses = BlobId(plan["blob"]), plan["size"], plan["naive"], plan["addresses"]
    store = BlobStore(folder / me / "models")
    # Who has it from the holder alone gives nothing to the others, not even when it has it all.
    alone = naive and me != "n0"
    given = Shelves(BlobStore(folder / me / "nothing") if alone else store, SystemClock())
    if naive and me == "n0":  # the rule that it sends no piece twice is not for those who ask only it
        table = await make_table(size, lambda at, length: store.read_range(blob, at, length), given._threads)
        shelf = given.lay(blob, table, lambda at, length: store.read_range(blob, at, length))
        for piece in range(table.pieces):
            shelf.add(piece)
    own = Shelves(store, SystemClock()) if naive else given
    async with exchanging(folder, me, addresses, given) as exchange:
        swarm = Swarm(NodeId(me), exchange, own, SystemClock(), random.randrange)
        lines = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
        )
        print("ready", flush=True)
        origins = Origins()
        while (line := (await lines.readline()).strip()) != b"":
            before, began = time.process_time(), time.monotonic()
            if line == b"go":
                sources = [NodeId("n0")] if naive else [NodeId(other) for other in addresses if other != me]
                async with store.partial(blob, size) as coming:
                    await swarm.fetch(blob, coming, sources, origins)
                    fetched_s = time.monotonic() - began
                    await coming.finish()
                done = {
                    "fetched_s": fetched_s,
                    "took_s": time.monotonic() - began,
                    "cpu_s": time.process_time() - before,
                    "bytes": origins.bytes,
                }
                print(json.dumps(done), flush=True)
            else:
                print(json.dumps({"cpu_s": time.process_time(), "sent": given.sent_bytes}), flush=True)
    os._exit(0)  # nothing that is left matters


# ── all of them ─────────────────────────────────────────────────────────────────────


class Nodes:
    """Processes n0 (the holder), n1, …"""

    def __init__(
        self, folder: Path, addresses: Sequence[str], size: int, prefixes: Sequence[list[str]]
    ) -> None:
        self.folder = folder
        self.addresses = {f"n{number}": address for number, address in enumerate(addresses)}
        self.size = size
        self._prefixes = prefixes
        certify(folder, list(self.addresses))
        blobs = folder / "n0/models/blobs"
        blobs.mkdir(parents=True)
        data = noise(size)
        self.blob = hashlib.sha256(data).hexdigest()
        (blobs / f"sha256-{self.blob}").write_bytes(data)

    def run(self, *, naive: bool) -> tuple[float, dict[str, Any], dict[str, Any]]:
        """Seconds until the last has it; what each says; what the holder says."""
        plan = {"blob": self.blob, "size": self.size, "naive": naive, "addresses": self.addresses}
        (self.folder / "plan.json").write_text(json.dumps(plan))
        with contextlib.ExitStack() as stack:
            started = {}
            for name, prefix in zip(self.addresses, self._prefixes, strict=True):
                words = [
                    *prefix,
                    sys.executable,
                    "-m",
                    "bench.swarm",
                    "--node",
                    name,
                    "--folder",
                    str(self.folder),
                ]
                started[name] = stack.enter_context(process(words))
            for one in started.values():
                if line(one) != "ready\n":
                    sys.exit("a node did not start; what it said is above")
            holder, *others = started
            told(started[holder], "cpu")
            before = told(started[holder], "cpu")
            began = time.monotonic()
            for name in others:
                say(started[name], "go")
            said = {name: hear(started[name]) for name in others}
            took_s = time.monotonic() - began
            after = told(started[holder], "cpu")
            for name in others:
                (self.folder / name / "models/blobs" / f"sha256-{self.blob}").unlink()
        return took_s, said, {"cpu_s": after["cpu_s"] - before["cpu_s"], "sent": after["sent"]}


def noise(size: int) -> bytes:
    chance = random.Random(5)
    return b"".join(chance.randbytes(min(MIB, size - at)) for at in range(0, size, MIB))


def say(one: subprocess.Popen[str], word: str) -> None:
    assert one.stdin is not None
    one.stdin.write(word + "\n")
    one.stdin.flush()


def line(one: subprocess.Popen[str]) -> str:
    assert one.stdout is not None
    ready, _, _ = select.select([one.stdout], [], [], DEADLINE_S)
    if not ready:
        sys.exit(f"a node said nothing for {DEADLINE_S:.0f} s")
    return one.stdout.readline()


def hear(one: subprocess.Popen[str]) -> dict[str, Any]:
    said = line(one)
    if not said:
        sys.exit("a node ended; what it said is above")
    found: dict[str, Any] = json.loads(said)
    return found


def told(one: subprocess.Popen[str], word: str) -> dict[str, Any]:
    say(one, word)
    return hear(one)


@contextlib.contextmanager
def process(words: list[str]) -> Iterator[subprocess.Popen[str]]:
    started = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield started
    finally:
        started.kill()
        started.wait(10)
        for end in (started.stdin, started.stdout):
            assert end is not None
            end.close()


def shape(network: lab.Network, mbit: float) -> None:
    """Each machine's link, both ways."""
    rate = ["root", "tbf", "rate", f"{mbit:g}mbit", "burst", "128kb", "latency", f"{LATENCY_MS}ms"]
    for machine in network.machines:
        for namespace, device in ((machine.namespace, "eth0"), (network.router, machine.wire)):
            words = ["ip", "netns", "exec", namespace, "tc", "qdisc", "add", "dev", device, *rate]
            subprocess.run(words, check=True)


class Spread(NamedTuple):
    """How a blob came to all."""

    slower: float
    """Times size / rate."""
    sent: float
    """By the one that had it, times size."""


def links(receivers: int, mebibytes: int, mbit: float, *, naive: bool = True) -> dict[str, Spread]:
    """Of the swarm and of all from one."""
    with (
        tempfile.TemporaryDirectory(prefix="od-swarm-") as text,
        lab.network(Path(text), receivers + 1) as network,
    ):
        shape(network, mbit)
        addresses = [f"{machine.address}:{PORT}" for machine in network.machines]
        nodes = Nodes(
            Path(text), addresses, mebibytes * MIB, [machine.prefix() for machine in network.machines]
        )
        ideal_s = mebibytes * MIB * 8 / (mbit * 1e6)
        found = {}
        for kind in ("swarm", *(("all from one",) if naive else ())):
            _, said, holder = nodes.run(naive=kind != "swarm")
            took_s = max(one["took_s"] for one in said.values())
            found[kind] = Spread(took_s / ideal_s, holder["sent"] / nodes.size)
            print(
                f"{kind:>12}: {receivers} others, {mebibytes} MiB at {mbit:g} Mbit/s: {took_s:.1f} s = "
                f"{found[kind].slower:.2f} x size / rate; the holder sent {found[kind].sent:.2f} x; "
                f"the last piece after {max(one['fetched_s'] for one in said.values()) / ideal_s:.2f} x",
                flush=True,
            )
    return found


def loopback(mebibytes: int) -> float:
    """MB/s of one process to another, its file checked and visible."""
    data = noise(128 * MIB)
    began = time.perf_counter()
    hashlib.sha256(data).digest()
    hashed = len(data) / 1e6 / (time.perf_counter() - began)
    with tempfile.TemporaryDirectory(prefix="od-swarm-") as text:
        written = disk_speed(Path(text) / "written", data)
        ports = free_ports(2)
        nodes = Nodes(Path(text), [f"127.0.0.1:{port}" for port in ports], mebibytes * MIB, [[], []])
        _, said, holder = nodes.run(naive=False)
        (one,) = said.values()
        gib = mebibytes / 1024
        speed: float = nodes.size / 1e6 / one["took_s"]
        print(
            f"loopback, {mebibytes} MiB over mutual TLS: {nodes.size / 1e6 / one['fetched_s']:.0f} MB/s, "
            f"checked as a whole {speed:.0f} MB/s; CPU-s/GiB: receive {one['cpu_s'] / gib:.2f}, "
            f"send {holder['cpu_s'] / gib:.2f}; "
            f"SHA-256 of one core {hashed:.0f} MB/s, the disk {written:.0f} MB/s",
            flush=True,
        )
    return speed


def disk_speed(path: Path, data: bytes) -> float:
    """MB/s of writes that are on the disk as often as a fetch notes them."""
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for at in range(0, len(data), NOTE_BYTES):
            file.write(data[at : at + NOTE_BYTES])
            os.fdatasync(file.fileno())
    return len(data) / 1e6 / (time.perf_counter() - began)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=["loopback", "links"])
    parser.add_argument("--receivers", type=int, default=4)
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--mbit", type=float, default=100.0)
    parser.add_argument("--no-naive", action="store_true")
    parser.add_argument("--most", type=float, default=0.0, help="times size / rate that is too long")
    parser.add_argument("--node")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.node:
        structlog.configure(
            logger_factory=structlog.PrintLoggerFactory(sys.stderr),  # stdout is for answers
            wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        )
        uvloop.run(node(args.folder, args.node))
        return
    what = [args.what] if args.what else ["loopback", "links"]
    if "loopback" in what:
        loopback(max(args.mib, 256))
    if "links" in what:
        if reason := lab.available():
            sys.exit(f"links: {reason}")
        found = links(args.receivers, args.mib, args.mbit, naive=not args.no_naive)
        slower = found["swarm"].slower
        if args.most and slower > args.most:
            sys.exit(f"it took {slower:.2f} x size / rate; {args.most:g} is the limit")


if __name__ == "__main__":
    main()
