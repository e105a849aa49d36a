"""What a policy takes away, on every surface alike; which policy holds; keys and policies by REST."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from tests.access_world import MemoryBook, answered
from tests.gateway_bench import HELLO, WALL, gateway

from ollama_distributed.access.desk import AccessDesk
from ollama_distributed.access.keys import make_key
from ollama_distributed.access.policies import allows_model, check_policy, policy_of
from ollama_distributed.access.roles import INFERENCE, Right, demand
from ollama_distributed.access.service import Authenticator, Caller
from ollama_distributed.base.access import ExplainAsk, KeyAsk, PolicyAsk, RotateAsk
from ollama_distributed.base.cluster import NodeRow
from ollama_distributed.base.errors import Forbidden, Invalid, ModelNotFound, Unauthenticated
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import KeyId, NodeId
from ollama_distributed.base.inference import Failed, InferenceRequest
from ollama_distributed.base.policies import Limits, Policy
from ollama_distributed.gateway.dialects.table import HOT_ROUTES
from ollama_distributed.gateway.events.channels import channels_of, told_to
from ollama_distributed.testing.inference import ScriptedInference

pytestmark = pytest.mark.anyio

HIDDEN = "hidden:latest"
BODY = {
    "model": HIDDEN,
    "prompt": "p",
    "messages": [{"role": "user", "content": "c"}],
    "input": "i",
    "query": "q",
    "documents": ["d"],
    "max_tokens": 5,
    "stream": False,
}


class World:
    """An app over a book of keys and policies, with an admin's key."""

    def __init__(self, inference: ScriptedInference | None = None) -> None:
        self.admin, record = make_key("admin", now=0.0)
        self.book = MemoryBook(WALL)
        self.authenticator = Authenticator([record], require_key=True, wall=lambda: self.book.now)
        self.book.told.append(self.share)
        self.inference = inference or ScriptedInference(HELLO, tokens=40)
        self.desk = AccessDesk(
            self.book,
            self.authenticator,
            lambda: self.book.now,
            node=NodeId("n1"),
            last_used=lambda key: self.authenticator.used().get(key),
        )
        self.app = gateway(self.inference, authenticator=self.authenticator, access=self.desk)

    def share(self) -> None:
        keys = {id_: entry.record for id_, entry in self.book.keys().items()}
        self.authenticator.share(keys, self.book.policies())

    async def key(self, *, policy: dict[str, Any] | None = None, **fields: Any) -> str:
        if policy is not None:
            await self.desk.set_policy(PolicyAsk(name="p", **policy), new=True, actor="t")
            fields["policy"] = "p"
        return (await self.desk.create_key(KeyAsk(**fields), actor="t")).key

    async def ask(self, method: str, path: str, body: Any = None, *, key: str = "") -> tuple[int, Any]:
        raw = b"" if body is None else json.dumps(body).encode()
        status, data = await answered(self.app, method, path, key=key or self.admin, body=raw)
        return status, json.loads(data) if data else None

    def who(self, key: str) -> Identity:
        return self.authenticator.identify(Caller(key, at_this_machine=False))


# ── the same verdict on every surface ───────────────────────────────────────────────


async def test_a_model_that_is_not_allowed_is_as_one_that_is_not_there() -> None:
    """All inference routes: the same answer, byte for byte, as where no such model exists."""
    missing = ModelNotFound(f"model '{HIDDEN}' not found")
    nowhere = World(ScriptedInference([Failed(missing)], error=missing))
    world = World()
    free, bound = await nowhere.key(), await world.key(policy={"models": ("tiny*",)})
    for route in HOT_ROUTES:
        row = {name: BODY[name] for name in ("model", "input")} if "responses" in route.path else BODY
        there = await nowhere.ask("POST", route.path, row, key=free)
        here = await world.ask("POST", route.path, row, key=bound)
        assert here[0] == 404, route.path
        for _, said in (there, here):
            strip_ids(said)
        assert here == there, route.path
    assert world.inference.requests == []


def strip_ids(body: Any) -> None:
    body.pop("request_id", None)
    if isinstance(body.get("error"), dict):
        body["error"].pop("request_id", None)


