"""Models in one file, preloading, a look before a pull, copies off a node: real nodes and their CLI."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ollama_distributed.client.errors import Conflict
from ollama_distributed.models.scripted import CHATML_TEMPLATE, scripted_model
from tests.e2e.conftest import ANSWER, add_model
from tests.limits import SOON_S
from tests.nodes import NodeProcess, Nodes, until
from tests.registries import DebianRegistry, debian_registry

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(300)]

MINE = "me/scripted:v1"
"""On n1, and copied to n2 by its preload."""


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DebianRegistry]:
    with debian_registry(tmp_path_factory.mktemp("registry") / "registry") as registry:
        yield registry


@pytest.fixture(scope="module")
def theirs(registry: DebianRegistry) -> str:
    """In the registry, and pulled by n2's preload."""
    return f"{registry.host}/me/far:latest"


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, registry: DebianRegistry, theirs: str) -> Iterator[Nodes]:
    """n1 and n2 in one cluster, which copies nothing by itself; n2 was told to preload."""
    env = {"OLLAMA_DISTRIBUTED_REGISTRIES": registry.setting(), "OLLAMA_DISTRIBUTED_PLACEMENT_COPIES": "0"}
    with Nodes(tmp_path_factory.mktemp("bundles"), env=env) as nodes:
        first = nodes.serve("n1")
        add_model(first.url, MINE, scripted_model(ANSWER, chat_template=CHATML_TEMPLATE))
        add_model(first.url, theirs, scripted_model("From afar.", chat_template=CHATML_TEMPLATE))
        with first.http() as http:
            assert http.post("/api/push", json={"model": theirs, "stream": False}).status_code == 200
            assert http.request("DELETE", "/api/delete", json={"model": theirs}).status_code == 200
        token = nodes.token("n1", role="node")
        preload = {"OLLAMA_DISTRIBUTED_PRELOAD": f"{MINE},{theirs},evil.example/a/b"}
        nodes.start("n2", ("join", token), (), preload)
        yield nodes


def test_what_is_in_its_registry_only_is_looked_at(nodes: Nodes, registry: DebianRegistry) -> None:
    name = f"{registry.host}/me/looked"
    first = nodes["n1"]
    add_model(first.url, name, scripted_model("x", chat_template=CHATML_TEMPLATE))
    with first.http() as http:
        http.post("/api/push", json={"model": name, "stream": False}).raise_for_status()
        http.request("DELETE", "/api/delete", json={"model": name}).raise_for_status()
    answer = json.loads(first.cli("model", "fit", name, "-o", "json").stdout)
    assert answer["registry"] == registry.host
    assert 0 < answer["bytes_read"] < 70_000
    assert "fits" in {row["verdict"] for row in answer["nodes"]}
    with first.http() as http:
        failed = http.get("/api/v1/models/evil.example/a/b/fit")
    assert failed.status_code == 403
    assert "add `{host: evil.example}` to `registries`" in failed.json()["error"]["message"]


def test_a_node_preloads_from_others_and_from_registries(nodes: Nodes, theirs: str) -> None:
    second = nodes["n2"]
    with second.http() as http:
        # What fails while the node finds its cluster is tried again.
        all_tried = {"loaded": 2, "coming": 0, "failed": 1}
        until(lambda: http.get("/readyz").json()["preload"] == all_tried, 2 * SOON_S, "all was tried")
        health = http.get("/api/v1/health").json()["preload"]
        assert "may not be asked" in health["evil.example/a/b"]["error"]
        loaded = {row["name"] for row in http.get("/api/ps").json()["models"]}
        assert {MINE, theirs} <= loaded
        text = http.get("/metrics").text
    values = dict(re.findall(r"^ollama_distributed_(\S+) (\S+)$", text, re.MULTILINE))
    assert int(values["registry_received_bytes_total"]) > 200_000
    assert int(values["pieces_received_bytes_total"]) > 200_000
    assert values['transfers_total{kind="copy",outcome="done"}'] == "1"
    assert values['transfers_total{kind="pull",outcome="done"}'] == "1"
    assert second.logs("node.preload_failed")


def test_a_bundle_brings_models_to_a_cluster_that_reaches_no_registry(
    nodes: Nodes, theirs: str, tmp_path: Path
) -> None:
    """n1 has one of them, n2 the other; what n1 passes on it does not keep."""
    first, file = nodes["n1"], tmp_path / "models.tar"
    until(lambda: _models(nodes["n2"]) >= {MINE, theirs}, SOON_S, "n2 has both")
    until(lambda: theirs in _models(first), SOON_S, "n1 knows of it")
    told = json.loads(first.cli("model", "export", MINE, theirs, "-o", str(file), "--output", "json").stdout)
    assert told["size"] == file.stat().st_size
    with tarfile.open(file) as archive:
        assert archive.getnames()[:2] == ["oci-layout", "index.json"]
    assert [path for path in tmp_path.iterdir() if path != file] == []
    alone = nodes.serve("n3", env={"OLLAMA_DISTRIBUTED_REGISTRIES": "[]"})
    with alone.admin() as client:
        until(lambda: client.cluster.status().status == "ok", SOON_S, "a cluster that takes changes")
    with alone.http() as http:
        failed = http.post("/api/v1/bundles", content=file.read_bytes()[:-30_000])
    assert failed.status_code == 400
    assert "cut short" in failed.json()["error"]["message"]
    assert _blobs(alone) == []
    assert "imported" in alone.cli("model", "import", str(file)).stderr
    again = json.loads(alone.cli("model", "import", str(file), "-o", "json").stdout)
    assert [one["state"] for one in again] == ["unchanged", "unchanged"]
    for name, said in ((MINE, ANSWER), (theirs, "From afar.")):
        with alone.http() as http:
            answer = http.post("/api/generate", json={"model": name, "prompt": "Hi", "stream": False})
        assert answer.json()["response"] == said


def test_where_models_are_and_the_last_copy_stays(nodes: Nodes) -> None:
    first, alone = nodes["n1"], nodes["n3"]
    with first.admin() as client:
        assert {place.name for place in client.models.status(MINE).nodes} == {"n1", "n2"}
    assert MINE in first.cli("model", "status").stdout
    with alone.admin() as client:
        client.models.unload(MINE)
        with pytest.raises(Conflict, match="no other node"):
            client.models.remove(MINE, ["n3"])
    gone = alone.cli("model", "remove", MINE, "n3", "--last-copy", "--yes")
    assert "is gone from n3" in gone.stderr
    assert MINE not in _models(alone)


def _models(node: NodeProcess) -> set[str]:
    with node.http() as http:
        return {row["name"] for row in http.get("/api/tags").json()["models"]}


def _blobs(node: NodeProcess) -> list[Path]:
    return [
        path
        for part in ("blobs", ".ollama-distributed")
        for path in (node.data_dir / "models" / part).iterdir()
    ]
