"""Processes that bring one blob and are killed for it.

`python -m tests.movers FOLDER NAME` is a node: it gives others what it has, and fetches when a line on
its stdin says from whom: `registry` or names of nodes. It answers `here N` (bytes of an earlier
fetch that it goes on from), then `done`, or `failed ...`.

What it has sent and received is counted in a shared file that outlives a kill.
"""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
import mmap
import os
import queue
import random
import struct
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import structlog
from bench.members import certify, exchanging

from ollama_distributed.adapters.blobs.store import BlobStore
from ollama_distributed.adapters.egress.client import EgressClient
from ollama_distributed.adapters.registry.service import Registries
from ollama_distributed.adapters.registry.signing import RequestSigner
from ollama_distributed.adapters.registry.sites import RegistrySite, Sites
from ollama_distributed.base.clock import SystemClock
from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.base.ids import NodeId
from ollama_distributed.distribution.exchange import Exchange, Put
from ollama_distributed.distribution.pace import Pace
from ollama_distributed.distribution.ports import Blobs, Partial
from ollama_distributed.distribution.shelves import Shelves
from ollama_distributed.distribution.swarm import Swarm
from ollama_distributed.models.names import BlobId, ModelName
from tests.limits import SOON_S
from tests.registries import free_port

MIB = 1 << 20
_COUNTS = struct.Struct("=QQQ")


