"""Open WebUI: its own server before two nodes, asked by the API that its pages use."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from trying import (
    ANSWER,
    ASK,
    CALLS,
    CONCLUSION,
    EMBEDS,
    ENDLESS,
    KEY,
    KEYED_URL,
    PARAMETERS,
    SAYS,
    THINKS,
    URL,
    WRONG_KEY,
    feature,
    freed,
    run,
    same,
)

PROGRAM = str(Path(sys.executable).parent / "open-webui")
START_S = 240.0
"""It makes its database first."""
ADMIN = {"name": "Ada", "email": "ada@example.org", "password": "A-long-passw0rd"}
OPEN, KEYED = 0, 1
"""The places of the two nodes in its list of connections."""
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}]
FACT = b"The project Kestrel ships on 14 March. Its lead is Mina Okafor. " * 20


@contextmanager
def open_webui() -> Iterator[httpx.Client]:
    """Its server, and a client that is signed in as its first admin."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {
            "DATA_DIR": folder,
            "WEBUI_SECRET_KEY": "of a test",
            "OFFLINE_MODE": "true",
            "ANONYMIZED_TELEMETRY": "false",
            "OLLAMA_BASE_URLS": f"{URL};{KEYED_URL}",
            "OLLAMA_API_CONFIGS": json.dumps({str(KEYED): {"key": KEY}}),
            "OPENAI_API_BASE_URLS": f"{KEYED_URL}/v1",
            "OPENAI_API_KEYS": KEY,
            "OPENAI_API_CONFIGS": json.dumps({"0": {"prefix_id": "openai"}}),
            "RAG_EMBEDDING_ENGINE": "ollama",
            "RAG_EMBEDDING_MODEL": f"{EMBEDS}:latest",
            "RAG_OLLAMA_BASE_URL": URL,
        }
        command = [PROGRAM, "serve", "--host", "127.0.0.1", "--port", str(port)]
        server = subprocess.Popen(command, env=env, cwd=folder, stdout=sys.stderr)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as asks:
                _until_ready(asks, server)
                signed = asks.post("/api/v1/auths/signup", json=ADMIN).raise_for_status()
                asks.headers["Authorization"] = f"Bearer {signed.json()['token']}"
                yield asks
        finally:
            server.terminate()
            server.wait(60)


def _until_ready(asks: httpx.Client, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and server.poll() is None:
        try:
            if asks.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise RuntimeError("Open WebUI did not start; its log is above")


def answer(model: str, **more: Any) -> dict[str, Any]:
    body = {"model": model, "messages": ASK, "stream": False} | more
    said = asks.post("/api/chat/completions", json=body)
    assert said.status_code == 200, said.text
    return said.json()["choices"][0]


def models() -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in asks.get("/api/models", params={"refresh": True}).json()["data"]}


@feature("list")
def lists() -> None:
    found = models()
    same(found[f"{SAYS}:latest"]["ollama"]["urls"], [OPEN, KEYED])
    assert f"openai.{SAYS}:latest" in found
    assert asks.get("/ollama/api/version").json()["version"][0].isdigit()
    assert asks.post("/ollama/api/show", json={"model": f"{SAYS}:latest"}).json()["capabilities"]


@feature("chat")
def chat() -> None:
    for model in (SAYS, f"openai.{SAYS}"):
        same(answer(f"{model}:latest")["message"]["content"], ANSWER)


@feature("stream")
def stream() -> None:
    for model in (SAYS, f"openai.{SAYS}"):
        body = {"model": f"{model}:latest", "messages": ASK, "stream": True}
        with asks.stream("POST", "/api/chat/completions", json=body) as said:
            lines = [line[6:] for line in said.iter_lines() if line.startswith("data: ")]
        same(lines[-1], "[DONE]")
        deltas = [row["choices"][0]["delta"] for row in map(json.loads, lines[:-1]) if row["choices"]]
        same("".join(delta.get("content") or "" for delta in deltas), ANSWER)


@feature("cancel")
def cancel() -> None:
    """Who closes the page ends the work of the node."""
    body = {"model": f"{ENDLESS}:latest", "messages": ASK, "stream": True}
    with asks.stream("POST", f"/ollama/api/chat/{OPEN}", json=body) as said:
        next(said.iter_lines())
    freed(ENDLESS)


@feature("tools")
def tools() -> None:
    for model in (CALLS, f"openai.{CALLS}"):
        choice = answer(f"{model}:latest", tools=TOOLS)
        same(choice["message"]["tool_calls"][0]["function"]["name"], "get_weather")


@feature("thinking")
def thinking() -> None:
    assert CONCLUSION in answer(f"{THINKS}:latest")["message"]["content"]


@feature("tasks")
def tasks() -> None:
    for task in ("title", "tags", "follow_up", "emoji"):
        body = {"model": f"{SAYS}:latest", "messages": ASK, "prompt": "Say it.", "stream": False}
        told = asks.post(f"/api/v1/tasks/{task}/completions", json=body)
        assert told.status_code == 200, told.text
        assert told.json()["choices"][0]["message"]["content"]


@feature("embed")
def embed() -> None:
    told = asks.post("/ollama/api/embed", json={"model": f"{EMBEDS}:latest", "input": ["a", "b"]})
    assert told.status_code == 200, told.text
    same([len(row) for row in told.json()["embeddings"]], [384, 384])


@feature("documents")
def documents() -> None:
    """A file is cut, embedded by a node, found again and goes into the question."""
    sent = asks.post("/api/v1/files/", files={"file": ("notes.txt", FACT, "text/plain")}).json()
    end = time.monotonic() + 60
    while (asks.get(f"/api/v1/files/{sent['id']}").json()["data"] or {}).get("status") != "completed":
        assert time.monotonic() < end, "the file was not embedded in a minute"
        time.sleep(0.2)
    body = {"model": f"{SAYS}:latest", "messages": ASK, "files": [{"type": "file", "id": sent["id"]}]}
    told = asks.post("/api/chat/completions", json=body | {"stream": False}).json()
    assert "Kestrel" in told["sources"][0]["document"][0]


@feature("models")
def changes() -> None:
    """What its admin pages do: copy, create, unload, delete."""

    def done(method: str, route: str, **body: Any) -> None:
        told = asks.request(method, f"/ollama/api/{route}", json=body)
        same((told.status_code, "error" in told.text), (200, False))

    done("POST", f"copy/{OPEN}", source=SAYS, destination="copied")
    done("POST", f"create/{OPEN}", model="pirate", **{"from": SAYS}, system="You are a pirate.")
    assert {"copied:latest", "pirate:latest"} <= set(models())
    answer("pirate:latest")
    assert asks.get("/ollama/api/ps").json()["models"]
    done("POST", "unload", model="pirate:latest")
    for name in ("copied:latest", "pirate:latest"):
        done("DELETE", f"delete/{OPEN}", model=name)
    assert not {"copied:latest", "pirate:latest"} & set(models())


@feature("key")
def key() -> None:
    """What a wrong key is told comes to the person; the role `user` may ask, not change."""
    assert asks.post("/ollama/verify", json={"url": KEYED_URL, "key": KEY}).json()["version"]
    told = asks.post("/ollama/verify", json={"url": KEYED_URL, "key": WRONG_KEY})
    assert "key is not valid" in told.text, told.text
    told = asks.request("DELETE", f"/ollama/api/delete/{KEYED}", json={"model": f"{SAYS}:latest"})
    same(told.status_code, 403)


with open_webui() as asks:
    run("open-webui")
