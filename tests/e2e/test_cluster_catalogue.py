"""One catalogue for three nodes: a model leaves the registry once, and any node manages what others hold."""

from __future__ import annotations

import hashlib
import json
import random
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from ollama_distributed.models.scripted import CHATML_TEMPLATE, scripted_model
from tests.e2e.conftest import ANSWER, add_model
from tests.nodes import NodeProcess, Nodes, until
from tests.registries import DebianRegistry, debian_registry

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.untraced, pytest.mark.timeout(600)]

MIB = 1 << 20
DEADLINE_S = 60.0
NODES = ("n1", "n2", "n3")
SCRIPTED = scripted_model(ANSWER, chat_template=CHATML_TEMPLATE)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DebianRegistry]:
    log = {"level": "info", "formatter": "json"}
    with debian_registry(tmp_path_factory.mktemp("registry") / "registry", log=log) as registry:
        yield registry


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, registry: DebianRegistry) -> Iterator[Nodes]:
    """Models stay where they are put. Pulls are slow enough to meet, until told otherwise."""
    env = {
        "OLLAMA_DISTRIBUTED_REGISTRIES": registry.setting(),
        "OLLAMA_DISTRIBUTED_PULL_RATE_MIB": "0.25",
        "OLLAMA_DISTRIBUTED_PLACEMENT_COPIES": "1",
    }
    with Nodes(tmp_path_factory.mktemp("catalogue"), env) as nodes:
        first = nodes.serve("n1")
        token = nodes.token("n1", uses=2, role="node")
        for name in NODES[1:]:
            nodes.start(name, ("join", token), ())
        with first.admin() as client:
            until(lambda: dict(client.cluster.status().nodes) == {"online": 3}, DEADLINE_S, "three nodes")
        yield nodes


class Served:
    """What the registry has sent since this was made: bytes of each blob, requests for manifests."""

    def __init__(self, registry: DebianRegistry) -> None:
        self._log = registry.log
        self._from = len(self._log.read_text())
        self.bytes: Counter[str] = Counter()
        self.manifests = 0

    def read(self) -> Served:
        for line in self._log.read_text()[self._from :].splitlines():
            row = json.loads(line) if line.startswith("{") else {}
            if row.get("msg") != "response completed" or row["http.request.method"] != "GET":
                continue
            kind, _, what = row["http.request.uri"].rpartition("/")
            if kind.endswith("blobs"):
                self.bytes[what] += row["http.response.written"]
            self.manifests += kind.endswith("manifests")
        return self


def ask(node: NodeProcess, method: str, path: str, **body: object) -> dict[str, object]:
    with node.http() as http:
        answer = http.request(method, path, json={"stream": False, **body})
    assert answer.status_code == 200, answer.text
    return answer.json() if answer.content else {}


def files(node: NodeProcess, part: str = "blobs") -> set[str]:
    return {path.name for path in (node.data_dir / "models" / part).iterdir()}


def sizes(node: NodeProcess, name: str) -> dict[str, int]:
    host, _, rest = name.partition("/")
    path: Path = node.data_dir / "models/manifests" / host / rest.replace(":", "/")
    manifest = json.loads(path.read_text())
    return {layer["digest"]: layer["size"] for layer in (*manifest["layers"], manifest["config"])}


def rows(node: NodeProcess) -> dict[str, str]:
    """Digest by name, as the node lists them."""
    with node.http() as http:
        listed = http.get("/api/tags").json()["models"]
    names = [row["name"] for row in listed]
    assert len(names) == len(set(names)), "no name twice"
    return {row["name"]: row["digest"] for row in listed}


def everywhere(cluster: Nodes, names: set[str]) -> dict[str, str]:
    """Wait until each node lists exactly these, with the same digests."""

    def same() -> list[dict[str, str]] | None:
        first, *others = (rows(cluster[name]) for name in NODES)
        return [first] if set(first) == names and all(other == first for other in others) else None

    found = until(same, DEADLINE_S, f"every node lists {names or 'nothing'}")
    assert found
    return found[0]


