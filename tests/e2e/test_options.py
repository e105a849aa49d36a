"""Options that a client may send and that must not take a model away from others."""

from __future__ import annotations

import datetime

import pytest

from tests.e2e.conftest import ANSWER
from tests.nodes import NodeProcess

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("num_batch", [1, 2, 3, 5, 100_000])
def test_any_batch_size_loads(node: NodeProcess, num_batch: int) -> None:
    body = {"model": "scripted", "prompt": "x", "stream": False, "options": {"num_batch": num_batch}}
    with node.http() as http:
        answer = http.post("/api/generate", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["response"] == ANSWER


@pytest.mark.parametrize("num_ctx", [4, 5, 6, 31, 511, 512])
def test_any_context_embeds(node: NodeProcess, embedder: str, num_ctx: int) -> None:
    body = {"model": embedder, "input": "the quick brown fox " * 40, "options": {"num_ctx": num_ctx}}
    with node.http() as http:
        answer = http.post("/api/embed", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["prompt_eval_count"] <= num_ctx
        if num_ctx < 200:
            assert http.post("/api/embed", json={**body, "truncate": False}).status_code == 400


@pytest.mark.parametrize("num_ctx", [1, 2])
def test_a_context_without_room_is_an_error(node: NodeProcess, embedder: str, num_ctx: int) -> None:
    body = {"model": embedder, "input": "the quick brown fox", "options": {"num_ctx": num_ctx}}
    with node.http() as http:
        answer = http.post("/api/embed", json=body)
        assert answer.status_code == 400
        assert "exceeds maximum context length" in answer.json()["error"]


@pytest.mark.parametrize("keep_alive", [10**12, "1000000h", -1])
def test_the_longest_stay_is_a_date_that_clients_read(node: NodeProcess, keep_alive: object) -> None:
    body = {"model": "scripted", "prompt": "x", "stream": False, "keep_alive": keep_alive}
    with node.http() as http:
        assert http.post("/api/generate", json=body).status_code == 200
        rows = http.get("/api/ps").json()["models"]
        assert all(datetime.datetime.fromisoformat(row["expires_at"]).year < 3000 for row in rows)
        http.post("/api/generate", json={**body, "keep_alive": "5m"}).raise_for_status()


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_the_limit_cut_is_left_out(node: NodeProcess, stream: bool) -> None:
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
    body = {
        "model": "scripted-tools",
        "messages": [{"role": "user", "content": "x"}],
        "tools": [tool],
        "options": {"num_predict": 8},
        "stream": stream,
    }
    with node.http() as http:
        answer = http.post("/api/chat", json=body)
        assert answer.status_code == 200, answer.text
        assert '"done_reason":"length"' in answer.text
        assert '"error"' not in answer.text
