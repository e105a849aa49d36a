"""Our own SDK and program against a real node, as people use them."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ollama_distributed.client import (
    ChatRequest,
    Client,
    CreateRequest,
    EmbeddingsRequest,
    Forbidden,
    GenerateRequest,
    Message,
    ModelNotFound,
    SyncClient,
    Unsupported,
)
from ollama_distributed.models.scripted import CHATML_TEMPLATE, scripted_model
from tests.e2e.conftest import ANSWER, CONCLUSION, THOUGHT
from tests.nodes import NodeProcess

pytestmark = pytest.mark.e2e

Run = Callable[..., subprocess.CompletedProcess[str]]


def admin_key(node: NodeProcess) -> str:
    return str(json.loads((node.data_dir / "admin.json").read_text())["key"])


def test_the_asyncio_client(node: NodeProcess) -> None:
    async def use() -> None:
        async with Client(["http://127.0.0.1:1", node.url], admin_key(node)) as client:
            assert (await client.health()).status == "ok"
            assert (await client.version()).engine is not None
            answer = await client.generate(GenerateRequest(model="scripted", prompt="hi"))
            assert answer.response == ANSWER
            assert answer.eval_count > 0
            pieces = [
                piece
                async for piece in client.generate_stream(GenerateRequest(model="scripted", prompt="hi"))
            ]
            assert "".join(piece.response for piece in pieces) == ANSWER
            assert len(pieces) > 3
            ask = ChatRequest(
                model="scripted-thinking", messages=[Message(role="user", content="hi")], think=True
            )
            said = (await client.chat(ask)).message
            assert said.content == CONCLUSION
            assert said.thinking is not None
            assert said.thinking.strip() == THOUGHT
            streamed = [piece.message.content async for piece in client.chat_stream(ask)]
            assert "".join(streamed) == CONCLUSION
            assert "scripted-thinking:latest" in [model.name for model in await client.models.loaded()]
            with pytest.raises(ModelNotFound):
                await client.generate(GenerateRequest(model="nope", prompt="x"))
            with pytest.raises(Forbidden, match="registries"):
                await client.models.download("registry.example/a/b")
            with pytest.raises(Unsupported):
                await client.embeddings(EmbeddingsRequest(model="scripted", input="x"))

    asyncio.run(use())


def test_the_sync_client_manages_models(node: NodeProcess) -> None:
    with SyncClient(node.url, admin_key(node)) as client:
        digest = client.models.create_blob(scripted_model("made here", chat_template=CHATML_TEMPLATE))
        assert client.models.has_blob(digest)
        lines = list(
            client.models.create(CreateRequest(model="sdk/made:1", files={"m.gguf": digest}, system="s"))
        )
        assert lines[-1].status == "success"
        assert client.models.show("sdk/made:1").system == "s"
        assert client.models.get("sdk/made:1").details.format == "gguf"
        client.models.copy("sdk/made:1", "sdk-copy")
        assert client.generate(GenerateRequest(model="sdk-copy", prompt="x")).response == "made here"
        client.models.unload("sdk-copy")
        for name in ("sdk/made:1", "sdk-copy"):
            client.models.delete(name)
        assert not {"sdk/made:1", "sdk-copy:latest"} & {model.name for model in client.models.list()}


def test_embeddings(node: NodeProcess, embedder: str) -> None:
    with SyncClient(node.url) as client:
        found = client.embeddings(EmbeddingsRequest(model=embedder, input=["a cat", "a dog"]))
    assert [len(vector) for vector in found.embeddings] == [384, 384]


@pytest.fixture
def run(node: NodeProcess) -> Run:
    env = {name: value for name, value in os.environ.items() if not name.startswith("OLLAMA_")}

    def program(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ollama_distributed", "--data-dir", str(node.data_dir), *arguments],
            env=env,
            input=text,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return program


def test_the_program_from_import_to_rm(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(scripted_model("as imported", chat_template=CHATML_TEMPLATE))
    (tmp_path / "Modelfile").write_text("FROM ./model.gguf\nSYSTEM be brief\nPARAMETER temperature 0\n")
    imported = run("import", str(tmp_path / "model.gguf"), "--name", "cli-imported")
    assert imported.returncode == 0, imported.stderr
    made = run("create", "cli-made", "-f", str(tmp_path / "Modelfile"))
    assert made.returncode == 0, made.stderr
    assert run("run", "cli-imported", "hello").stdout == "as imported\n"
    assert "cli-imported:latest" in run("ps").stdout
    assert "be brief" in run("show", "cli-made").stdout
    assert "FROM " in run("show", "cli-made", "--modelfile").stdout
    assert json.loads(run("generate", "cli-made", "x", "-o", "json").stdout)["response"] == "as imported"
    assert run("cp", "cli-made", "cli-copy").returncode == 0
    assert run("stop", "cli-imported").returncode == 0
    assert run("rm", "cli-imported", "cli-made", "cli-copy").returncode == 0
    assert "cli-" not in run("list").stdout
    missing = run("show", "cli-made")
    assert missing.returncode == 1
    assert "not found" in missing.stderr


def test_version_names_the_engine(run: Run) -> None:
    told = json.loads(run("version", "-o", "json").stdout)
    assert told["engine"].startswith("llama.cpp wheel")
    assert told["instruction_set"]
