"""Requests/s and CPU of the gateway alone, over a fake inference: `python bench/gateway_hot_path.py`.

One server process; clients in another; both on loopback and bounded in count. CPU per
request and per chunk is the server's own (it does not depend on how fast the client is);
req/s per core is its inverse, wall req/s is what this machine's client could ask for.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import resource
import socket
import sys
import time
from typing import Any

import structlog
import uvicorn
import uvloop
from tests.gateway_bench import gateway

from ollama_distributed.base.inference import Delta, Finished, Opened, Usage
from ollama_distributed.gateway.fast import fast_protocol_class
from ollama_distributed.gateway.limits import Limits
from ollama_distributed.gateway.protocol import protocol_class
from ollama_distributed.testing.inference import ScriptedGeneration

CONNECTIONS = 32
CHUNKS = 200
_USAGE = Usage(prompt_tokens=20, completion_tokens=CHUNKS, total_s=1.0)


class Instant:
    """Answers at once: one text, or many pieces for a prompt that begins with `s`."""

    def open(self, request: Any, sink: Any) -> ScriptedGeneration:
        sink(Opened(prompt_tokens=20))
        if request.prompt.text.startswith("s"):
            for _ in range(CHUNKS):
                sink(Delta(text=" word"))
        else:
            sink(Delta(text="x" * 700))
        sink(Finished(reason="stop", usage=_USAGE))
        return ScriptedGeneration(request, sink)


def serve(adapter: str, port: socket.socket, cpu: Any) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    app = gateway(Instant())
    kind = fast_protocol_class(app.hot, Limits()) if adapter == "fast" else protocol_class(Limits())
    config = uvicorn.Config(app, http=kind, ws="none", proxy_headers=False, access_log=False, log_config=None)
    server = uvicorn.Server(config)

    async def run() -> None:
        async def report() -> None:
            while True:
                usage = resource.getrusage(resource.RUSAGE_SELF)
                cpu.value = usage.ru_utime + usage.ru_stime
                await asyncio.sleep(0.02)

        task = asyncio.create_task(report())
        await server.serve(sockets=[port])
        task.cancel()

    uvloop.run(run())


async def ask(port: int, body: bytes, count: int, end: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /api/generate HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {len(body)}\r\n"
    request = (head + "Content-Type: application/json\r\nUser-Agent: bench\r\n\r\n").encode() + body
    for _ in range(count):
        writer.write(request)
        await reader.readuntil(end)
    writer.close()


async def load(port: int, body: dict[str, Any], count: int, end: bytes) -> float:
    data = json.dumps(body).encode()
    start = time.perf_counter()
    await asyncio.gather(*(ask(port, data, count // CONNECTIONS, end) for _ in range(CONNECTIONS)))
    return time.perf_counter() - start


def measure(adapter: str) -> dict[str, float]:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    cpu = multiprocessing.Value("d", 0.0, lock=False)
    child = multiprocessing.Process(target=serve, args=(adapter, listener, cpu))
    child.start()
    found: dict[str, float] = {}
    try:
        plain = {"model": "m", "prompt": "p" * 1000, "stream": False}
        uvloop.run(load(port, plain, 640, b'"eval_count":200}'))
        for name, body, count, end in (
            ("1 KB", plain, 32_000, b'"eval_count":200}'),
            ("31 KB", {**plain, "prompt": "p" * 31_000}, 6_400, b'"eval_count":200}'),
            ("stream", {"model": "m", "prompt": "s" * 1000}, 960, b"0\r\n\r\n"),
        ):
            time.sleep(0.1)
            before = cpu.value
            wall = uvloop.run(load(port, body, count, end))
            time.sleep(0.1)
            used = cpu.value - before
            found[f"{name}: cpu us/request"] = used / count * 1e6
            found[f"{name}: requests/s/core"] = count / used
            found[f"{name}: wall requests/s"] = count / wall
        per_stream = found["stream: cpu us/request"] - found["1 KB: cpu us/request"]
        found["stream: cpu us/chunk"] = per_stream / CHUNKS
    finally:
        child.terminate()
        child.join()
        listener.close()
    return found


if __name__ == "__main__":
    for adapter in sys.argv[1:] or ["asgi", "fast"]:
        for name, value in measure(adapter).items():
            print(f"{adapter:5} {name:28} {value:10.1f}")
    print("load average", os.getloadavg())