async def test_reading_only_and_routes_hold_on_every_surface() -> None:
    for policy in ({"read_only": True}, {"routes": ("/nowhere*",)}):
        world = World()
        key = await world.key(policy=policy)
        for route in HOT_ROUTES:
            status, _ = await world.ask("POST", route.path, {**BODY, "model": "m"}, key=key)
            assert status == 403, (policy, route.path)


async def test_lists_show_what_is_allowed() -> None:
    from tests.unit.gateway.test_gateway_app import FakeCatalog, FakeResidents

    world = World()
    world.app = gateway(
        world.inference, authenticator=world.authenticator, catalog=FakeCatalog(), residents=FakeResidents()
    )
    key = await world.key(policy={"models": ("smollm2*",)}, role="operator")
    for path, rows, name in (
        ("/api/tags", "models", "name"),
        ("/v1/models", "data", "id"),
    ):
        _, body = await world.ask("GET", path, key=key)
        assert [row[name] for row in body[rows]] == ["smollm2:latest"]
    _, body = await world.ask("GET", "/api/v1/models", key=key)
    assert [*body["models"]] == ["smollm2:latest"]
    hidden = "acme/tiny:v1"
    for method, path, body in (
        ("GET", f"/api/v1/models/{hidden}", None),
        ("GET", f"/v1/models/{hidden}", None),
        ("POST", "/api/show", {"model": hidden}),
        ("POST", "/api/copy", {"source": hidden, "destination": "smollm2:b"}),
        ("POST", "/api/create", {"model": "smollm2:b", "from": hidden}),
        ("DELETE", "/api/delete", {"model": hidden}),
        ("DELETE", f"/api/v1/models/{hidden}", None),
    ):
        status, _ = await world.ask(method, path, body, key=key)
        assert status == 404, (method, path)
    status, _ = await world.ask("GET", "/metrics", key=key)
    assert status == 403, "it names models"


class OneNode:
    """A cluster of one; a `gateway.cluster_port.Cluster`."""

    async def nodes(self) -> list[NodeRow]:
        return [NodeRow(id="n1", name="one", status="online", since=0.0, models=("covert", "open"))]


async def test_events_of_nodes_name_no_model_to_whom_some_do_not_exist() -> None:
    cluster: Any = OneNode()
    (row,) = await channels_of(None, cluster, None, wall=lambda: 0.0)["nodes"].ask()
    free, bound = Identity("viewer"), Identity("viewer", policy=Policy(name="p", models=("open*",)))
    assert json.loads(told_to(free, row))["models"] == ["covert", "open"]
    assert b"covert" not in told_to(bound, row)
    assert json.loads(told_to(bound, row))["name"] == "one"


async def test_more_than_the_policy_allows_is_refused_and_nothing_said_gets_the_limit() -> None:
    world = World()
    key = await world.key(policy={"max_output": 10})
    chat = {"model": "m", "messages": BODY["messages"], "stream": False}
    status, body = await world.ask("POST", "/v1/chat/completions", {**chat, "max_tokens": 11}, key=key)
    assert (status, "10" in body["error"]["message"]) == (400, True)
    for asked, given in ((None, 10), (7, 7)):
        row = chat if asked is None else {**chat, "max_tokens": asked}
        status, _ = await world.ask("POST", "/v1/chat/completions", row, key=key)
        request = world.inference.requests[-1]
        assert isinstance(request, InferenceRequest)
        assert (status, request.sampling.num_predict) == (200, given)


@pytest.mark.parametrize(
    ("asked", "status", "given"), [(None, 200, 60), (60, 200, 60), (61, 400, 0)], ids=str
)
async def test_prompt_and_answer_together(asked: int | None, status: int, given: int) -> None:
    """The prompt has 40 tokens, 100 are allowed."""
    world = World()
    key = await world.key(policy={"max_context": 100})
    row = {"model": "m", "messages": BODY["messages"], "stream": False}
    if asked is not None:
        row["max_tokens"] = asked
    got, _ = await world.ask("POST", "/v1/chat/completions", row, key=key)
    assert got == status
    if given:
        request = world.inference.requests[-1]
        assert isinstance(request, InferenceRequest)
        assert request.sampling.num_predict == given


# ── which policy holds ──────────────────────────────────────────────────────────────


