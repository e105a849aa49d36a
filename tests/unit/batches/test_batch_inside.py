"""Lines of batches on the hot path: as requests from outside, of the lowest class, without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import msgspec
import pytest
from tests.gateway_bench import HELLO, Bench, gateway

from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import KeyId
from ollama_distributed.base.inference import EmbedResult
from ollama_distributed.batches.ports import Answer
from ollama_distributed.client.batches import form
from ollama_distributed.gateway.dialects import openai
from ollama_distributed.gateway.inside import Inside
from ollama_distributed.gateway.multipart import Field, FileBegins, FileData, FileEnds, Multipart
from ollama_distributed.testing.inference import ScriptedInference

CHAT = "/v1/chat/completions"
USER = Identity("user", KeyId("k1"), team="red")
BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


async def ask(inference: ScriptedInference, body: Any, identity: Identity = USER, path: str = CHAT) -> Answer:
    inside = Inside(Bench(inference, routes=openai.ROUTES).path)
    async with asyncio.timeout(30):
        return await inside(path, json.dumps(body).encode(), identity, "batch_req_1")


async def test_a_line_is_answered_as_its_owner_in_the_lowest_class() -> None:
    inference = ScriptedInference(HELLO)
    answer = await ask(inference, BODY)
    assert answer.status == 200
    assert json.loads(answer.body)["choices"][0]["message"]["content"] == "Hello"
    (asked,) = inference.generations
    assert (asked.request.identity, asked.request.priority) == (USER, "batch")
    assert asked.request.request_id == "batch_req_1"


async def test_what_is_wrong_with_a_line_is_its_answer() -> None:
    answer = await ask(ScriptedInference(HELLO), {"model": "m"})
    assert answer.status == 400
    assert json.loads(answer.body)["error"]["type"] == "invalid_request_error"
    assert (await ask(ScriptedInference(HELLO), BODY, Identity("viewer", KeyId("v")))).status == 403


async def test_embeddings_are_answered_too() -> None:
    inference = ScriptedInference(embedded=EmbedResult(vectors=((0.0, 1.0),)))
    bench = Bench(inference, routes=openai.ROUTES)
    tasks: list[asyncio.Task[None]] = []

    def spawn(work: Coroutine[Any, Any, None]) -> Callable[[], object]:
        tasks.append(asyncio.create_task(work))
        return tasks[-1].cancel

    bench.path.means = msgspec.structs.replace(bench.path.means, spawn=spawn)
    async with asyncio.timeout(30):
        answer = await Inside(bench.path)("/v1/embeddings", b'{"model":"m","input":"x"}', USER, "batch_req_2")
    assert json.loads(answer.body)["data"][0]["embedding"] == [0.0, 1.0]
    await asyncio.gather(*tasks)


async def test_a_line_that_is_given_up_frees_its_slot() -> None:
    inference = ScriptedInference(hold=True)
    task = asyncio.create_task(ask(inference, BODY))
    async with asyncio.timeout(30):
        while not inference.generations:
            await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert inference.generations[0].cancelled == 1


def test_the_client_sends_a_form_that_the_server_reads() -> None:
    upload = form(b'{"a": 1}\n', 'x"y\r\n.jsonl', 7200, None)
    sent = b"".join(upload.chunks())
    assert len(sent) == upload.size_bytes
    parser = Multipart(upload.boundary.encode())
    events = parser.feed(sent)
    parser.finish()
    assert events == [
        Field("purpose", "batch"),
        Field("expires_after[anchor]", "created_at"),
        Field("expires_after[seconds]", "7200"),
        FileBegins("file", "x_y__.jsonl"),
        FileData(b'{"a": 1}\n'),
        FileEnds(),
    ]


@pytest.mark.anyio
async def test_an_end_that_counts_from_elsewhere_is_refused_before_anything_is_kept() -> None:
    transport = httpx.ASGITransport(gateway(ScriptedInference(), batches=object()), client=("127.0.0.1", 5))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8080") as client:
        for more in ({}, {"expires_after[seconds]": "60"}):
            fields = {"purpose": "batch", "expires_after[anchor]": "today", **more}
            answer = await client.post("/v1/files", data=fields, files={"file": b"{}"})
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == "expires_after[anchor]"
