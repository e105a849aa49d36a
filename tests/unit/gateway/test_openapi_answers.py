"""The OpenAPI document against the answers of the inference routes, field by field."""

import json
import re
from typing import Any

import httpx
import msgspec
import pytest
from tests.gateway_bench import USAGE, gateway

from ollama_distributed.base.inference import (
    Delta,
    EmbedResult,
    Finished,
    Opened,
    RerankResult,
    TokenLogprob,
    ToolCall,
    TopLogprob,
)
from ollama_distributed.gateway.openapi import HOT_BODIES
from ollama_distributed.testing.fake_cluster import FakeCluster
from ollama_distributed.testing.inference import ScriptedInference

pytestmark = pytest.mark.anyio

TEXT = (
    Opened(prompt_tokens=7),
    Delta(thinking="Hm."),
    Delta(
        text="Hi",
        logprobs=(TokenLogprob("Hi", -0.5, b"Hi", (TopLogprob("Ho", -1.5, b"Ho"),)),),
    ),
    Finished(reason="stop", usage=msgspec.structs.replace(USAGE, reasoning_tokens=1), moves=1),
)
CALL = (
    Opened(prompt_tokens=7),
    Delta(tool_calls=(ToolCall(index=0, id="call_1", name="f", arguments='{"a":1}'),)),
    Finished(reason="tool_calls", usage=USAGE),
)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "stream": False}
PROMPT = {"prompt": "hi", "stream": False}
LOGPROBS = {"logprobs": True, "top_logprobs": 1}
RANK = {"query": "q", "documents": ["a", "b"], "return_documents": True}
ASKS: dict[str, list[dict[str, Any]]] = {
    "/api/v1/generate": [PROMPT | LOGPROBS],
    "/api/generate": [PROMPT | LOGPROBS],
    "/api/v1/chat": [CHAT | LOGPROBS, CHAT | {"tools": [TOOL]}],
    "/api/chat": [CHAT | LOGPROBS, CHAT | {"tools": [TOOL]}],
    "/api/v1/embeddings": [{"input": ["a", "b"]}],
    "/api/embed": [{"input": "a"}],
    "/api/embeddings": [{"prompt": "a"}],
    "/v1/chat/completions": [
        CHAT | LOGPROBS,
        CHAT | {"tools": [TOOL]},
        CHAT | {"functions": [TOOL["function"]]},
    ],
    "/v1/completions": [PROMPT | {"logprobs": 1}],
    "/v1/embeddings": [{"input": "a"}, {"input": "a", "encoding_format": "base64"}],
    "/v1/responses": [
        {"input": "hi", "include": ["message.output_text.logprobs"], "top_logprobs": 1},
        {"input": "hi", "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}]},
    ],
    "/v1/responses/input_tokens": [{"input": "hi"}],
    "/v1/messages": [
        {"messages": CHAT["messages"], "max_tokens": 9},
        {
            "messages": CHAT["messages"],
            "max_tokens": 9,
            "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        },
    ],
    "/v1/messages/count_tokens": [{"messages": CHAT["messages"]}],
    "/v1/rerank": [RANK],
    "/v2/rerank": [RANK],
    "/rerank": [RANK],
}


async def answer_of(path: str, body: dict[str, object]) -> httpx.Response:
    inference = ScriptedInference(
        CALL if "tools" in body or "functions" in body else TEXT,
        embedded=EmbedResult(vectors=((0.5, 0.25),), usage=USAGE),
        ranked=RerankResult(scores=(0.5, 0.75), usage=USAGE),
        tokens=7,
    )
    transport = httpx.ASGITransport(gateway(inference), client=("127.0.0.1", 5))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8080") as client:
        return await client.post(path, json={"model": "m", **body})


def holds(told: Any, raw: bytes) -> None:
    """Nothing is in it that the document does not tell of, and nothing that it tells is missing."""
    read = msgspec.json.decode(raw, type=told)
    assert msgspec.to_builtins(read) == json.loads(raw)


@pytest.mark.parametrize("path", HOT_BODIES)
async def test_an_answer_holds_what_the_document_tells(path: str) -> None:
    _, told, _ = HOT_BODIES[path]
    for body in ASKS[path]:
        answer = await answer_of(path, body)
        assert answer.status_code == 200, answer.text
        holds(told, answer.content)


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat", "/api/v1/generate", "/api/v1/chat"])
async def test_a_line_of_a_stream_is_as_the_whole_answer(path: str) -> None:
    _, told, _ = HOT_BODIES[path]
    for body in ASKS[path]:
        answer = await answer_of(path, body | {"stream": True})
        lines = answer.content.splitlines()
        assert len(lines) > 1
        for line in lines:
            holds(told, line)


async def test_every_answer_tells_its_headers_and_every_reference_leads_somewhere() -> None:
    transport = httpx.ASGITransport(
        gateway(ScriptedInference(), cluster=FakeCluster(), access=object()), client=("127.0.0.1", 5)
    )
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8080") as client:
        answer = await client.get("/openapi.json", headers={"origin": "http://localhost:3000"})
    document = answer.json()
    exposed = answer.headers["access-control-expose-headers"].split(", ")
    told = {name.lower() for name in document["components"]["headers"]}
    assert told - {"www-authenticate", "allow"} == set(exposed)  # what scripts of other origins may read
    for references in re.findall(r'"#/components/([^"]+)"', json.dumps(document)):
        kind, _, name = references.partition("/")
        assert name in document["components"][kind]
    answers = [
        answer
        for operations in document["paths"].values()
        for operation in operations.values()
        for answer in operation["responses"].values()
    ]
    assert all("X-Request-Id" in answer["headers"] for answer in answers)
    schemas = document["components"]["schemas"]
    assert schemas["NodeRow"]["required"] == list(schemas["NodeRow"]["properties"])  # all are always sent
    assert "node" not in schemas["ResidentRow"]["required"]  # left out where it is this one
    assert schemas["KeyAsk"]["required"] == []
    chat = document["paths"]["/api/chat"]["post"]["responses"]
    assert {"X-Ollama-Node", "X-RateLimit-Remaining-Tokens"} <= chat["200"]["headers"].keys()
    assert {"Retry-After", "X-RateLimit-Remaining-Tokens"} <= chat["default"]["headers"].keys()
