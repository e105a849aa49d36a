"""Pull, push and download over ASGI: lines, errors, clients and nodes that go away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from tests.gateway_bench import DEADLINE_S, gateway, serving, until

from ollama_distributed.base import errors as e
from ollama_distributed.distribution.downloads import Transfer
from ollama_distributed.distribution.ports import Status
from ollama_distributed.testing.inference import ScriptedInference

LINE = Status(status="pulling 0123456789ab", digest="sha256:01", total=9, completed=4)


class FakeTransfers:
    """Gives out `lines`; an exception among them is raised, an event waited for."""

    def __init__(self, *lines: Any) -> None:
        self.lines = lines
        self.asked: list[tuple[str, str]] = []
        self.running = 0

    async def _told(self) -> AsyncIterator[Status]:
        self.running += 1
        try:
            for line in self.lines:
                if isinstance(line, Exception):
                    raise line
                if isinstance(line, asyncio.Event):
                    await line.wait()
                else:
                    yield line
        finally:
            self.running -= 1

    def pull(self, name: str) -> AsyncIterator[Status]:
        self.asked.append(("pull", name))
        return self._told()

    def push(self, name: str) -> AsyncIterator[Status]:
        self.asked.append(("push", name))
        return self._told()

    def download(self, name: str) -> Transfer:
        self.asked.append(("download", name))
        return Transfer(id="t1", model=name, state="running")


async def ask(transfers: FakeTransfers, path: str, **body: Any) -> httpx.Response:
    app = gateway(ScriptedInference([]), transfers=transfers)
    transport = httpx.ASGITransport(app, client=("127.0.0.1", 4711))  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        answer = await client.post(path, json=body)
    await app.close()
    return answer


@pytest.mark.parametrize("verb", ["pull", "push"])
async def test_each_line_as_it_comes(verb: str) -> None:
    transfers = FakeTransfers(Status(status="first"), LINE, Status(status="success"))
    answer = await ask(transfers, f"/api/{verb}", name="a/b")
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert answer.text.splitlines() == [
        '{"status":"first"}',
        '{"status":"pulling 0123456789ab","digest":"sha256:01","total":9,"completed":4}',
        '{"status":"success"}',
    ]
    assert transfers.asked == [(verb, "a/b")]
    last = await ask(transfers, f"/api/{verb}", model="a/b", stream=False, insecure=True)
    assert last.json() == {"status": "success"}
    assert transfers.running == 0


@pytest.mark.parametrize("stream", [True, False])
async def test_errors(stream: bool) -> None:
    early = await ask(FakeTransfers(e.Forbidden("not there")), "/api/pull", model="x", stream=stream)
    assert (early.status_code, early.json()) == (403, {"error": "not there"})
    late = await ask(FakeTransfers(LINE, e.DiskFull("no space left")), "/api/pull", model="x", stream=stream)
    assert late.status_code == (200 if stream else 507)
    assert json.loads(late.text.splitlines()[-1]) == {"error": "no space left"}
    ours = await ask(FakeTransfers(LINE, ValueError("secret")), "/api/pull", model="x", stream=stream)
    assert "secret" not in ours.text


async def test_names_are_needed() -> None:
    assert (await ask(FakeTransfers(), "/api/pull")).json() == {"error": "invalid model name"}
    assert (await ask(FakeTransfers(), "/api/push", model="")).json() == {"error": "model is required"}


async def test_download_answers_at_once() -> None:
    transfers = FakeTransfers()
    answer = await ask(transfers, "/api/v1/models/registry.example:5000/a/b:c/download")
    assert answer.status_code == 200
    assert answer.json()["id"] == "t1"
    assert transfers.asked == [("download", "registry.example:5000/a/b:c")]


@pytest.mark.parametrize("adapter", ["fast", "asgi"])
@pytest.mark.parametrize("stream", ["true", "false"])
async def test_who_hangs_up_ends_the_work(adapter: str, stream: str) -> None:
    transfers = FakeTransfers(LINE, asyncio.Event())
    app = gateway(ScriptedInference([]), transfers=transfers)
    body = f'{{"model":"x","stream":{stream}}}'.encode()
    request = b"POST /api/pull HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    async with serving(app, adapter=adapter) as server:
        async with await server.connect() as client:
            await client.send(request + b"content-length: %d\r\n\r\n" % len(body) + body)
            await until(lambda: bool(transfers.running), "the work began")
        await until(lambda: not transfers.running, "the work ended")


async def test_a_node_that_stops_ends_the_work() -> None:
    ready = True
    transfers = FakeTransfers(LINE, asyncio.Event())
    app = gateway(ScriptedInference([]), transfers=transfers, ready=lambda: ready)
    async with (
        serving(app, adapter="fast") as server,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as client,
        client.stream("POST", "/api/pull", json={"model": "x"}) as answer,
    ):
        lines = answer.aiter_lines()
        assert json.loads(await anext(lines))["completed"] == 4
        ready = False
        async with asyncio.timeout(DEADLINE_S):
            assert "shutting down" in json.loads(await anext(lines))["error"]
    assert transfers.running == 0
