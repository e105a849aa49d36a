"""The routes of the cluster over the fake cluster: shapes, verbs, who did it, refusals."""

import difflib
import re

import httpx
import pytest
from tests.gateway_bench import HELLO, WALL, gateway

from ollama_distributed.access.keys import make_key
from ollama_distributed.access.service import Authenticator
from ollama_distributed.base.alerts import Alert
from ollama_distributed.base.errors import Invalid
from ollama_distributed.base.policies import Policy
from ollama_distributed.state.naming import unknown_node
from ollama_distributed.testing.fake_cluster import FakeCluster
from ollama_distributed.testing.inference import ScriptedInference

pytestmark = pytest.mark.anyio

PLAIN, RECORD = make_key("admin", now=0.0)


class World:
    def __init__(self, cluster=None, **extra):
        self.cluster = cluster or FakeCluster("alpha", "beta", "gamma", "delta")
        self.authenticator = Authenticator([RECORD], require_key=False, wall=lambda: WALL)
        self.app = gateway(
            ScriptedInference(HELLO), cluster=self.cluster, authenticator=self.authenticator, **extra
        )

    async def ask(self, method, path, *, key=PLAIN, **extra):
        transport = httpx.ASGITransport(self.app, client=("127.0.0.1", 5))
        headers = {"authorization": f"Bearer {key}"} if key else {}
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8080") as client:
            return await client.request(method, f"/api/v1{path}", headers=headers, **extra)


@pytest.fixture
def world():
    return World()


def error_of(answer):
    body = answer.json()["error"]
    assert body["request_id"] == answer.headers["x-request-id"]
    return answer.status_code, body["code"], body["message"]


# ── reads ───────────────────────────────────────────────────────────────────────────


async def test_status_leader_and_nodes(world):
    status = (await world.ask("GET", "/cluster/status")).json()
    assert (status["status"], status["nodes"], status["node"]) == ("ok", {"online": 4}, "alpha-id")
    assert status["voters"] == ["alpha-id", "beta-id", "gamma-id"]
    leader = (await world.ask("GET", "/cluster/leader")).json()
    assert (leader["leader"], leader["name"], leader["this"]) == ("alpha-id", "alpha", True)
    nodes = (await world.ask("GET", "/nodes")).json()["nodes"]
    assert list(nodes) == ["alpha-id", "beta-id", "delta-id", "gamma-id"]
    assert nodes["beta-id"]["name"] == "beta"
    assert nodes["beta-id"]["status"] == "online"
    assert nodes["beta-id"]["usage"]["cpu"] == 25.0
    assert nodes["beta-id"]["usage"]["memory"] == 50.0


async def test_what_nodes_say_of_themselves_without_models_that_one_does_not_see(world):
    world.cluster.set("beta", status="offline")
    full = Alert(
        level="warning", code="disk_low", message="disk of alpha; delete", node="alpha-id", name="alpha"
    )
    hidden = Alert(
        level="error", code="model_quarantined", message="covert crashed", name="alpha", model="covert"
    )
    world.cluster.said = [full, hidden]
    bound, record = make_key("admin", now=0.0, policy="some")
    policy = Policy(name="some", models=("open*",))
    world.authenticator.share({record.id: record}, {"some": policy})
    seen = (await world.ask("GET", "/cluster/status")).json()
    assert seen["reasons"] == [seen["alerts"][0]["message"]]
    assert [row["code"] for row in seen["alerts"]] == ["node_offline", "disk_low", "model_quarantined"]
    assert (seen["alerts"][1]["name"], seen["alerts"][2]["model"]) == ("alpha", "covert")
    answer = await world.ask("GET", "/cluster/status", key=bound)
    assert "covert" not in answer.text
    assert [row["code"] for row in answer.json()["alerts"]] == [row["code"] for row in seen["alerts"]]


async def test_no_leader_is_said(world):
    world.cluster.quorum = False
    assert (await world.ask("GET", "/cluster/leader")).json()["leader"] is None
    assert (await world.ask("GET", "/cluster/status")).json()["status"] == "no_quorum"


@pytest.mark.parametrize("name", ["beta", "beta-id"])
async def test_a_node_by_name_or_id(world, name):
    assert (await world.ask("GET", f"/nodes/{name}")).json()["id"] == "beta-id"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/nodes/betta"),
        ("POST", "/nodes/betta/drain"),
        ("POST", "/nodes/betta/undrain"),
        ("DELETE", "/nodes/betta"),
    ],
)
async def test_an_unknown_node_names_what_is_near(world, method, path):
    status, code, message = error_of(await world.ask(method, path))
    assert (status, code) == (404, "not_found")
    assert message == "there is no node 'betta'; did you mean beta or delta?"
    assert world.cluster.by == []


