"""What a user sees when something breaks: a clear error, a node that goes on, nothing half-written.

`make accept-faults` runs more rounds (FAULT_ROUNDS).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import httpx
import psutil
import pytest

from ollama_distributed.models.scripted import CHATML_TEMPLATE, scripted_model
from ollama_distributed.node.listeners import allow_files
from tests.e2e.conftest import ANSWER, add_model
from tests.limits import SOON_S
from tests.nodes import NodeProcess, running_node

pytestmark = pytest.mark.e2e

MESSAGES = [{"role": "user", "content": "x"}]
_numbers = itertools.count()
ROUNDS = int(os.environ.get("FAULT_ROUNDS", "2"))
DEADLINE_S = SOON_S
MIB = 1024 * 1024


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not seen within {DEADLINE_S:.0f} s: {what}"
        time.sleep(0.02)


def runners(node: NodeProcess) -> list[psutil.Process]:
    """The child processes that hold a model."""
    found = []
    for child in psutil.Process(node.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it ended meanwhile, or nobody has heard of its end yet
            if "runner" in " ".join(child.cmdline()):
                found.append(child)
    return found


@pytest.fixture
def talker(node: NodeProcess) -> str:
    """A model that never stops by itself; new each time, since three crashes quarantine one."""
    name = f"endless-{next(_numbers)}"
    model = scripted_model(
        "on and on ", chat_template=CHATML_TEMPLATE, endless=True, name=name, context_tokens=131_072
    )
    add_model(node.url, name, model)
    return name


@contextmanager
def new_runner(node: NodeProcess) -> Iterator[Callable[[], psutil.Process]]:
    """Gives the one runner that was started inside the `with`."""
    before = {runner.pid for runner in runners(node)}

    def find() -> psutil.Process:
        (found,) = (runner for runner in runners(node) if runner.pid not in before)
        return found

    yield find


@pytest.mark.parametrize("round_", range(ROUNDS))
def test_kill_9_of_a_runner_in_mid_stream(node: NodeProcess, talker: str, round_: int) -> None:
    kill_at = random.Random(round_).randint(1, 40)
    lines: list[dict[str, object]] = []
    body = {"model": talker, "prompt": "x", "options": {"num_predict": -1}}
    with node.http() as http:
        http.post("/api/generate", json={"model": "scripted", "stream": False}).raise_for_status()
        with new_runner(node) as runner, http.stream("POST", "/api/generate", json=body) as answer:
            assert answer.status_code == 200
            for line in answer.iter_lines():
                lines.append(json.loads(line))
                if len(lines) == kill_at:
                    os.kill(runner().pid, signal.SIGKILL)
        assert str(lines[-1].get("error", "")).strip(), lines[-1]
        assert not any(line.get("done") for line in lines)

        assert http.get("/healthz").status_code == 200
        other = http.post("/api/generate", json={"model": "scripted", "prompt": "x", "stream": False})
        assert other.json()["response"] == ANSWER
        again = http.post("/api/generate", json={**body, "stream": False, "options": {"num_predict": 5}})
        assert again.status_code == 200, again.text
        http.post("/api/generate", json={"model": talker, "keep_alive": 0}).raise_for_status()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": MESSAGES}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/responses", {"input": "x"}),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 100_000}),
        ("/api/chat", {"messages": MESSAGES}),
        ("/api/v1/generate", {"prompt": "x"}),
    ],
)
def test_kill_9_of_a_runner_speaks_each_dialect(
    node: NodeProcess, talker: str, path: str, body: dict[str, object]
) -> None:
    seen: list[str] = []
    request = {"model": talker, "stream": True, **body}
    with node.http() as http, new_runner(node) as runner, http.stream("POST", path, json=request) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            seen.append(line)
            if len(seen) == 24:
                os.kill(runner().pid, signal.SIGKILL)
    assert '"error"' in "".join(seen[-3:]), seen[-3:]
    assert "[DONE]" not in "".join(seen)


def test_a_model_that_keeps_crashing_is_quarantined_with_the_reason(node: NodeProcess, talker: str) -> None:
    body = {"model": talker, "prompt": "x"}
    with node.http() as http:
        for _ in range(3):
            with new_runner(node) as runner, http.stream("POST", "/api/generate", json=body) as answer:
                lines = answer.iter_lines()
                next(lines)
                os.kill(runner().pid, signal.SIGKILL)
                assert "error" in list(lines)[-1]
        refused = http.post("/api/v1/generate", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "quarantined")
        assert "SIGKILL" in refused.json()["error"]["message"]
        assert http.post("/api/generate", json=body).status_code == 500, "Ollama's status for a broken model"
        assert http.post("/api/generate", json={"model": "scripted", "prompt": "x"}).status_code == 200


def test_a_client_that_goes_away_frees_the_slot(node: NodeProcess, talker: str) -> None:
    with node.http() as http, new_runner(node) as runner:
        # An answer ends after ten times the context: this one not while we wait.
        body = {"model": talker, "prompt": "x", "options": {"num_ctx": 65_536}}
        with http.stream("POST", "/api/generate", json=body) as answer:
            next(answer.iter_lines())
            process = runner()
        wait_for(lambda: process.cpu_percent(0.1) < 20, "the runner is idle")


CORRUPT: dict[str, Callable[[bytes], bytes]] = {
    "not a GGUF": lambda gguf: b"PK\x03\x04" + gguf[4:],
    "cut in the header": lambda gguf: gguf[:200],
    "cut in the tensors": lambda gguf: gguf[: len(gguf) // 2],
    "lying tensor count": lambda gguf: gguf[:8] + (2**40).to_bytes(8, "little") + gguf[16:],
    "lying key count": lambda gguf: gguf[:16] + (2**62).to_bytes(8, "little") + gguf[24:],
    "empty": lambda gguf: b"",
}


@pytest.mark.parametrize("kind", CORRUPT)
def test_a_corrupt_gguf_is_refused_and_leaves_nothing(node: NodeProcess, kind: str) -> None:
    bad = CORRUPT[kind](scripted_model("x y z", chat_template=CHATML_TEMPLATE))
    digest = f"sha256:{hashlib.sha256(bad).hexdigest()}"
    with node.http() as http:
        assert http.post(f"/api/blobs/{digest}", content=bad).status_code == 201
        before = {runner.pid for runner in runners(node)}
        made = http.post("/api/create", json={"model": "bad", "files": {"bad.gguf": digest}, "stream": False})
        assert made.status_code == 400, made.text
        assert made.json()["error"].strip()
        assert {runner.pid for runner in runners(node)} <= before, "no runner saw the file"
        assert "bad:latest" not in {model["name"] for model in http.get("/api/tags").json()["models"]}
        assert http.post("/api/show", json={"model": "bad"}).status_code == 404


def test_a_wrong_digest_leaves_nothing(node: NodeProcess) -> None:
    digest = f"sha256:{'0' * 64}"
    with node.http() as http:
        refused = http.post(f"/api/blobs/{digest}", content=b"other bytes")
        assert refused.status_code == 400
        assert "digest" in refused.json()["error"]
        assert http.head(f"/api/blobs/{digest}").status_code == 404


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(path: Path) -> None:
    """Write until the disk has no byte left."""
    with path.open("wb", buffering=0) as out:
        for size in (64 * 1024, 1):
            with pytest.raises(OSError, match="space"):
                write_for_ever(out, bytes(size))


def write_for_ever(out: BinaryIO, data: bytes) -> None:
    while True:
        out.write(data)


def test_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    def files() -> set[Path]:
        return {path for path in small_disk.rglob("*") if path.is_file()}

    with running_node(tmp_path / "node", "--models-dir", str(small_disk)) as node, node.http() as http:
        add_model(node.url, "small", scripted_model(ANSWER, chat_template=CHATML_TEMPLATE))
        before = files()
        big = os.urandom(12 * MIB)
        refused = http.post(f"/api/blobs/sha256:{hashlib.sha256(big).hexdigest()}", content=big)
        assert refused.status_code == 507, refused.text
        assert "space" in refused.json()["error"]
        assert files() == before, "nothing is left half-written"
        assert (
            http.post("/api/generate", json={"model": "small", "prompt": "x", "stream": False}).json()[
                "response"
            ]
            == ANSWER
        )

        filler = small_disk / "filler"
        fill(filler)
        full = http.post(
            "/api/create", json={"model": "second", "from": "small", "system": "x" * 5000, "stream": False}
        )
        assert full.status_code == 507, full.text
        assert http.post("/api/show", json={"model": "second"}).status_code == 404
        filler.unlink()
        assert files() == before
        assert http.request("DELETE", "/api/delete", json={"model": "small"}).status_code == 200
        assert http.get("/api/tags").json() == {"models": []}


@pytest.mark.parametrize(
    "path", ["/api/generate", "/api/chat", "/v1/chat/completions", "/v1/messages", "/api/v1/generate"]
)
def test_a_prompt_of_one_gigabyte_is_refused_before_it_is_read(node: NodeProcess, path: str) -> None:
    resident = psutil.Process(node.pid).memory_info().rss
    host, port = node.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as client:
        client.sendall(
            f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {1024 * MIB}\r\n\r\n".encode()
        )
        status = client.recv(4096).split(b"\r\n", 1)[0]  # not a byte of the prompt was sent
    assert b" 413 " in status
    assert psutil.Process(node.pid).memory_info().rss - resident < 20 * MIB


def test_an_endless_chunked_prompt_is_cut(node: NodeProcess) -> None:
    resident = psutil.Process(node.pid).memory_info().rss

    def forever() -> Iterator[bytes]:
        yield b'{"model": "scripted", "prompt": "'
        for _ in range(1024):
            yield b"a" * MIB

    with node.http() as http:
        # The node answers and closes while the client still writes: either is seen first.
        with suppress(httpx.WriteError, httpx.RemoteProtocolError, httpx.ReadError):
            assert http.post("/v1/chat/completions", content=forever()).status_code == 413
        assert http.get("/healthz").status_code == 200
    assert psutil.Process(node.pid).memory_info().rss - resident < 100 * MIB


def test_a_long_prompt_that_fits_the_limits_but_not_the_context(node: NodeProcess) -> None:
    with node.http() as http:
        refused = http.post(
            "/api/generate",
            json={"model": "scripted", "prompt": "word " * 50_000, "truncate": False, "stream": False},
        )
        assert refused.status_code == 400
        assert "context" in refused.json()["error"]
        cut = http.post(
            "/api/generate", json={"model": "scripted", "prompt": "word " * 50_000, "stream": False}
        )
        assert cut.status_code == 200
        assert cut.json()["response"] == ANSWER


# ── clients that trickle ────────────────────────────────────────────────────────────


def test_two_thousand_slow_clients_leave_places_for_others(node: NodeProcess) -> None:
    """More than the files that a shell allows; `make accept-slow-clients` measures."""
    sockets = min(2000, allow_files() // 2)  # as far as this machine lets a process have files
    address = httpx.URL(node.url)
    with node.http() as http, ExitStack() as stack:
        for number in range(sockets):
            slow = stack.enter_context(socket.create_connection((address.host, address.port), DEADLINE_S))
            slow.sendall(b"POST /api/generate HTTP/1.1\r\nHost: " if number % 2 else b"")
        for _ in range(10):
            with node.http() as fresh:  # on a new connection too
                assert fresh.get("/api/version").status_code == 200
            body = {"model": "scripted", "messages": MESSAGES, "stream": False}
            assert http.post("/api/chat", json=body).status_code == 200
