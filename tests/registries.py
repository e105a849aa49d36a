"""Registries for tests: Debian's real docker-registry on loopback, and a double that misbehaves on demand."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from ollama_distributed.models.manifest import (
    CONFIG_TYPE,
    MODEL,
    Layer,
    Manifest,
    ModelConfig,
    encode_config,
    encode_manifest,
)
from tests.limits import SOON_S

PROGRAM = Path(__file__).parent.parent / ".venv/debian/usr/bin/docker-registry"
START_S = SOON_S


class DebianRegistry:
    def __init__(self, folder: Path, port: int, options: Mapping[str, Any]) -> None:
        self.folder = folder
        self.host = f"127.0.0.1:{port}"
        self.log = folder / "registry.log"
        self._config = folder / "config.yml"
        config: dict[str, Any] = {
            "version": "0.1",
            "log": {"level": "warn"},
            "storage": {
                "filesystem": {"rootdirectory": str(folder / "storage")},
                "delete": {"enabled": True},
            },
            "http": {"addr": self.host, "relativeurls": True},
            **options,
        }
        self._config.write_text(yaml.safe_dump(config))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([PROGRAM, "serve", self._config], stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        while True:
            try:
                with urllib.request.urlopen(f"http://{self.host}/v2/", timeout=5):
                    return
            except urllib.error.HTTPError as answered:
                answered.close()
                return
            except OSError:
                assert self.process.poll() is None, self.log.read_text()
                assert time.monotonic() < deadline, "docker-registry does not start"
                time.sleep(0.05)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def setting(self, **more: Any) -> str:
        """For `OLLAMA_DISTRIBUTED_REGISTRIES`."""
        return yaml.safe_dump([{"host": self.host, "insecure": True, "private": True, **more}])


def free_port() -> int:
    """Below those that the kernel gives out by itself: nobody takes it while its owner is not up."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_768)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@contextmanager
def debian_registry(folder: Path, **options: Any) -> Iterator[DebianRegistry]:
    """`options`: more of its configuration."""
    if not PROGRAM.exists():
        pytest.skip("no docker-registry on this system (make .venv/.debian brings Debian's)")
    folder.mkdir(parents=True, exist_ok=True)
    registry = DebianRegistry(folder, free_port(), options)
    registry.start()
    try:
        yield registry
    finally:
        registry.kill()


# ── a double ────────────────────────────────────────────────────────────────────────


class Asked(NamedTuple):
    method: str
    path: str
    """With its query."""
    headers: Mapping[str, str]
    body: bytes


class Answer(NamedTuple):
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = {}
    length: int | None = None
    """What Content-Length says; None: the truth; -1: nothing."""
    cut: int | None = None
    """The connection closes after so many bytes of the body."""
    pause_s: float = 0.0
    """Between two pieces of the body."""
    piece: int = 1 << 16


Hook = Callable[[Asked], "Answer | Awaitable[Answer | None] | None"]


class RegistryDouble:
    """Answers pulls of what `add` gave it. `hook` may answer first."""

    def __init__(self) -> None:
        self.manifests: dict[str, bytes] = {}
        """`ns/model:tag` -> manifest."""
        self.blobs: dict[str, bytes] = {}
        self.asked: list[Asked] = []
        self.sent: dict[str, int] = {}
        """Digest -> bytes of it that left."""
        self.hook: Hook = lambda _: None
        self.port = 0
        self.open = 0
        """Requests under way now."""

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def blob(self, content: bytes) -> str:
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        self.blobs[digest] = content
        return digest

    def add(self, name: str, model: bytes, **texts: bytes) -> Manifest:
        """A model `ns/model:tag`; `texts`: media type's last word -> content."""
        layers = [Layer(media_type=MODEL, digest=self.blob(model), size=len(model))]
        for kind, content in texts.items():
            layers.append(
                Layer(
                    media_type=f"application/vnd.ollama.image.{kind}",
                    digest=self.blob(content),
                    size=len(content),
                )
            )
        config = encode_config(ModelConfig(model_format="gguf", model_family="llama"))
        manifest = Manifest(
            config=Layer(media_type=CONFIG_TYPE, digest=self.blob(config), size=len(config)),
            layers=tuple(layers),
        )
        self.manifests[name] = encode_manifest(manifest)
        return manifest

    def paths(self, method: str = "GET") -> list[str]:
        return [asked.path for asked in self.asked if asked.method == method]

    @asynccontextmanager
    async def listening(self, context: ssl.SSLContext | None = None) -> AsyncIterator[RegistryDouble]:
        server = await asyncio.start_server(self._talk, "127.0.0.1", 0, ssl=context)
        self.port = server.sockets[0].getsockname()[1]
        tasks = self._tasks = set[asyncio.Task[None]]()
        try:
            yield self
        finally:
            server.close()
            for task in list(tasks):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await server.wait_closed()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while (asked := await _read(reader)) is not None:
                self.asked.append(asked)
                self.open += 1
                try:
                    if not await self._answer(asked, writer):
                        break
                finally:
                    self.open -= 1
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _answer(self, asked: Asked, writer: asyncio.StreamWriter) -> bool:
        """False: the connection is over."""
        found = self.hook(asked)
        answer = await found if isinstance(found, Awaitable) else found
        if answer is None:
            answer = self.usual(asked)
        length = len(answer.body) if answer.length is None else answer.length
        lines = [f"HTTP/1.1 {answer.status} X", *(f"{name}: {text}" for name, text in answer.headers.items())]
        if length >= 0:
            lines.append(f"content-length: {length}")
        writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
        body = b"" if asked.method == "HEAD" else answer.body[: answer.cut]
        digest = asked.path.rpartition("/")[2]
        for at in range(0, len(body), answer.piece):
            piece = body[at : at + answer.piece]
            writer.write(piece)
            await writer.drain()
            self.sent[digest] = self.sent.get(digest, 0) + len(piece)
            if answer.pause_s:
                await asyncio.sleep(answer.pause_s)
        await writer.drain()
        return answer.cut is None and (length == len(answer.body) or asked.method == "HEAD")

    def usual(self, asked: Asked) -> Answer:
        parts = asked.path.split("?")[0].strip("/").split("/")
        match parts:
            case ["v2", namespace, model, "manifests", tag]:
                found = self.manifests.get(f"{namespace}/{model}:{tag}")
                if found is not None:
                    return Answer(200, found)
            case [*_, "blobs", digest] if digest in self.blobs:
                return ranged(self.blobs[digest], asked)
        return Answer(404, json.dumps({"errors": [{"code": "NAME_UNKNOWN", "message": "nothing"}]}).encode())


def ranged(content: bytes, asked: Asked) -> Answer:
    """The bytes that a Range header asks for."""
    wanted = asked.headers.get("range")
    if wanted is None:
        return Answer(200, content)
    begin, _, last = wanted.removeprefix("bytes=").partition("-")
    start, end = int(begin), min(int(last) + 1, len(content))
    return Answer(206, content[start:end], {"content-range": f"bytes {start}-{end - 1}/{len(content)}"})


async def _read(reader: asyncio.StreamReader) -> Asked | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.decode("latin-1").strip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.lower(): text.strip() for name, _, text in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Asked(method, path, headers, body)
