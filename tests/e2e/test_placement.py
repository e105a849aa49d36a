"""Three nodes keep models where they are wanted: spread, ordered, renewed, drained, lost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ollama_distributed.models.scripted import CHATML_TEMPLATE, scripted_model
from tests.e2e.conftest import ANSWER, add_model
from tests.nodes import Nodes, until

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.untraced, pytest.mark.timeout(600)]

DEADLINE_S = 90.0
SECOND = "It says something else now."


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    env = {"OLLAMA_DISTRIBUTED_PLACEMENT_COPIES": "2", "OLLAMA_DISTRIBUTED_PLACEMENT_GRACE": "1"}
    with Nodes(tmp_path_factory.mktemp("placement"), env) as nodes:
        first = nodes.serve("n1")
        token = nodes.token("n1", uses=2, role="node")
        for name in ("n2", "n3"):
            nodes.start(name, ("join", token), ())
        with first.admin() as client:
            until(lambda: dict(client.cluster.status().nodes) == {"online": 3}, DEADLINE_S, "three nodes")
        yield nodes


def holders(cluster: Nodes, model: str, at: str = "n1") -> set[str]:
    """Living nodes with the version that counts."""
    with cluster[at].admin() as client:
        away = {row.id for row in client.nodes.list() if row.status == "offline"}
        return {row.name for row in client.models.places(model).rows if row.has and row.node not in away}


def two_holders(cluster: Nodes, model: str) -> set[str]:
    """Once there are as many: they."""
    until(lambda: len(holders(cluster, model)) == 2, DEADLINE_S, "two")
    return holders(cluster, model)


def answer(cluster: Nodes, node: str, model: str) -> tuple[str, str]:
    """And who gave it."""
    with cluster[node].http() as http:
        found = http.post("/api/generate", json={"model": model, "prompt": "Hi", "stream": False})
        assert found.status_code == 200, found.text
        return str(found.json()["response"]), found.headers["x-ollama-node"]


def loaded(cluster: Nodes, node: str) -> list[str]:
    with cluster[node].http() as http:
        return [row["name"] for row in http.get("/api/ps").json()["models"] if "node" not in row]


def test_a_model_spreads_by_itself_and_by_order_and_every_node_runs_it(cluster: Nodes) -> None:
    add_model(cluster["n1"].url, "m", scripted_model(ANSWER, chat_template=CHATML_TEMPLATE))
    until(lambda: len(holders(cluster, "m")) == 2, DEADLINE_S, "a second copy")
    told = cluster["n2"].cli("model", "replicas", "m", "3")
    assert "copies it" in told.stderr
    assert "in place" in told.stderr
    assert holders(cluster, "m") == {"n1", "n2", "n3"}
    assert {answer(cluster, node, "m")[0] for node in ("n1", "n2", "n3")} == {ANSWER}
    told = cluster["n3"].cli("model", "place", "m", "--preload")
    assert "in place" in told.stderr
    assert all(loaded(cluster, node) == ["m:latest"] for node in ("n1", "n2", "n3"))
    for node in ("n1", "n2", "n3"):
        assert answer(cluster, node, "m") == (ANSWER, node), "no hop for nothing"
    listed = cluster["n1"].cli("model", "places").stdout
    assert listed.splitlines()[1].split()[:5] == ["m:latest", "3", "3", "3", "3"]


def test_a_new_version_takes_the_place_of_the_old_one_everywhere(cluster: Nodes) -> None:
    add_model(cluster["n3"].url, "m", scripted_model(SECOND, chat_template=CHATML_TEMPLATE))
    for node in ("n1", "n2", "n3"):
        until(lambda node=node: answer(cluster, node, "m") == (SECOND, node), DEADLINE_S, f"{node} has it")
    until(
        lambda: all(loaded(cluster, node) == ["m:latest"] for node in ("n1", "n2", "n3")), DEADLINE_S, "once"
    )


def test_a_drained_node_gives_away_what_it_has(cluster: Nodes) -> None:
    add_model(cluster["n2"].url, "d", scripted_model(ANSWER, chat_template=CHATML_TEMPLATE))
    before = two_holders(cluster, "d")
    victim = max(before)
    told = cluster["n1"].cli("node", "drain", victim, "--wait")
    assert "on its way: " in told.stderr
    assert holders(cluster, "d") == {"n1", "n2", "n3"}, "a copy elsewhere"
    assert not loaded(cluster, victim)
    cluster["n1"].cli("node", "undrain", victim)
    until(lambda: loaded(cluster, victim), DEADLINE_S, "what is preloaded comes back")


def test_a_lost_node_is_made_up_for(cluster: Nodes) -> None:
    add_model(cluster["n1"].url, "k", scripted_model(ANSWER, chat_template=CHATML_TEMPLATE))
    before = two_holders(cluster, "k")
    lost = max(before - {"n1"})
    cluster[lost].kill()
    left = {"n1", "n2", "n3"} - {lost}
    until(lambda: holders(cluster, "k") == left, DEADLINE_S, "the third node has it")
    for node in left:
        told, by = answer(cluster, node, "k")
        assert told == ANSWER
        assert by in left
    with cluster["n1"].http() as http:
        metrics = http.get("/metrics").text
    assert 'ollama_distributed_placement_tasks_total{kind="load",outcome="done"}' in metrics
