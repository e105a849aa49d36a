"""Three nodes as a user makes them: three commands, one cluster. Its life, its cuts, its end."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from ollama_distributed.client.errors import ClientError, Conflict
from ollama_distributed.client.sync import SyncClient
from ollama_distributed.models.scripted import CHATML_TEMPLATE, scripted_model
from tests.canaries import ADDRESS, Canaries, files, processes
from tests.e2e.conftest import add_model
from tests.limits import SOON_S, limit_s
from tests.nodes import NodeProcess, Nodes, until

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

ANSWER = "Only the first node has this model, and the third one gives its answer."
NAMES = ("n1", "n2", "n3")
GROWN_S = limit_s(45.0)
"""Three servers are steady for 5 s, then the state moves, which takes some 6 s on a free machine."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """n1 founds and has the model `here`; n2 and n3 join."""
    with Nodes(tmp_path_factory.mktemp("cluster")) as nodes:
        first = nodes.serve("n1")
        add_model(first.url, "here", scripted_model(ANSWER, chat_template=CHATML_TEMPLATE))
        until(lambda: _is_well(first, 1), SOON_S, "a cluster of one")
        token = json.loads(first.cli("--output", "json", "cluster", "token", "create", "--uses", "2").stdout)
        for name in ("n2", "n3"):
            nodes.start(name, ("join", token["token"]), ())
        joined_at = time.monotonic()
        for name in NAMES:
            left_s = limit_s(10.0) - (time.monotonic() - joined_at)
            until(lambda name=name: _is_well(nodes[name], 3), left_s, f"status of three nodes on {name}")
        until(
            lambda: all(len(_status(nodes[name]).voters) == 3 for name in NAMES),
            GROWN_S,
            "three voters, as each node knows",
        )
        until(lambda: all(_is_well(nodes[name], 3) for name in NAMES), SOON_S, "all well with three voters")
        yield nodes


def _status(node: NodeProcess):  # type: ignore[no-untyped-def]
    with node.admin(timeout_s=5.0) as client:
        return client.cluster.status()


def _is_well(node: NodeProcess, members: int) -> bool:
    status = _status(node)
    return status.status == "ok" and dict(status.nodes) == {"online": members} and bool(status.leader.leader)


def _ask(node: NodeProcess, model: str = "here") -> str:
    """A streamed answer, as text; every piece by itself."""
    pieces: list[str] = []
    with (
        node.http() as http,
        http.stream("POST", "/api/generate", json={"model": model, "prompt": "Hi"}) as answer,
    ):
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            piece = json.loads(line)
            assert "error" not in piece, piece
            pieces.append(piece["response"])
    assert len(pieces) > 2, "streamed"
    return "".join(pieces)


@contextmanager
def _asking(*nodes: NodeProcess) -> Iterator[list[str]]:
    """Prompts without a pause at each node; what failed."""
    failures: list[str] = []
    done = threading.Event()

    def ask(node: NodeProcess) -> None:
        while not done.is_set():
            try:
                assert _ask(node) == ANSWER
            except (AssertionError, httpx.HTTPError) as failure:
                failures.append(repr(failure))
            done.wait(0.05)

    threads = [threading.Thread(target=ask, args=(node,)) for node in nodes]
    for thread in threads:
        thread.start()
    try:
        yield failures
    finally:
        done.set()
        for thread in threads:
            thread.join(60)


def _write(client: SyncClient, value: int) -> int:
    return client.config.set({"max_queue": value}).version


# ── one cluster ─────────────────────────────────────────────────────────────────────


def test_every_node_shows_the_same_cluster(cluster: Nodes) -> None:
    seen = [_status(cluster[name]) for name in NAMES]
    assert len({status.cluster for status in seen}) == 1
    assert {status.leader.leader for status in seen} <= {cluster[name].id for name in NAMES}
    assert {status.node for status in seen} == {cluster[name].id for name in NAMES}
    with cluster["n2"].admin() as client:
        rows = client.nodes.list()
    assert [row.name for row in rows] == list(NAMES)
    assert rows[0].models == ("here:latest",)
    assert all(row.role == "server" and row.voter and row.memory_bytes > 0 for row in rows)


def test_a_model_of_the_first_node_answers_at_the_third(cluster: Nodes) -> None:
    assert _ask(cluster["n3"]) == ANSWER
    with cluster["n3"].http() as http:
        assert [model["name"] for model in http.get("/api/tags").json()["models"]] == ["here:latest"]
        answer = http.post(
            "/v1/chat/completions", json={"model": "here", "messages": [{"role": "user", "content": "Hi"}]}
        ).json()
    assert answer["choices"][0]["message"]["content"] == ANSWER


def test_secrets_and_prompts_are_nowhere(cluster: Nodes) -> None:
    """S-11: in no log, metric, error, ledger, file, argument or environment of any node."""
    canaries = Canaries()
    nodes = [cluster[name] for name in NAMES]
    with nodes[0].admin() as client:
        made = client.keys.create(name="canary", role="user")
        canaries.add("key", made.key.split("_")[2])
        # Not the words before the secret: they are in the token's record.
        canaries.add("token", client.cluster.create_token().token.split(".")[2])
        client.config.set({"log_level": "debug"})
    for node in nodes:
        canaries.add(f"admin key of {node.id}", json.loads((node.data_dir / "admin.json").read_text())["key"])
        headers = {"authorization": f"Bearer {made.key}"}

        def known(node: NodeProcess = node, headers: dict[str, str] = headers) -> bool:
            return httpx.get(f"{node.url}/api/v1/auth/whoami", headers=headers).status_code == 200

        until(known, SOON_S, "the key on every node")
        with node.http() as http:
            canaries.provoke(http, "here")
            http.headers.update(headers)
            canaries.provoke(http, "here")
    with nodes[0].admin() as client:
        client.keys.revoke(made.row.id)
        client.config.set({"log_level": None})
    places: list[tuple[str, bytes]] = [("an error", body) for body in canaries.bodies]
    assert len(places) > 30
    for node in nodes:
        until(lambda node=node: list((node.data_dir / "usage").glob("*.log")), SOON_S, "a ledger")
        places.append((f"log of {node.id}", node.log_file.read_bytes()))
        places.append((f"metrics of {node.id}", httpx.get(f"{node.url}/metrics").content))
        places += [(f"{node.id} {name}", data) for name, data in files(node.data_dir)]
        with node.admin() as client:
            places.append((f"usage by {node.id}", client.usage.csv(by=["key", "model", "node"]).encode()))
    places += processes(node.pid for node in nodes)
    assert any("environ" in name for name, _ in places)
    found = [(name, secret, data[:300]) for name, data in places for secret in canaries.found_in(data)]
    assert found == []
    assert [body for body in canaries.bodies if ADDRESS.search(body)] == []


def test_the_config_of_one_node_is_that_of_all_within_a_second(cluster: Nodes) -> None:
    origin = {"Origin": "https://app.example"}
    for name in NAMES:
        with cluster[name].http() as http:
            assert http.get("/api/version", headers=origin).status_code == 403
    with cluster["n2"].admin() as client:
        client.config.set({"allowed_origins": ["https://app.example"], "keep_alive": "1m"})
    changed_at = time.monotonic()

    def allowed(name: str) -> bool:
        with cluster[name].http() as http:
            return http.get("/api/version", headers=origin).status_code == 200

    for name in NAMES:
        left_s = limit_s(1.0) - (time.monotonic() - changed_at)
        until(lambda name=name: allowed(name), left_s, f"applied on {name}")
    with cluster["n3"].admin() as client, pytest.raises(ClientError, match=r"keep_alive: .*duration"):
        client.config.set({"keep_alive": "soon"})
    with cluster["n1"].admin() as client:
        client.config.rollback(0)
    until(lambda: not allowed("n3"), SOON_S, "taken back")


def test_a_drained_node_is_shown_and_gets_no_forwarded_work(cluster: Nodes) -> None:
    with cluster["n3"].admin() as client:
        client.nodes.drain("n1")
        until(lambda: client.nodes.get("n1").status == "draining", SOON_S, "draining")
        client.nodes.undrain("n1")
        until(lambda: client.nodes.get("n1").status == "online", SOON_S, "online again")
    assert _ask(cluster["n3"]) == ANSWER


def test_nodes_rest_outside_their_hours_until_they_are_woken_or_it_is_time(cluster: Nodes) -> None:
    hour = time.localtime().tm_hour
    with cluster["n2"].admin() as client:
        client.config.set({"polite_hours": f"{(hour + 2) % 24:02}:00-{(hour + 3) % 24:02}:00"})
        until(lambda: all(row.status == "draining" for row in client.nodes.list()), SOON_S, "all rest")
        assert "outside its hours" in client.nodes.get("n3").reason
        assert _ask(cluster["n1"]) == ANSWER, "on the only machine that has it, for whoever is there"
        client.nodes.undrain("n3")
        until(lambda: client.nodes.get("n3").status == "online", SOON_S, "woken")
        assert client.nodes.get("n1").status == "draining"
        client.config.set({"polite_hours": None})
        until(lambda: all(row.status == "online" for row in client.nodes.list()), SOON_S, "all back")
    assert _ask(cluster["n3"]) == ANSWER


# ── what dies ───────────────────────────────────────────────────────────────────────


def test_a_killed_coordination_server_costs_no_answer(cluster: Nodes) -> None:
    leader = _status(cluster["n1"]).leader.leader
    node = next(cluster[name] for name in NAMES if cluster[name].id == leader)
    with _asking(cluster["n1"], cluster["n3"]) as failures:
        node.child("nats-server").kill()
        with cluster["n2"].admin() as client:
            until(lambda: _write(client, 600), limit_s(15.0), "writes are back")
        until(lambda: all(_is_well(cluster[name], 3) for name in NAMES), limit_s(20.0), "all well again")
    assert failures == []


def test_without_a_majority_writes_are_refused_quickly_and_answers_go_on(cluster: Nodes) -> None:
    servers = [cluster[name].child("nats-server") for name in ("n1", "n2")]
    with _asking(cluster["n1"], cluster["n3"]) as failures:
        for server in servers:
            server.suspend()
        try:
            with cluster["n3"].admin() as client:
                until(lambda: _refused(client), SOON_S, "a write is refused")
                began = time.monotonic()
                with pytest.raises(ClientError) as refused:
                    _write(client, 700)
                assert time.monotonic() - began < limit_s(2.5)
                assert refused.value.code in ("unavailable", "deadline_exceeded")
                until(lambda: client.cluster.status().status == "no_quorum", SOON_S, "it says so")
            assert _ask(cluster["n3"]) == ANSWER
        finally:
            for server in servers:
                server.resume()
        until(lambda: all(_is_well(cluster[name], 3) for name in NAMES), limit_s(30.0), "healed")
    assert failures == []


def _refused(client: SyncClient) -> bool:
    try:
        _write(client, 650)
    except ClientError:
        return True
    return False


def test_all_killed_at_once_come_back_with_all_they_knew(cluster: Nodes) -> None:
    with cluster["n2"].admin() as client:
        version = client.config.set({"max_queue": 321}, comment="before the power cut").version
        client.nodes.label("n3", {"zone": "c"})
        token = client.cluster.create_token(role="node", uses=7)
        history = client.config.history()
    before = _status(cluster["n1"])
    children = [cluster[name].child("nats-server") for name in NAMES]
    for name in NAMES:
        cluster[name].process.send_signal(signal.SIGKILL)
    for name in NAMES:
        cluster[name].kill()
        assert not psutil.pid_exists(cluster[name].pid)
    assert psutil.wait_procs(children, SOON_S)[1] == [], "the nats-servers died with their nodes"
    for name in NAMES:
        cluster.serve(name)
    for name in NAMES:
        until(lambda name=name: _is_well(cluster[name], 3), limit_s(40.0), f"{name} is back")
    after = _status(cluster["n3"])
    assert (after.cluster, sorted(after.voters)) == (before.cluster, sorted(before.voters))
    with cluster["n3"].admin() as client:
        config = client.config.get()
        assert (config.version, config.values["max_queue"]) == (version, 321)
        assert client.config.history() == history
        assert client.nodes.get("n3").labels == {"zone": "c"}
        assert [one.uses for one in client.cluster.tokens() if one.id == token.id] == [7]
    assert _ask(cluster["n3"]) == ANSWER


# ── who leaves ──────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """The server n1 with the model `here`, and the mere node n2."""
    with Nodes(tmp_path_factory.mktemp("pair")) as nodes:
        first = nodes.serve("n1")
        add_model(first.url, "here", scripted_model(ANSWER, chat_template=CHATML_TEMPLATE))
        second = nodes.join("n2", to="n1", role="node")
        until(lambda: _is_well(first, 2) and _is_well(second, 2), SOON_S, "two nodes")
        yield nodes


def test_a_removed_node_is_cut_off_everywhere_within_five_seconds(pair: Nodes) -> None:
    first, second = pair["n1"], pair["n2"]
    assert _ask(second) == ANSWER
    cluster = _status(first).cluster
    with first.admin() as client:
        with pytest.raises(ClientError, match="online"):
            client.nodes.remove("n2")
        client.nodes.remove("n2", force=True)
        removed_at = time.monotonic()

        def cut_off() -> bool:
            with second.http() as http:
                asked = http.post("/api/generate", json={"model": "here", "prompt": "Hi", "stream": False})
                return asked.status_code == 404

        left_s = limit_s(5.0) - (time.monotonic() - removed_at)
        until(cut_off, left_s, "no answer through the old cluster")
        assert [row.name for row in client.nodes.list()] == ["n1"]
    until(lambda: _status(second).cluster not in ("", cluster), SOON_S, "alone again")
    until(lambda: _is_well(second, 1), SOON_S, "well alone")
    with first.admin() as client, second.admin() as other:
        token = client.cluster.create_token(role="node").token
        other.cluster.join(token)
    until(lambda: _is_well(first, 2) and _is_well(second, 2), SOON_S, "back with a new token")


def test_nodes_that_restart_without_coordination_still_find_each_other(pair: Nodes) -> None:
    first, second = pair["n1"], pair["n2"]
    with second.admin() as client:
        client.config.set({"allowed_origins": ["https://app.example"]})
    kept = pair.folder / "n2" / "cluster.state"
    until(lambda: all(part in kept.read_bytes() for part in (b"app.example", b"here:latest")), SOON_S, "kept")
    for node in (first, second):
        node.stop()
    pair.serve("n1", env={"OLLAMA_DISTRIBUTED_NATS_SERVER": "/bin/false"})
    second = pair.serve("n2")
    until(lambda: _answers(second), SOON_S, "an answer of the first node's model at the second")
    assert _status(second).status != "ok"
    with second.http() as http:
        asked = http.get("/api/version", headers={"Origin": "https://app.example"})
    assert asked.status_code == 200, "the cluster's config holds"


def _answers(node: NodeProcess) -> bool:
    try:
        return _ask(node) == ANSWER
    except AssertionError:
        return False


# ── what does not start, what never comes back ──────────────────────────────────────


def test_a_node_without_coordination_answers_all_the_same(tmp_path: Path) -> None:
    with Nodes(tmp_path, env={"OLLAMA_DISTRIBUTED_NATS_SERVER": "/bin/false"}) as nodes:
        node = nodes.serve("n1")
        add_model(node.url, "here", scripted_model(ANSWER, chat_template=CHATML_TEMPLATE))
        assert _ask(node) == ANSWER
        status = until(lambda: (s := _status(node)).reasons and s, SOON_S, "a reason")
        assert status.status == "degraded"
        until(lambda: "coordination is not up" in _status(node).reasons[0], SOON_S, "which one")
        with node.http() as http:
            ready = http.get("/readyz")
        assert (ready.status_code, ready.json()["cluster"]) == (200, "degraded")
        with node.admin() as client:
            began = time.monotonic()
            with pytest.raises(ClientError, match="coordination"):
                client.cluster.create_token()
            assert time.monotonic() - began < limit_s(3.0)


def test_a_dead_voter_is_replaced_and_others_hand_their_votes_over(tmp_path: Path) -> None:
    """Of four servers three vote. One dies, the spare takes its place; a fifth is the next spare."""
    with Nodes(tmp_path) as nodes:
        first = nodes.serve("n1")
        for name in ("n2", "n3", "n4"):
            nodes.join(name, to="n1", role="server")
        until(lambda: len(_status(first).voters) == 3, GROWN_S, "three voters")
        until(lambda: all(_is_well(nodes[name], 4) for name in (*NAMES, "n4")), SOON_S, "four are well")
        voters = set(_status(first).voters)
        others = [nodes[name] for name in ("n2", "n3", "n4")]
        dead = next(node for node in others if node.id in voters)
        spare = next(node for node in others if node.id not in voters)
        with first.admin() as client, pytest.raises(ClientError, match="only a dead voter"):
            client.cluster.replace_voter(dead.id)
        dead.kill()
        # Asked at the one that does not vote: it goes to one that does.
        with spare.admin(timeout_s=120.0) as client:
            until(lambda: client.nodes.get(dead.id).status == "offline", SOON_S, "seen dead")
            answer = client.cluster.replace_voter(dead.id, spare.id)
            voters = voters - {dead.id} | {spare.id}
            assert set(answer.voters) == voters
            # The vote for the next leader may still be on.
            until(lambda: _write(client, 98), SOON_S, "a write")
            until(lambda: _gone(client, dead.id), SOON_S, "forgotten")
        until(lambda: _is_well(first, 3), SOON_S, "well without the dead one")

        fifth = nodes.join("n5", to="n1", role="server")
        leavers = [node for node in others if node.id in voters]
        until(lambda: all(_is_well(node, 4) for node in (first, *leavers, fifth)), SOON_S, "four again")
        _leaves(leavers[0])
        until(lambda: _is_well(first, 3), SOON_S, "well without the first that left")
        assert set(_status(first).voters) == voters - {leavers[0].id} | {fifth.id}
        # No server is left over now: one goes on alone.
        _leaves(leavers[1])
        until(lambda: _is_well(first, 2), SOON_S, "well without the second")
        assert len(_status(first).voters) == 1
        with fifth.admin() as client:
            version = until(client.config.get, SOON_S, "the config").version
            assert client.config.get().values["max_queue"] == 98
            assert until(lambda: _write(client, 99), SOON_S, "a write") > version
        for left in leavers:
            until(lambda left=left: _is_well(left, 1), SOON_S, "alone again")
        alone = next(node for node in (first, fifth) if node.id in _status(first).voters)
        with alone.admin() as client, pytest.raises(ClientError, match="only coordination server"):
            client.cluster.leave()


def _leaves(node: NodeProcess) -> None:
    def left() -> bool:
        with node.admin(timeout_s=120.0) as client:
            client.cluster.leave()
        return True

    until(left, SOON_S, f"{node.id} leaves")


def _gone(client: SyncClient, node: str) -> bool:
    if any(row.id == node for row in client.nodes.list()):
        client.nodes.remove(node)
    return True


# ── how one joins ───────────────────────────────────────────────────────────────────


def test_a_running_node_joins_and_leaves_and_listens_to_nobody_before(tmp_path: Path) -> None:
    with Nodes(tmp_path) as nodes:
        first, second = nodes.serve("n1"), nodes.serve("n2")
        until(lambda: _is_well(first, 1) and _is_well(second, 1), SOON_S, "two clusters of one")
        assert not _status(first).open
        assert _listens_on(first) == {"127.0.0.1"}
        cut = first.cli("join", "odj_server.ab12", check=False)
        assert (cut.returncode, cut.stderr.strip()) == (
            1,
            "Error: the join token is not complete; copy it as a whole, from 'odj_' to its end",
        )
        own = _status(second).cluster
        with first.admin() as client:
            made = until(client.cluster.create_token, SOON_S, "a token")
        joined = second.cli("join", made.token)
        assert "joined cluster" in joined.stderr
        until(lambda: _is_well(first, 2) and _is_well(second, 2), SOON_S, "one cluster")
        again = second.cli("join", made.token, check=False)
        assert again.returncode == 1
        assert "in that cluster already" in again.stderr
        with second.admin() as client:
            client.cluster.leave()
        until(lambda: _is_well(second, 1) and _is_well(first, 1), SOON_S, "left")
        assert _status(second).cluster not in (own, _status(first).cluster)
        with second.admin() as client, pytest.raises(Conflict, match="used"):  # not 401: this key is good
            client.cluster.join(made.token)


def _listens_on(node: NodeProcess) -> set[str]:
    """The addresses of the node's ports and of its children's."""
    processes = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
    return {
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