def test_three_pulls_at_once_are_one_download(cluster: Nodes, registry: DebianRegistry) -> None:
    name = f"{registry.host}/me/pulled:1"
    add_model(cluster["n1"].url, name, SCRIPTED + random.Random(7).randbytes(8 * MIB))
    assert ask(cluster["n1"], "POST", "/api/push", model=name) == {"status": "success"}
    ask(cluster["n3"], "DELETE", "/api/delete", model=name)
    everywhere(cluster, set())
    until(lambda: not any(files(cluster[node]) for node in NODES), DEADLINE_S, "no copy is left")
    served, lines = Served(registry), {cluster[node].id: list[str]() for node in NODES}

    def pull(node: NodeProcess) -> None:
        with node.http() as http, http.stream("POST", "/api/pull", json={"model": name}) as answer:
            for line in answer.iter_lines():
                lines[node.id].append(json.loads(line)["status"])

    asking = [threading.Thread(target=pull, args=(cluster[node],)) for node in NODES]
    for thread in asking:
        thread.start()
    try:
        until(lambda: all(len(told) > 1 for told in lines.values()), DEADLINE_S, "all have the manifest")
        with cluster["n1"].admin() as client:
            client.config.set({"pull_rate_mib": 0})
    finally:
        for thread in asking:
            thread.join(DEADLINE_S)
    for told in lines.values():
        assert told[0] == "pulling manifest"
        assert told[-3:] == ["verifying sha256 digest", "writing manifest", "success"]
    served.read()
    assert dict(served.bytes) == sizes(cluster["n1"], name), "each byte once"
    assert served.manifests == 1
    everywhere(cluster, {name})
    ask(cluster["n1"], "DELETE", "/api/delete", model=name)


def test_a_node_manages_what_only_another_one_holds(cluster: Nodes, registry: DebianRegistry) -> None:
    n1, n2, n3 = (cluster[name] for name in NODES)
    add_model(n1.url, "base", SCRIPTED)
    digests = everywhere(cluster, {"base:latest"})
    assert ask(n2, "POST", "/api/show", model="base") == ask(n1, "POST", "/api/show", model="base")
    # A copy is made where the model lies, and seen at once where it was asked for.
    target = f"{registry.host}/me/base:1"
    ask(n2, "POST", "/api/copy", source="base", destination=target)
    assert rows(n2)[target] == digests["base:latest"]
    assert not files(n2)
    # A push takes the files along, and leaves none.
    assert ask(n2, "POST", "/api/push", model=target) == {"status": "success"}
    assert not files(n2)
    # A create brings what it is made from.
    made = ask(n3, "POST", "/api/create", model="pirate", **{"from": "base", "system": "Arr."})
    assert made == {"status": "success"}
    assert ask(n3, "POST", "/api/generate", model="pirate", prompt="Hi")["response"] == ANSWER
    blob = f"sha256:{hashlib.sha256(SCRIPTED).hexdigest()}"
    with n2.http() as http:
        assert http.head(f"/api/blobs/{blob}").status_code == 200
        assert http.head(f"/api/blobs/sha256:{'0' * 64}").status_code == 404
    assert ask(n2, "POST", "/api/create", model="second", files={"a.gguf": blob}) == {"status": "success"}
    everywhere(cluster, {"base:latest", target, "pirate:latest", "second:latest"})
    # And it deletes what others hold, by every client.
    n2.cli("rm", "pirate")
    ask(n2, "DELETE", "/api/delete", model=target)
    with n3.admin() as client:
        client.models.delete("base")
    everywhere(cluster, {"second:latest"})
    with n1.http() as http:
        refused = http.request("DELETE", "/api/delete", json={"model": "base"})
        assert (refused.status_code, refused.json()) == (404, {"error": "model 'base' not found"})
    ask(n1, "DELETE", "/api/delete", model="second")
    until(lambda: not any(files(node) for node in (n1, n2, n3)), DEADLINE_S, "no file is left")


def test_a_node_that_was_away_deletes_when_it_returns(cluster: Nodes) -> None:
    n1, n3 = cluster["n1"], cluster["n3"]
    for node in (n1, n3):
        add_model(node.url, "gone", SCRIPTED)
    everywhere(cluster, {"gone:latest"})
    n3.kill()
    ask(n1, "DELETE", "/api/delete", model="gone")
    assert rows(n1) == {}
    until(lambda: rows(cluster["n2"]) == {}, DEADLINE_S, "the other one hears of it")
    assert files(n3)
    back = cluster.serve("n3")
    until(lambda: not files(back), DEADLINE_S, "it heard of it")
    assert rows(back) == {}


def test_without_a_quorum_it_says_who_else_holds_it(cluster: Nodes) -> None:
    server, n2, n3 = (cluster[name] for name in NODES)
    for node in (n2, n3):
        add_model(node.url, "kept", SCRIPTED)
    everywhere(cluster, {"kept:latest"})
    server.kill()
    with n2.http() as http:
        refused = http.request("DELETE", "/api/delete", json={"model": "kept"})
        assert refused.status_code in (503, 504), refused.text
        assert "is also on n3, and the cluster cannot agree to delete it now" in refused.json()["error"]
    assert rows(n2)