async def test_unknown_nodes_elsewhere(world):
    _, _, message = error_of(await world.ask("PATCH", "/nodes/betta", json={"labels": {"a": "b"}}))
    assert "beta" in message
    world.cluster.set("gamma", status="offline")
    replace = {"dead": "gamma", "new": "delts"}
    _, _, message = error_of(await world.ask("POST", "/cluster/voters/replace", json=replace))
    assert message.startswith("there is no node 'delts'; did you mean delta")


def test_of_very_many_nodes_the_near_one_is_found_among_few(monkeypatch):
    compared = []
    close = difflib.get_close_matches
    monkeypatch.setattr(difflib, "get_close_matches", lambda a, b, n: compared.append(b) or close(a, b, n))
    said = unknown_node("node-5000x", [f"node-{n}" for n in range(10_000)])
    assert "did you mean node-5000 " in said
    assert len(compared[0]) < 100


def test_unknown_nodes_without_a_near_one():
    assert unknown_node("x", ["b", "a", "b"]) == "there is no node 'x'; there are: a, b"
    many = unknown_node("x", [f"machine-{n}" for n in range(100)])
    assert many.endswith("machine-12, …")


# ── changes of nodes ────────────────────────────────────────────────────────────────


async def test_drain_and_undrain(world):
    answer = await world.ask("POST", "/nodes/beta/drain")
    assert (answer.status_code, answer.json()["status"]) == (200, "draining")
    assert (await world.ask("POST", "/nodes/beta-id/undrain")).json()["status"] == "online"
    assert world.cluster.by == [("drain", RECORD.id), ("undrain", RECORD.id)]


async def test_labels_come_and_go(world):
    answer = await world.ask("PATCH", "/nodes/beta", json={"labels": {"zone": "a", "rack": "7"}})
    assert answer.json()["labels"] == {"zone": "a", "rack": "7"}
    answer = await world.ask("PATCH", "/nodes/beta", json={"labels": {"rack": None}})
    assert answer.json()["labels"] == {"zone": "a"}
    refused = await world.ask("PATCH", "/nodes/beta", json={"label": {"zone": "a"}})
    assert error_of(refused)[:2] == (400, "invalid_request")


async def test_remove_asks_for_force_while_online(world):
    status, code, message = error_of(await world.ask("DELETE", "/nodes/beta"))
    assert (status, code) == (409, "conflict")
    assert "online" in message
    assert (await world.ask("DELETE", "/nodes/beta?force=true")).status_code == 204
    assert "beta-id" not in world.cluster.rows
    assert error_of(await world.ask("DELETE", "/nodes/gamma?force=perhaps"))[0] == 400


# ── tokens, joining, leaving, voters ────────────────────────────────────────────────


async def test_tokens_are_made_listed_revoked(world):
    answer = await world.ask("POST", "/cluster/tokens", json={"role": "server", "uses": 2, "ttl_s": 60})
    made = answer.json()
    assert answer.status_code == 201
    assert answer.headers["cache-control"] == "no-store"
    assert made["command"] == f"ollama-distributed join {made['token']}"
    assert (made["role"], made["uses"], made["expires_at"]) == ("server", 2, 1_700_000_060.0)
    plain = await world.ask("POST", "/cluster/tokens")
    assert plain.json()["role"] == "node"  # three servers are there
    answer = await world.ask("GET", "/cluster/tokens")
    assert [row["id"] for row in answer.json()["tokens"]] == [made["id"], plain.json()["id"]]
    assert made["token"] not in answer.text
    assert (await world.ask("DELETE", f"/cluster/tokens/{made['id']}")).status_code == 204
    assert error_of(await world.ask("DELETE", "/cluster/tokens/none"))[:2] == (404, "not_found")


async def test_join_and_leave():
    world = World(FakeCluster("alpha"))
    assert error_of(await world.ask("POST", "/cluster/join", json={}))[0] == 400
    assert error_of(await world.ask("POST", "/cluster/leave"))[0] == 409
    joined = await world.ask("POST", "/cluster/join", json={"token": "odj_x"})
    assert joined.json()["nodes"] == {"online": 2}
    assert error_of(await world.ask("POST", "/cluster/join", json={"token": "odj_x"}))[0] == 409
    assert (await world.ask("POST", "/cluster/leave")).status_code == 204
    assert world.cluster.left


