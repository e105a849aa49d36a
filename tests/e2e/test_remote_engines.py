"""Servers that run already as engines of a node: here, another node by its OpenAI and Ollama APIs."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest

from tests.e2e.conftest import ANSWER
from tests.limits import SOON_S
from tests.nodes import NodeProcess, running_node, until

pytestmark = pytest.mark.e2e

MESSAGES = [{"role": "user", "content": "Say it."}]


@pytest.fixture(scope="module", params=["openai", "ollama"])
def front(
    request: pytest.FixtureRequest, node: NodeProcess, embedder: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[NodeProcess]:
    """A node without models of its own, before `node`."""
    engines = [{"name": "back", "kind": request.param, "url": node.url}]
    folder = tmp_path_factory.mktemp(f"front-{request.param}") / "node"
    with running_node(folder, env={"OLLAMA_DISTRIBUTED_ENGINES": json.dumps(engines)}) as started:
        with started.http() as http:  # it gives the other one 5 s for its list, and looks again later
            until(lambda: names(http), SOON_S, "it has heard of models")
        yield started


def names(http: httpx.Client) -> set[str]:
    return {model["name"] for model in http.get("/api/tags").json()["models"]}


def test_its_models_are_listed(front: NodeProcess) -> None:
    with front.http() as http:
        assert {"scripted:latest", "smollm2:135m"} <= names(http)


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/api/chat", {"messages": MESSAGES, "stream": False}, ("message", "content")),
        ("/api/generate", {"prompt": "Say it.", "stream": False}, ("response",)),
        ("/v1/chat/completions", {"messages": MESSAGES}, ("choices", 0, "message", "content")),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 99}, ("content", 0, "text")),
    ],
)
def test_it_answers(
    front: NodeProcess, path: str, body: dict[str, object], field: tuple[str | int, ...]
) -> None:
    with front.http() as http:
        answer = http.post(path, json={"model": "scripted", **body})
        assert answer.status_code == 200, answer.text
        found = answer.json()
        for step in field:
            found = found[step]
        assert found == ANSWER


def test_it_streams_and_stops_where_asked(front: NodeProcess) -> None:
    body = {"model": "scripted", "messages": MESSAGES, "options": {"stop": ["jumps"]}}
    with front.http() as http, http.stream("POST", "/api/chat", json=body) as answer:
        lines = [json.loads(line) for line in answer.iter_lines()]
    assert "".join(line["message"]["content"] for line in lines) == ANSWER.partition("jumps")[0]
    assert lines[-1]["done_reason"] == "stop"


def test_it_embeds(front: NodeProcess, embedder: str) -> None:
    with front.http() as http:
        answer = http.post("/api/embed", json={"model": embedder, "input": ["a", "b"]})
        assert answer.status_code == 200, answer.text
        assert [len(vector) for vector in answer.json()["embeddings"]] == [384, 384]


def test_its_errors_come_through(front: NodeProcess) -> None:
    with front.http() as http:
        assert http.post("/api/chat", json={"model": "absent", "messages": MESSAGES}).status_code == 404
