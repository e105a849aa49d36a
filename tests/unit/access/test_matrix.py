"""Every route of the app x every kind of caller: the whole table, asked through the app itself.

The routes are those that the app has, with every part of the node that it can be given, so a route
that is added is asked too, and one without a row in `gateway/rights.py` cannot be registered.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import msgspec
import pytest
from tests.access_world import MemoryBook, call
from tests.event_sockets import AsgiSocket, opened
from tests.gateway_bench import HELLO, WALL, Clock

from ollama_distributed.access.desk import AccessDesk
from ollama_distributed.access.keys import make_key
from ollama_distributed.access.roles import INFERENCE, MAY, Right
from ollama_distributed.access.service import Authenticator
from ollama_distributed.base.errors import NotOffered
from ollama_distributed.base.events import CHANNELS
from ollama_distributed.base.identity import ROLES, Role
from ollama_distributed.base.ids import NodeId
from ollama_distributed.gateway.app import Gateway, create_app
from ollama_distributed.gateway.events import hub
from ollama_distributed.gateway.ports import VersionInfo
from ollama_distributed.gateway.rights import PUBLIC, resource_of, right_of
from ollama_distributed.testing.inference import ScriptedInference

pytestmark = pytest.mark.anyio

KEYED: tuple[Role, ...] = tuple(role for role in ROLES if role not in ("local", "node"))
REMOTE, HERE = "10.0.0.9", "127.0.0.1"


_TOLD = frozenset({"count", "observe", "note", "refused"})


class Anything:
    """A part of the node of which only one thing is known: that it cannot do what is asked."""

    def __getattr__(self, name: str) -> Any:
        return _heard if name in _TOLD else Anything()

    def __call__(self, *_args: Any, **_named: Any) -> Any:
        raise NotOffered("not here")


def _heard(*_: Any) -> None:
    """Of what is only told."""


NO_PARTS = frozenset({"policy", "limits", "clock", "overload"})
"""Of `create_app`'s parameters: they have no routes."""


class World:
    """An app with every route that there is, and a key of each kind."""

    def __init__(self) -> None:
        self.keys: dict[str, str] = {}
        records = []
        for role in KEYED:
            self.keys[role], record = make_key(role, now=0.0)
            records.append(record)
        self.keys["expired"], expired = make_key("admin", now=0.0, expires_at=WALL - 1)
        self.keys["revoked"], revoked = make_key("admin", now=0.0)
        self.keys["other tenant"], other = make_key("user", now=0.0, team="others")
        self.keys["stranger"], _ = make_key("admin", now=0.0)
        self.keys["malformed"] = self.keys["admin"][:-1] + "!"
        records += [expired, msgspec.structs.replace(revoked, revoked_at=WALL - 1), other]
        authenticator = self.authenticator = Authenticator(records, require_key=False, wall=lambda: WALL)
        desk = AccessDesk(
            MemoryBook(), authenticator, lambda: WALL, node=NodeId("n1"), last_used=lambda _: None
        )
        given: dict[str, Any] = {
            "inference": ScriptedInference(HELLO),
            "authenticator": authenticator,
            "version": VersionInfo(version="1", ollama="1"),
            "clock": Clock(),
            "access": desk,
            "ready": lambda: True,
        }
        for name, parameter in inspect.signature(create_app).parameters.items():
            optional_part = parameter.default is None and name not in NO_PARTS
            if name not in given and (parameter.default is inspect.Parameter.empty or optional_part):
                given[name] = Anything()
        self.app: Gateway = create_app(**given)

    def routes(self) -> list[tuple[str, str, Right | None]]:
        cold = [(r.method, r.path, right_of(r.method, r.path, r.verb)) for r in self.app.cold_routes]
        return [*cold, *((r.method, r.path, INFERENCE) for r in self.app.hot.routes())]

    async def status(self, method: str, path: str, kind: str) -> int:
        asked = re.sub(r"\{[^}]*\}", "x", path)
        key = self.keys.get(kind, "")
        return await call(self.app, method, asked, key=key, peer=HERE if kind == "local" else REMOTE)


NOBODY = ("none", "malformed", "expired", "revoked", "stranger")


async def test_every_route_by_every_caller() -> None:
    world = World()
    routes = world.routes()
    assert len(routes) > 90
    for method, path, right in routes:
        if path.startswith("/api/v1/auth/") and path in PUBLIC:
            continue  # it says 401 itself, to those whose sign-in fails
        for kind in NOBODY:
            status = await world.status(method, path, kind)
            assert (status == 401) == (path not in PUBLIC), (method, path, kind, status)
        for kind in (*KEYED, "local", "other tenant"):
            role: Role = "user" if kind == "other tenant" else kind  # type: ignore[assignment]
            status = await world.status(method, path, kind)
            assert status != 401, (method, path, kind)
            may = right is None or right in MAY[role]
            assert (status == 403) != may, (method, path, kind, right, status)


async def test_every_channel_of_the_websocket_by_every_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """The verdict of the REST route with the same answer."""
    monkeypatch.setattr(hub, "FIRST_S", 0.01)
    world = World()
    channels = world.app._events.hub.channels
    assert set(channels) == set(CHANNELS)
    for kind in (*NOBODY, *KEYED, "local", "other tenant"):
        peer = HERE if kind == "local" else REMOTE
        socket = AsgiSocket(world.keys.get(kind, ""), peer=peer)
        async with opened(world.app, socket):
            assert (socket.status == 401) == (kind in NOBODY), (kind, socket.status)
            for name, channel in channels.items() if socket.status == 101 else ():
                socket.subscribe(name)
                # Nothing of this node can be asked: who may is told so, who may not, that.
                told = await socket.until("error", channel=name)
                status = await world.status("GET", channel.path, kind)
                assert (told["data"]["code"] == "forbidden") == (status == 403), (kind, name, told)


def test_a_route_without_a_row_cannot_be_registered() -> None:
    with pytest.raises(LookupError, match="no row"):
        right_of("GET", "/api/v1/something-new", "read")
    with pytest.raises(LookupError, match="public"):
        right_of("GET", "/api/v1/keys", None)
    assert resource_of("DELETE", "/api/v1/nodes/{id}") == "members"


def test_the_public_routes_are_these() -> None:
    """Reviewed: whoever adds one says why it tells nothing that anyone may not know."""
    mine = {"/healthz", "/readyz", "/health"}
    sign_in = {path for path in PUBLIC if path.startswith("/api/v1/auth/")}
    pages = {path for path in PUBLIC if path == "/" or path.startswith("/ui")}
    assert mine | sign_in | pages == PUBLIC