def test_the_key_s_own_policy_then_the_role_s_then_the_team_s() -> None:
    own, role, team = (
        Policy(name="a"),
        Policy(name="b", roles=("user", "local")),
        Policy(name="c", teams=("x",)),
    )
    policies = {one.name: one for one in (own, role, team)}
    assert policy_of(policies, "user", "x", "a") is own
    assert policy_of(policies, "user", "x", "") is role
    assert policy_of(policies, "viewer", "x", "") is team
    assert policy_of(policies, "viewer", "y", "") is None
    assert policy_of(policies, "admin", "x", "") is None, "nobody could change it any more"
    with pytest.raises(Forbidden):
        policy_of(policies, "admin", "x", "gone")


@pytest.mark.parametrize(
    ("glob", "name", "fits"),
    [
        ("*", "a", True),
        ("tiny", "tiny:latest", True),
        ("tiny", "TINY", True),
        ("tiny:*", "tiny", True),
        ("tiny", "tiny:v2", False),
        ("tiny*", "acme/tiny", False),
        ("acme/*", "acme/tiny:v1", True),
        ("registry.ollama.ai/library/*", "tiny", True),
        ("hf.co/*", "hf.co/a/b:q4", True),
        ("tiny", "not a name!", False),
    ],
)
def test_globs_of_models(glob: str, name: str, fits: bool) -> None:
    assert allows_model(Identity("user", policy=Policy(name="p", models=(glob,))), name) == fits


@pytest.mark.parametrize(
    "policy",
    [
        Policy(name="p", max_output=0),
        Policy(name="p", models=("",)),
        Policy(name="p", roles=("admin",)),
        Policy(name="p", roles=("root",)),
        Policy(name="p", nodes={"": "x"}),
        Policy(name="p", limits=Limits(tokens_per_minute=-1)),
        Policy(name="p", cache_group="two words"),
    ],
    ids=str,
)
def test_what_no_policy_can_be(policy: Policy) -> None:
    with pytest.raises(Invalid):
        check_policy(policy)


# ── who shares what prompts leave in caches ─────────────────────────────────────────


def test_caches_are_a_team_s_or_a_group_s_that_policies_name() -> None:
    def tenant(team: str, group: str = "") -> str:
        return Identity("user", KeyId("k"), team, policy=Policy(name="p", cache_group=group)).tenant

    assert tenant("red") == Identity("viewer", team="red").tenant != tenant("blue")
    assert tenant("red", "shop") == tenant("blue", "shop")
    assert len({tenant("red", "shop"), tenant("red", "red"), tenant("red"), tenant("shop")}) == 4


def test_whom_a_node_does_not_know_yet_finds_no_other_team_s_prompts() -> None:
    knows = Authenticator([], require_key=True, wall=lambda: WALL)
    made_now, another, person = (
        knows.told(who)
        for who in (
            Identity("user", KeyId("k1"), "red"),
            Identity("user", KeyId("k2"), "red"),
            Identity("user", team="red", user="ann"),
        )
    )
    assert {one.role for one in (made_now, another, person)} == {"local"}
    assert len({"default", "red", made_now.tenant, another.tenant, person.tenant}) == 5
    admin_of_its_own_node = knows.told(Identity("admin", KeyId("k3")))
    assert admin_of_its_own_node.tenant == "default"


async def test_one_group_for_all_is_one_tenant_and_ends_with_the_policy() -> None:
    world = World()
    assert world.authenticator.one_tenant()
    body = {"name": "all", "cache_group": "all", "roles": ["user", "local"]}
    status, made = await world.ask("POST", "/api/v1/policies", body)
    assert (status, made["cache_group"]) == (201, "all")
    red, blue = [world.who(await world.key(team=team)) for team in ("red", "blue")]
    assert red.tenant == blue.tenant != red.team
    assert not world.authenticator.one_tenant(), "the admin's key is in no group"
    (_, admin), (_, user) = (make_key(role, now=0.0, policy="all") for role in ("admin", "user"))
    alone = Authenticator([admin, user], require_key=True, wall=lambda: WALL)
    alone.share({}, world.book.policies())
    assert alone.one_tenant()
    body = {"cache_group": "", "roles": ["user", "local"]}
    assert (await world.ask("PUT", "/api/v1/policies/all", body))[0] == 200
    assert world.who(await world.key(team="red")).tenant == "red"


def test_a_policy_never_adds() -> None:
    viewer = Identity("viewer", policy=Policy(name="p"))
    with pytest.raises(Forbidden):
        demand(viewer, INFERENCE)
    restricted = Identity("admin", policy=Policy(name="p", models=("a",)))
    with pytest.raises(Forbidden):
        demand(restricted, Right("read", "placement"))