async def test_a_dead_voter_is_replaced(world):
    ask = {"dead": "gamma"}
    assert error_of(await world.ask("POST", "/cluster/voters/replace", json=ask))[0] == 409
    world.cluster.set("gamma", status="offline")
    answer = await world.ask("POST", "/cluster/voters/replace", json=ask)
    assert answer.json()["voters"] == ["alpha-id", "beta-id", "delta-id"]


# ── configuration ───────────────────────────────────────────────────────────────────


async def test_config_is_put_kept_and_rolled_back(world):
    assert (await world.ask("GET", "/config")).json()["version"] == 0
    first = await world.ask("PUT", "/config", json={"values": {"keep_alive": "10m"}, "comment": "longer"})
    assert (first.json()["version"], first.json()["by"]) == (1, RECORD.id)
    stale = await world.ask("PUT", "/config", json={"values": {"keep_alive": None}, "version": 0})
    assert error_of(stale)[:2] == (409, "conflict")
    second = await world.ask("PUT", "/config", json={"values": {"keep_alive": None}, "version": 1})
    assert second.json()["values"] == {}
    back = await world.ask("POST", "/config/rollback", json={"version": 1})
    assert (back.json()["version"], back.json()["values"]) == (3, {"keep_alive": "10m"})
    history = (await world.ask("GET", "/config/history")).json()["versions"]
    assert [one["version"] for one in history] == [3, 2, 1]
    for version in (0, 9):
        assert error_of(await world.ask("POST", "/config/rollback", json={"version": version}))[0] == 404


async def test_a_wrong_setting_is_told():
    def check(values):
        raise Invalid("there is no setting 'keep_alvie'", param="keep_alvie")

    world = World(FakeCluster("alpha", check=check))
    answer = await world.ask("PUT", "/config", json={"values": {"keep_alvie": 1}})
    assert error_of(answer) == (400, "invalid_request", "there is no setting 'keep_alvie'")


async def test_without_quorum_changes_are_refused_and_reads_go_on(world):
    world.cluster.quorum = False
    for method, path, body in (
        ("PUT", "/config", {"values": {}}),
        ("POST", "/nodes/beta/drain", None),
        ("POST", "/cluster/tokens", None),
    ):
        answer = await world.ask(method, path, json=body) if body else await world.ask(method, path)
        assert error_of(answer)[:2] == (503, "unavailable")
        assert answer.json()["error"]["retryable"] is True
    for path in ("/nodes", "/config", "/cluster/status", "/cluster/tokens"):
        assert (await world.ask("GET", path)).status_code == 200


# ── who may, and the document ───────────────────────────────────────────────────────


def own_routes(world):
    return [route for route in world.app.cold_routes if route.tag.startswith("Cluster")]


async def test_changes_need_the_admin(world):
    routes = own_routes(world)
    assert len(routes) == 19
    for route in routes:
        assert route.verb == ("read" if route.method == "GET" else "admin")
        if route.verb == "admin":
            path = re.sub(r"\{[^}]*\}", "beta", route.path.removeprefix("/api/v1"))
            answer = await world.ask(route.method, path, key=None)
            assert error_of(answer)[:2] == (403, "forbidden")
    assert world.cluster.by == []


async def test_without_a_cluster_there_are_no_such_routes():
    app = gateway(ScriptedInference(HELLO))
    assert not [route for route in app.cold_routes if route.tag.startswith("Cluster")]


async def test_the_document_has_their_bodies_and_answers(world):
    transport = httpx.ASGITransport(world.app, client=("127.0.0.1", 5))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8080") as client:
        document = (await client.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    for route in own_routes(world):
        operation = document["paths"][route.path][route.method.lower()]
        if route.body is not None:
            assert operation["requestBody"]["content"]["application/json"]["schema"] == {
                "$ref": f"#/components/schemas/{route.body.__name__}"
            }
        if route.answer is not None:
            schema = operation["responses"][str(route.status)]["content"][route.media]["schema"]
            if route.media == "text/event-stream":
                schema = schema["properties"]["data"]["contentSchema"]
            assert schema["$ref"].rsplit("/", 1)[1] in schemas
    assert "text/event-stream" in str(document["paths"]["/api/v1/config/watch"])
    remove = document["paths"]["/api/v1/nodes/{id}"]["delete"]
    assert [one["name"] for one in remove["parameters"]] == ["id", "force"]
    assert list(remove["responses"]) == ["204", "default"]
