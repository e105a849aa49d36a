"""The node as a process: how it starts, what it refuses, how it stops."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from ollama_distributed.models.scripted import CHATML_TEMPLATE, scripted_model
from tests.e2e.conftest import ANSWER, add_model
from tests.limits import SOON_S
from tests.nodes import running_node, until

pytestmark = pytest.mark.e2e


def refused(*arguments: str, env: dict[str, str] | None = None) -> str:
    """What `serve` says on stderr when it does not start."""
    ran = subprocess.run(
        [sys.executable, "-m", "ollama_distributed", "serve", *arguments],
        capture_output=True,
        text=True,
        timeout=SOON_S,
        env={**os.environ, **(env or {})},
        check=False,
    )
    assert ran.returncode in (1, 2), ran.stderr
    assert "Traceback" not in ran.stderr
    return ran.stderr


def test_what_cannot_start_says_why(tmp_path: Path) -> None:
    data = ("--data-dir", str(tmp_path / "node"))
    assert "write HOST:PORT" in refused(*data, "--listen", "127.0.0.1:x")
    assert "keep_alive" in refused(*data, env={"OLLAMA_KEEP_ALIVE": "soon"})
    assert "no settings file" in refused(*data, "--config", str(tmp_path / "absent.yaml"))
    assert "every web page" in refused(*data, env={"OLLAMA_ORIGINS": "*"})
    binary = tmp_path / "llama-server"
    binary.write_text("#!/bin/sh\nexit 3\n")
    binary.chmod(0o755)
    said = refused(*data, "--listen", "127.0.0.1:0", env={"OLLAMA_DISTRIBUTED_LLAMA_SERVER": str(binary)})
    assert "cannot be used" in said


def test_one_node_a_folder_and_a_port(tmp_path: Path) -> None:
    with running_node(tmp_path / "node") as node:
        assert "runs already" in refused("--data-dir", str(tmp_path / "node"), "--listen", "127.0.0.1:0")
        port = node.url.rpartition(":")[2]
        said = refused("--data-dir", str(tmp_path / "other"), "--listen", f"127.0.0.1:{port}")
        assert "taken by another program" in said


def test_a_restart_keeps_everything(tmp_path: Path) -> None:
    with running_node(tmp_path / "node") as node:
        add_model(node.url, "kept", scripted_model(ANSWER, chat_template=CHATML_TEMPLATE))
        first = node.id
        key = json.loads((tmp_path / "node/admin.json").read_text())["key"]
    with running_node(tmp_path / "node") as node, node.http() as http:
        assert node.id == first
        body = {"model": "kept", "prompt": "x", "stream": False}
        assert http.post("/api/generate", json=body).json()["response"] == ANSWER
        admin = json.loads((tmp_path / "node/admin.json").read_text())
        assert admin["key"] == key
        assert admin["url"] == node.url


def test_require_key(tmp_path: Path) -> None:
    with running_node(tmp_path / "node", "--require-key") as node, node.http() as http:
        assert http.get("/healthz").status_code == 200
        assert http.get("/api/tags").status_code == 401
        key = json.loads((tmp_path / "node/admin.json").read_text())["key"]
        assert http.get("/api/tags", headers={"authorization": f"Bearer {key}"}).status_code == 200
        assert http.get("/api/tags", headers={"x-api-key": key[:-1] + "x"}).status_code == 401


def test_a_stop_lets_a_running_answer_end(tmp_path: Path) -> None:
    echo = '[{"name": "echo", "kind": "echo", "options": {"tokens_per_s": 40, "hash_tokens": 60}}]'
    with (
        running_node(tmp_path / "node", env={"OLLAMA_DISTRIBUTED_ENGINES": echo}) as node,
        node.http() as http,
    ):
        lines: list[str] = []
        with http.stream("POST", "/api/generate", json={"model": "echo", "prompt": "x"}) as answer:
            for line in answer.iter_lines():
                lines.append(line)
                if len(lines) == 3:
                    os.kill(node.pid, signal.SIGTERM)
        assert json.loads(lines[-1])["done"] is True
        assert node.stop() == 0


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    """The answer would take ten minutes, and its node would wait for it."""
    echo = '[{"name": "echo", "kind": "echo", "options": {"tokens_per_s": 1, "hash_tokens": 600}}]'
    env = {"OLLAMA_DISTRIBUTED_ENGINES": echo, "OLLAMA_DISTRIBUTED_DRAIN_TIMEOUT": "10m"}
    with (
        running_node(tmp_path / "node", env=env) as node,
        node.http() as http,
        http.stream("POST", "/api/generate", json={"model": "echo", "prompt": "x"}) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        os.kill(node.pid, signal.SIGINT)
        # Of two signals that it has not seen yet the kernel makes one.
        until(lambda: not listens(node.url), SOON_S, "it has seen the first signal")
        os.kill(node.pid, signal.SIGINT)
        node.process.wait(SOON_S)
        assert "shutting down" in json.loads(list(lines)[-1])["error"]


def listens(url: str) -> bool:
    host, _, port = url.removeprefix("http://").partition(":")
    try:
        with socket.create_connection((host, int(port)), SOON_S):
            return True
    except ConnectionError:
        return False


def test_kill_9_of_the_node_takes_its_runners_with_it(tmp_path: Path) -> None:
    with running_node(tmp_path / "node") as node:
        add_model(node.url, "m", scripted_model(ANSWER, chat_template=CHATML_TEMPLATE))
        with node.http() as http:
            http.post("/api/generate", json={"model": "m", "prompt": "x", "stream": False}).raise_for_status()
        runners = psutil.Process(node.pid).children(recursive=True)
        assert runners
        node.kill()
        _, alive = psutil.wait_procs(runners, timeout=SOON_S)
        assert not alive
