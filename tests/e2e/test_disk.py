"""A node whose disk is small, beside one that has room: what a user sees of it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ollama_distributed.models.scripted import CHATML_TEMPLATE, scripted_model
from tests.e2e.conftest import ANSWER, add_model
from tests.limits import SOON_S
from tests.nodes import NodeProcess, Nodes, until

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.untraced]

MIB = 1 << 20
DISK_MIB = 24


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    folder = tmp_path_factory.mktemp("disk")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, small_disk: Path) -> Iterator[Nodes]:
    """n1 has models m0 to m2 of 8.6 MB each, n2 room for two of them."""
    with Nodes(tmp_path_factory.mktemp("nodes")) as nodes:
        first = nodes.serve("n1")
        nodes.join("n2", "n1", "--models-dir", str(small_disk), role="node")
        for number in range(3):
            content = scripted_model(ANSWER, chat_template=CHATML_TEMPLATE)
            add_model(first.url, f"m{number}", content + random.Random(number).randbytes(8 * MIB))
        with first.admin() as client:
            until(lambda: dict(client.cluster.status().nodes) == {"online": 2}, SOON_S, "two nodes")
            until(lambda: client.cluster.status().models == 3, SOON_S, "the state tells of the models")
        yield nodes


def _names(node: NodeProcess) -> set[str]:
    """Models on this node's own disk."""
    with node.admin() as client:
        answer = client.nodes.disk(client.cluster.status().node)
    return {row.model.removesuffix(":latest") for row in answer.models if not row.damaged}


def _kept(node: NodeProcess) -> dict[str, str]:
    """Why models stay on this node's own disk, as it knows itself."""
    with node.admin() as client:
        answer = client.nodes.disk(client.cluster.status().node)
    return {row.model.removesuffix(":latest"): row.kept for row in answer.models}


def _files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def _copy(nodes: Nodes, name: str) -> None:
    with nodes["n1"].admin() as client:
        (begun,) = client.models.distribute(name, ["n2"])
        ended = until(
            lambda: one if (one := client.models.transfer(begun.id)).state != "running" else None,
            SOON_S,
            name,
        )
    assert ended is not None
    assert ended.state == "done", ended.error


def _upload(node: NodeProcess, size: int) -> tuple[int, str]:
    content = os.urandom(size)
    with node.http() as http:
        sent = http.post(f"/api/blobs/sha256:{hashlib.sha256(content).hexdigest()}", content=content)
        return sent.status_code, sent.text


def test_a_model_that_another_node_keeps_makes_room(nodes: Nodes) -> None:
    second = nodes["n2"]
    _copy(nodes, "m0")
    _copy(nodes, "m1")
    assert _names(second) == {"m0", "m1"}
    _copy(nodes, "m2")
    assert _names(second) == {"m1", "m2"}, "m0 came first, and n1 keeps it"
    shown = nodes["n1"].cli("node", "disk", "n2").stdout
    assert "Evicted    1 models, 8.6 MB" in shown
    with second.http() as http:
        asked = http.post("/api/generate", json={"model": "m0", "prompt": "x", "stream": False})
        assert asked.json()["response"] == ANSWER, "n1 answers"
        told = http.get("/metrics").text
    with nodes["n1"].http() as http:
        assert "ollama_distributed_disk_hits_total 1" in http.get("/metrics").text
    assert "ollama_distributed_disk_misses_total 1" in told
    assert "ollama_distributed_disk_evictions_total 1" in told


def test_a_full_disk_is_507_and_leaves_nothing(nodes: Nodes, small_disk: Path) -> None:
    second = nodes["n2"]
    before = _files(small_disk)
    status, text = _upload(second, (DISK_MIB + 8) * MIB)
    assert status == 507, text
    assert "no space left for 33.6 MB" in text
    assert "may go" not in text
    assert _names(second) == {"m1", "m2"}, "it would not fit without them either"
    assert _files(small_disk) == before

    with nodes["n1"].admin() as client:
        for name in ("m1", "m2"):
            client.models.pin(name, "n2")
    # n2 itself hears of it a moment later.
    until(lambda: _kept(second) == {"m1": "pinned", "m2": "pinned"}, SOON_S, "n2 knows of the pins")
    stays = nodes["n1"].cli("model", "evict", "m1", "--node", "n2", "--last-copy", "--yes", check=False)
    assert stays.returncode == 1
    assert "m1:latest stays: it is pinned to this node" in stays.stderr
    status, text = _upload(second, 8 * MIB)
    assert status == 507, text
    assert "2 pinned here" in text
    assert _files(small_disk) == before
    with nodes["n1"].admin() as client:
        for name in ("m1", "m2"):
            client.models.place(name, clear=True)
        freed = until(lambda: client.models.evict("m1", "n2"), SOON_S, "the plan has let go of it")
    assert freed.freed_bytes > 8 * MIB
    assert _names(second) == {"m2"}
    assert _names(nodes["n1"]) == {"m0", "m1", "m2"}


def test_a_rotten_file_is_found_and_fetched_again(nodes: Nodes, small_disk: Path) -> None:
    (large,) = (path for path in (small_disk / "blobs").iterdir() if path.stat().st_size > 8 * MIB)
    with large.open("r+b") as out:
        out.seek(3 * MIB)
        out.write(b"rotten")
    scrubbed = nodes["n1"].cli("--output", "json", "node", "scrub", "n2")
    assert json.loads(scrubbed.stdout)["corrupt"] == 1
    assert large.name == f"sha256-{hashlib.sha256(large.read_bytes()).hexdigest()}", "n1 had it"
    assert _names(nodes["n2"]) == {"m2"}
    assert nodes["n2"].logs("disk.file_corrupt")
