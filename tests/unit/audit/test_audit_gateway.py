"""Every route that changes something is recorded before it is served, or it is not served."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from tests.gateway_bench import HELLO, WALL, gateway

from ollama_distributed.access.keys import make_admin_key, make_key
from ollama_distributed.access.service import Authenticator
from ollama_distributed.base.audit import AuditEntry, AuditFilter, AuditPage, VerifyAnswer
from ollama_distributed.base.errors import DiskFull
from ollama_distributed.gateway.auditing import is_privileged
from ollama_distributed.gateway.rights import right_of
from ollama_distributed.testing.fake_cluster import FakeCluster
from ollama_distributed.testing.inference import ScriptedInference

SECRET = "a-secret-that-is-nowhere"


class Recording:
    """Remembers; `full`: cannot write."""

    def __init__(self) -> None:
        self.written: list[AuditEntry] = []
        self.noted: list[AuditEntry] = []
        self.turned_away: list[AuditEntry] = []
        self.full = False
        self.asked: list[AuditFilter] = []

    async def write(self, entry: AuditEntry) -> None:
        if self.full:
            raise DiskFull("not done, for it cannot be recorded")
        self.written.append(entry)

    def note(self, entry: AuditEntry) -> None:
        self.noted.append(entry)

    def refused(self, entry: AuditEntry) -> None:
        self.turned_away.append(entry)

    async def page(self, wanted: AuditFilter) -> AuditPage:
        self.asked.append(wanted)
        return AuditPage(records=())

    async def verify(self) -> VerifyAnswer:
        return VerifyAnswer(ok=True, chains=())


class World:
    def __init__(self) -> None:
        self.audit = Recording()
        self.cluster = FakeCluster("alpha", "beta")
        self.key, record = make_admin_key(WALL)
        self.viewer, other = make_key("viewer", now=WALL)
        keys = Authenticator((record, other), require_key=False, wall=lambda: WALL)
        self.app = gateway(
            ScriptedInference(HELLO),
            cluster=self.cluster,
            authenticator=keys,
            audit=self.audit,
            disks=object(),
        )
        transport = httpx.ASGITransport(app=self.app, client=("127.0.0.1", 5))
        self.http = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8080")

    def admin(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}


@pytest.fixture
def world() -> World:
    return World()


async def test_a_change_is_recorded_before_and_after(world: World) -> None:
    async with world.http as http:
        answer = await http.post("/api/v1/nodes/alpha/drain", headers=world.admin())
        assert answer.status_code == 200
        (begun,) = world.audit.written
        assert begun.action == "POST /api/v1/nodes/{id}/drain"
        assert (begun.object, begun.role, begun.source) == ("id=alpha", "admin", "127.0.0.1")
        assert (begun.result, begun.request_id) == ("begun", answer.headers["x-request-id"])
        assert [(one.action, one.result) for one in world.audit.noted] == [(begun.action, "ok")]
        await http.post("/api/v1/nodes/nobody/drain", headers=world.admin())
        assert world.audit.noted[-1].result == "not_found"
        await http.request(
            "DELETE", "/api/delete", json={"model": "m", "password": SECRET}, headers=world.admin()
        )
        assert world.audit.written[-1].object == "model=m"
        assert world.audit.noted[-1].result != "ok"
        assert SECRET not in repr(world.audit.written)


async def test_a_body_that_no_parser_should_meet_is_refused_all_the_same(world: World) -> None:
    """What a change is about is read for the record before anything else looks at the body."""
    deep = b'{"name":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    headers = {**world.admin(), "content-type": "application/json"}
    async with world.http as http:
        for body in (deep, b'{"name":"\xff"}', b"[" * 1000):
            answer = await http.post("/api/v1/cluster/tokens", content=body, headers=headers)
            assert answer.status_code == 400, answer.text
        assert {one.object for one in world.audit.written} == {""}


async def test_what_cannot_be_recorded_is_not_done(world: World) -> None:
    world.audit.full = True
    async with world.http as http:
        for path in ("/api/v1/nodes/alpha/drain", "/api/pull"):
            answer = await http.post(path, json={"model": "m"}, headers=world.admin())
            assert answer.status_code == 507, answer.text
        shown = await http.get("/api/v1/nodes/alpha", headers=world.admin())
        assert shown.status_code == 200
        assert "drain" not in shown.json()["status"]
        assert (await http.get("/api/v1/models")).status_code == 200
        answer = await http.post(
            "/api/chat", json={"model": "m", "stream": False, "messages": [{"role": "user", "content": "x"}]}
        )
        assert answer.status_code == 200, "inference goes on"
    assert not world.audit.noted


async def test_who_is_turned_away_is_recorded(world: World) -> None:
    async with world.http as http:
        wrong = {"authorization": f"Bearer odk_{SECRET}"}
        assert (await http.get("/api/v1/models", headers=wrong)).status_code == 401
        assert (await http.post("/api/chat", json={}, headers=wrong)).status_code == 401
        assert [one.action for one in world.audit.turned_away] == ["sign-in", "sign-in"]
        viewer = {"authorization": f"Bearer {world.viewer}"}
        assert (await http.post("/api/v1/nodes/alpha/drain", headers=viewer)).status_code == 403
        last = world.audit.turned_away[-1]
        assert (last.action, last.result, last.role) == (
            "POST /api/v1/nodes/alpha/drain",
            "forbidden",
            "viewer",
        )
        assert SECRET not in repr(world.audit.turned_away)
        assert not world.audit.written


async def test_reading_it(world: World) -> None:
    async with world.http as http:
        assert (await http.get("/api/v1/audit")).status_code == 403, "not for everybody at this machine"
        asked = await http.get("/api/v1/audit?limit=5&actor=k1&since=12.5", headers=world.admin())
        assert asked.json() == {"records": [], "next": None, "away": []}
        assert world.audit.asked == [AuditFilter(limit=5, actor="k1", since=12.5)]
        assert (await http.get("/api/v1/audit?limit=0", headers=world.admin())).status_code == 400
        assert (await http.get("/api/v1/audit/verify", headers=world.admin())).json()["ok"]


def test_no_route_forgets_it(world: World) -> None:
    """Whatever is registered: what asks for a right to change is recorded, for its right alone."""
    changing: list[Any] = []
    for route in world.app.cold_routes:
        right = right_of(route.method, route.path, route.verb)
        if right is None or route.method in ("GET", "HEAD") or right.verb not in ("admin", "models"):
            continue
        assert is_privileged(route.method, route.path, right) or route.path.startswith("/api/blobs/")
        changing.append(route)
    assert len(changing) > 15