# ── keys by REST ────────────────────────────────────────────────────────────────────


async def test_a_key_from_its_making_to_its_end() -> None:
    world = World()
    status, made = await world.ask("POST", "/api/v1/keys", {"name": "ci", "role": "user", "team": "red"})
    assert status == 201
    key, id_ = made["key"], made["row"]["id"]
    assert key not in json.dumps((await world.ask("GET", "/api/v1/keys"))[1])
    _, who = await world.ask("GET", "/api/v1/auth/whoami", key=key)
    assert (who["role"], who["team"], who["key_name"], who["key_id"]) == ("user", "red", "ci", id_)
    assert (await world.ask("GET", f"/api/v1/keys/{id_}"))[1]["last_used_at"] == WALL

    _, rotated = await world.ask("POST", f"/api/v1/keys/{id_}/rotate", {"overlap_s": 60})
    assert world.who(rotated["key"]) == world.who(key), "both are good for a minute"
    world.book.now += 61
    with pytest.raises(Unauthenticated):
        world.who(key)

    assert (await world.ask("DELETE", f"/api/v1/keys/{id_}"))[1]["status"] == "revoked"
    with pytest.raises(Unauthenticated):
        world.who(rotated["key"])
    assert (await world.ask("DELETE", f"/api/v1/keys/{id_}"))[0] == 409
    assert (await world.ask("DELETE", "/api/v1/keys/nobody00"))[0] == 404


async def test_without_an_overlap_the_old_secret_is_void_at_once() -> None:
    world = World()
    key = await world.key()
    made = await world.desk.rotate_key(world.who(key).key_id or "", RotateAsk(overlap_s=0), actor="t")
    with pytest.raises(Unauthenticated):
        world.who(key)
    assert world.who(made.key).role == "user"


async def test_a_key_ends_by_itself() -> None:
    world = World()
    key = await world.key(ttl_s=60.0)
    assert world.who(key).role == "user"
    world.book.now += 60
    with pytest.raises(Unauthenticated):
        world.who(key)


async def test_policies_by_rest_and_what_they_say() -> None:
    world = World()
    assert (await world.ask("POST", "/api/v1/policies", {"name": "p", "models": ["a*"]}))[0] == 201
    key = await world.key(name="k")
    id_ = world.who(key).key_id or ""
    status, made = await world.ask("POST", "/api/v1/keys", {"policy": "p", "role": "user"})
    assert status == 201
    bound = made["row"]["id"]
    assert (await world.ask("DELETE", "/api/v1/policies/p"))[0] == 409, "a key names it"
    _, said = await world.ask("POST", "/api/v1/policies/explain", {"key": bound, "model": "b"})
    assert (said["allowed"], said["by"], said["policy"]["name"]) == (False, "key", "p")
    assert world.desk.explain(ExplainAsk(key=id_, model="b"), None).allowed
    status, changed = await world.ask("PUT", "/api/v1/policies/p", {"models": ["b*"], "version": 1})
    assert (status, changed["version"]) == (200, 2)
    assert (await world.ask("PUT", "/api/v1/policies/p", {"version": 1}))[0] == 409
    assert (await world.ask("PUT", "/api/v1/policies/p", {"max_ouput": 1}))[0] == 400, "a typo is told"
    assert allows_model(world.who(made["key"]), "b"), "it holds at once"


async def test_a_key_whose_policy_is_not_known_may_nothing() -> None:
    key, record = make_key("user", now=0.0, policy="gone")
    authenticator = Authenticator([record], require_key=True, wall=lambda: WALL)
    with pytest.raises(Forbidden):
        authenticator.identify(Caller(key, at_this_machine=False))


def test_what_the_cluster_says_of_a_key_counts_more_than_the_node_s_own_file() -> None:
    key, record = make_key("admin", now=0.0)
    authenticator = Authenticator([record], require_key=True, wall=lambda: WALL)
    assert authenticator.identify(Caller(key, at_this_machine=False)).role == "admin"
    authenticator.share({record.id: msgspec.structs.replace(record, revoked_at=1.0)})
    with pytest.raises(Unauthenticated):
        authenticator.identify(Caller(key, at_this_machine=False))
