"""Starts our node and other gateways before the same backend, each alone on its core.

The others come from PyPI (`config/peers.txt`, into `.venv/peers`) and from Debian (nginx, with the
tests' tools in `.venv/debian`); `make bench-gateway` brings them. They get the settings under which they are
fastest: one worker, no log of requests, no retries.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec
import psutil

from bench.nodes import HOST, node
from bench.overhead import cpu_s
from ollama_distributed.adapters.engines.fetch import fetch
from ollama_distributed.adapters.engines.http import TcpAddress
from ollama_distributed.base.errors import OllamaDistributedError

VENV = Path(__file__).parents[1] / ".venv"
PEERS_PYTHON = VENV / "peers/bin/python"
NGINX = VENV / "debian/usr/sbin/nginx"
OURS = "ollama-distributed"
READY_S = 60.0
GATEWAY_CORE, LOAD_CORE = 0, 1

_NGINX = """daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log warn;
events {{ worker_connections 1024; }}
http {{
  access_log off; client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder}; keepalive_requests 1000000000; client_max_body_size 32m;
  client_body_buffer_size 64k;
  upstream backend {{ server 127.0.0.1:{backend}; keepalive 256; keepalive_requests 1000000000; }}
  server {{ listen 127.0.0.1:{port}; location / {{
    proxy_pass http://backend; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
  }} }}
}}
"""


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """A gateway that runs."""

    name: str
    port: int
    pid: int
    model_with_ids: str
    """Completions of it tell the ids of tokens; the chats' is `mock`."""
    headers: str = ""
    """Lines that its requests need."""

    def cpu_s(self) -> float:
        """Of all its processes, so far."""
        first = psutil.Process(self.pid)
        return cpu_s([first, *first.children(recursive=True)])


def pinned(core: int) -> tuple[str, ...]:
    """Before a command: it runs on this core only."""
    return ("taskset", "--cpu-list", str(core))


def free_port() -> int:
    with socket.create_server((HOST, 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.asynccontextmanager
async def backend(log: BinaryIO) -> AsyncIterator[tuple[int, int]]:
    """The mock's two ports."""
    command = (*pinned(LOAD_CORE), sys.executable, "-m", "bench.mock_backend")
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=log)
    try:
        assert process.stdout is not None
        plain, with_ids = (await asyncio.wait_for(process.stdout.readline(), READY_S)).split()
        yield int(plain), int(with_ids)
    finally:
        await _end(process)


@contextlib.asynccontextmanager
async def ours(ports: tuple[int, int], store: Path, *, at_once: bool = False) -> AsyncIterator[Peer]:
    """A node as users run it, that asks everybody for a key, logs every request and counts it.
    `at_once`: each token of a stream by itself."""
    options = {"pace_s": 0} if at_once else {}
    engines = [
        {"name": f"mock{port}", "kind": "openai", "url": f"http://{HOST}:{port}", "options": options}
        for port in ports
    ]
    async with node(
        store,
        None,
        engines=msgspec.json.encode(engines).decode(),
        settings={"REQUIRE_KEY": "true", "NUM_PARALLEL": "256", "CONTEXT_LENGTH": "32768"},
        before=pinned(GATEWAY_CORE),
    ) as started:
        key = f"authorization: Bearer {started.key}\r\n"
        peer = Peer(
            name=f"{OURS}, each token at once" if at_once else OURS,
            port=started.port,
            pid=started.pid,
            model_with_ids="mock-ids",
            headers=key,
        )
        await _answers(peer)
        yield peer


@contextlib.asynccontextmanager
async def _started(name: str, command: Sequence[str], port: int, log: BinaryIO) -> AsyncIterator[Peer]:
    process = await asyncio.create_subprocess_exec(*pinned(GATEWAY_CORE), *command, stdout=log, stderr=log)
    try:
        peer = Peer(name=name, port=port, pid=process.pid, model_with_ids="mock")
        await _answers(peer, lambda: process.returncode is None)
        yield peer
    finally:
        await _end(process)


@contextlib.asynccontextmanager
async def nginx(backend_port: int, folder: Path, log: BinaryIO) -> AsyncIterator[Peer]:
    port, file = free_port(), folder / "nginx.conf"
    file.write_text(_NGINX.format(folder=folder, backend=backend_port, port=port))
    command = (str(NGINX), "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(file))
    async with _started("nginx (a proxy only)", command, port, log) as peer:
        yield peer


@contextlib.asynccontextmanager
async def router(package: str, policy: str, backend_port: int, log: BinaryIO) -> AsyncIterator[Peer]:
    """`sglang_router` or `vllm_router`."""
    port = free_port()
    command = (
        str(PEERS_PYTHON), "-m", f"{package}.launch_router",
        "--worker-urls", f"http://{HOST}:{backend_port}",
        "--host", HOST, "--port", str(port), "--prometheus-port", str(free_port()),
        "--policy", policy, "--log-level", "error", "--disable-retries", "--disable-circuit-breaker",
        "--max-concurrent-requests", "100000",
    )  # fmt: skip
    async with _started(f"{package.replace('_', '-')} (Rust), {policy}", command, port, log) as peer:
        yield peer


async def _answers(peer: Peer, lives: Callable[[], bool] = lambda: True) -> None:
    """Wait until a chat comes through.

    Raises:
        RuntimeError: it ended, or none did in `READY_S`.
    """
    body = msgspec.json.encode({"model": "mock", "messages": [{"role": "user", "content": "hello"}]})
    name, _, value = peer.headers.strip().partition(": ")
    headers = {name: value} if name else {}
    deadline = time.monotonic() + READY_S
    why = "it ended"
    while lives() and time.monotonic() < deadline:
        try:
            answer = await fetch(
                TcpAddress(HOST, peer.port), "POST", "/v1/chat/completions",
                headers=headers, body=body, deadline_s=5.0,
            )  # fmt: skip
            if answer.status == 200:
                return
            why = f"{answer.status} {answer.body[:300]!r}"
        except OllamaDistributedError as error:
            why = error.message
        await asyncio.sleep(0.1)
    raise RuntimeError(f"{peer.name} does not answer: {why}")


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), 10)
        except TimeoutError:
            process.kill()
            await process.wait()
