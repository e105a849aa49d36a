"""The seed's routes: Ollama's bodies, one object by default, errors of their own shape."""

import json

import pytest
from tests.gateway_bench import HELLO, Bench

from ollama_distributed.base import errors as e
from ollama_distributed.base.inference import Delta, EmbedResult, Failed
from ollama_distributed.testing.inference import ScriptedInference


def bench(*events, **extra):
    return Bench(ScriptedInference(events or HELLO, **extra))


def test_generate_without_stream_is_one_object():
    out = bench().post("/api/v1/generate", {"model": "m", "prompt": "Explain artificial intelligence"})
    assert out.headers["content-type"].startswith("application/json")
    assert out.json()["response"] == "Hello"
    assert out.json()["done"] is True


def test_streams_on_request_as_ndjson():
    out = bench().post("/api/v1/generate", {"model": "m", "prompt": "p", "stream": True})
    assert out.headers["content-type"] == "application/x-ndjson"
    assert "".join(line["response"] for line in out.lines()) == "Hello"
    chat = {"model": "m", "messages": [{"role": "user", "content": "p"}], "stream": True}
    assert bench().post("/api/v1/chat", chat).lines()[0]["message"]["content"] == "Hel"


def test_embeddings():
    out = bench(embedded=EmbedResult(vectors=((1.0, 0.0),))).post(
        "/api/v1/embeddings", {"model": "m", "input": "a"}
    )
    assert out.json() == {"model": "m", "embeddings": [[1.0, 0.0]]}


@pytest.mark.parametrize("path", ["/api/v1/generate", "/api/v1/chat", "/api/v1/embeddings"])
def test_errors_have_code_and_request_id(path):
    out = bench().post(path, {}, x_request_id="abc-1")
    assert out.status == 400
    assert out.json() == {
        "error": {
            "code": "invalid_request",
            "message": "model is required",
            "retryable": False,
            "request_id": "abc-1",
        }
    }
    assert out.headers["x-request-id"] == "abc-1"


def test_queue_full_is_429_here():
    out = bench(Failed(e.QueueFull("full", retry_after_s=4))).post(
        "/api/v1/generate", {"model": "m", "prompt": "p"}
    )
    assert out.status == 429
    assert 4 <= int(out.headers["retry-after"]) <= 13
    assert out.json()["error"]["retryable"] is True


def test_a_failed_stream_ends_with_the_same_code():
    body = {"model": "m", "prompt": "p", "stream": True}
    out = bench(Delta(text="a"), Failed(e.RunnerDied("gone"))).post("/api/v1/generate", body)
    last = json.loads(out.body.splitlines()[-1])
    assert last["error"]["code"] == "runner_died"