class Counts:
    """Bytes sent to nodes, come from a registry, and written, by all lives of a node."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(_COUNTS.size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _COUNTS.size)

    def read(self) -> tuple[int, int, int]:
        found: tuple[int, int, int] = _COUNTS.unpack(self._map[:])
        return found

    def add(self, *, sent: int = 0, came: int = 0, written: int = 0) -> None:
        before = self.read()
        self._map[:] = _COUNTS.pack(before[0] + sent, before[1] + came, before[2] + written)

    def close(self) -> None:
        self._map.close()


# ── a node's process ────────────────────────────────────────────────────────────────


class _CountedShelves(Shelves):
    def __init__(self, blobs: Blobs, counts: Counts, rate: float) -> None:
        super().__init__(blobs, SystemClock(), rate=lambda: rate)
        self._counts = counts

    async def _send(self, data: bytes, put: Put) -> None:
        async def counted(chunk: bytes | memoryview) -> None:
            self._counts.add(sent=len(chunk))  # before: a kill in between would hide what came
            await put(chunk)

        await super()._send(data, counted)


class _CountedPartial:
    def __init__(self, inner: Partial, counts: Counts) -> None:
        self._inner = inner
        self._counts = counts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def write(self, offset: int, *data: bytes | memoryview) -> None:
        await self._inner.write(offset, *data)
        self._counts.add(written=sum(map(len, data)))


async def _node(folder: Path, me: str) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    blob, size, rate = BlobId(plan["blob"]), plan["size"], plan["rate"]
    counts, clock = Counts(folder / me / "counts"), SystemClock()
    store = BlobStore(folder / me / "models")
    shelves = _CountedShelves(store, counts, rate)
    sites = Sites([RegistrySite(host=plan["registry"], insecure=True, private=True)])
    pace = Pace(clock, rate)

    async def take(count: int) -> None:
        counts.add(came=count)
        await pace.take(count)

    async with (
        EgressClient(sites.for_egress()) as egress,
        exchanging(folder, me, plan["addresses"], shelves) as exchange,
    ):
        signer = RequestSigner(folder / me / "registry.key")
        registries = Registries(egress, sites, signer, clock, streams=lambda: 4, take=take)
        swarm = Swarm(NodeId(me), cast(Exchange, exchange), shelves, clock, random.randrange)

        async def fetch(source: str) -> None:
            async with store.partial(blob, size) as coming:
                print(f"here {coming.here}", flush=True)
                counted = cast(Partial, _CountedPartial(coming, counts))
                if source == "registry":
                    await registries.fetch(ModelName.parse(f"http://{plan['registry']}/me/x"), blob, counted)
                else:
                    await swarm.fetch(blob, counted, [NodeId(name) for name in source.split()])
                await coming.finish()

        lines = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
        )
        print("ready", flush=True)
        while (line := (await lines.readline()).decode().strip()) != "":
            try:
                await fetch(line)
            except OllamaDistributedError as exc:
                print(f"failed {exc.code}: {exc.message}", flush=True)
            else:
                print("done", flush=True)


# ── from outside ────────────────────────────────────────────────────────────────────


class Mover:
    """One node."""

    def __init__(self, folder: Path, name: str, blob: str) -> None:
        self.name = name
        self._folder = folder
        self._blob = blob
        self._process: subprocess.Popen[str] | None = None
        self._said: queue.Queue[str] = queue.Queue()
        (folder / name / "models/blobs").mkdir(parents=True, exist_ok=True)
        self.counts = Counts(folder / name / "counts")

    @property
    def file(self) -> Path:
        return self._folder / self.name / "models/blobs" / f"sha256-{self._blob}"

    @property
    def staging(self) -> Path:
        return self._folder / self.name / "models/.ollama-distributed"

    def start(self) -> None:
        words = [sys.executable, "-m", "tests.movers", str(self._folder), self.name]
        with (self._folder / f"{self.name}.log").open("a") as log:
            self._process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self._said = queue.Queue()
        self._reader = threading.Thread(target=_pump, args=(self._process, self._said))
        self._reader.start()
        assert self.hear() == "ready"

    def kill(self) -> None:
        """`kill -9`."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._reader.join()
            for end in (self._process.stdin, self._process.stdout):
                assert end is not None
                end.close()
            self._process = None

    def fetch(self, source: str) -> int:
        """Begin; what is here already."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(source + "\n")
        self._process.stdin.flush()
        word, _, here = self.hear().partition(" ")
        assert word == "here", (word, here)
        return int(here)

    def hear(self) -> str:
        return self._said.get(timeout=SOON_S)

    def heard(self) -> str | None:
        """What it says, if it has said anything."""
        try:
            return self._said.get_nowait()
        except queue.Empty:
            return None

    def close(self) -> None:
        self.kill()
        self.counts.close()


def _pump(process: subprocess.Popen[str], said: queue.Queue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        said.put(line.strip())


def noted(staging: Path, content: bytes) -> int:
    """Bytes that a journal tells of. Each of them is right, however its writer ended."""
    total = 0
    for journal in staging.glob("partial-*.journal"):
        data = journal.with_suffix("").read_bytes()
        text = journal.read_text()
        for line in text[: text.rfind("\n") + 1].splitlines()[1:]:
            begin, end = map(int, line.split())
            assert data[begin:end] == content[begin:end], f"{journal.name} tells of bytes that are wrong"
            total += end - begin
    return total


def push(host: str, content: bytes) -> None:
    """Put a blob into a registry, by the distribution API."""
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    connection = http.client.HTTPConnection(host, timeout=SOON_S)
    try:
        connection.request("POST", "/v2/me/x/blobs/uploads/")
        begun = connection.getresponse()
        begun.read()
        where = begun.headers["location"]
        joint = "&" if "?" in where else "?"
        connection.request("PUT", f"{where}{joint}digest={digest}", content)
        answer = connection.getresponse()
        assert answer.status == 201, answer.read()
        answer.read()
    finally:
        connection.close()


@contextmanager
def movers(
    folder: Path, names: Sequence[str], holders: Collection[str], content: bytes, registry: str, rate: float
) -> Iterator[dict[str, Mover]]:
    """`holders` have the blob. `registry`: its host. `rate`: bytes per second that each gives, or
    takes of the registry."""
    blob = hashlib.sha256(content).hexdigest()
    plan = {
        "blob": blob,
        "size": len(content),
        "rate": rate,
        "registry": registry,
        "addresses": {name: f"127.0.0.1:{free_port()}" for name in names},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(plan))
    certify(folder, names)
    made = {name: Mover(folder, name, blob) for name in names}
    try:
        for name, one in made.items():
            if name in holders:
                one.file.write_bytes(content)
            one.start()
        yield made
    finally:
        for one in made.values():
            one.close()


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    asyncio.run(_node(Path(sys.argv[1]), sys.argv[2]))
    os._exit(0)  # nothing that is left matters
