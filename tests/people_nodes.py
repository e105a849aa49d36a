"""Two gateways with sign-in over one state, in a thread: a server, and a node without a vote that
passes on to it what only servers do."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import structlog

from ollama_distributed.access.desk import AccessDesk
from ollama_distributed.access.keys import make_admin_key
from ollama_distributed.access.passwords import Passwords
from ollama_distributed.access.people import People
from ollama_distributed.access.service import Authenticator
from ollama_distributed.adapters.coordination.memory import MemoryEngine
from ollama_distributed.base.clock import SystemClock
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.ports import Coordination
from ollama_distributed.cluster.tasks import end
from ollama_distributed.gateway.app import Gateway
from ollama_distributed.gateway.origins import SitePolicy
from ollama_distributed.node.oidc_settings import OidcSettings
from ollama_distributed.node.people import ops
from ollama_distributed.node.people.desk import Desk
from ollama_distributed.node.people.mirror import SharedPeople
from ollama_distributed.node.people.provider import ConfiguredProvider
from ollama_distributed.node.people.service import PeopleService
from ollama_distributed.node.people.signers import Signers
from ollama_distributed.testing.inference import ScriptedInference
from tests.access_world import MemoryBook
from tests.gateway_bench import HELLO, gateway, serving
from tests.limits import SOON_S

CLUSTER = "c1"


class _Hop:
    """The hop between the two: a door, and a pool that leads to it."""

    def __init__(self) -> None:
        self.asked: list[ops.Op] = []
        self._handlers: dict[str, Any] = {}

    def add(self, route: str, handler: Any, _body: type) -> None:
        self._handlers.setdefault(route, handler)  # the first one: the server's

    async def ask(self, _node: str, route: str, ask: ops.Ask, _answer: type, *, deadline_s: float) -> Any:
        assert deadline_s > 0
        self.asked.append(ask.op)
        return await self._handlers[route](SimpleNamespace(node="two"), ask)


class PeopleNodes:
    """`urls`: of the server, and of the node without a vote. `parts`: of their gateways."""

    def __init__(self, folder: Path, oidc: OidcSettings | None, **parts: Any) -> None:
        self.key, self._record = make_admin_key(0.0)
        self.urls: list[str] = []
        self.apps: list[Gateway] = []
        self.hop = _Hop()
        self._folder, self._oidc, self._parts = folder, oidc, parts
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        engine = MemoryEngine()
        async with AsyncExitStack() as stack:
            for name, is_server in (("one", True), ("two", False)):
                client = await stack.enter_async_context(await _client(engine, name))
                app = await self._node(name, client, stack, is_server=is_server)
                self.apps.append(app)
                server = await stack.enter_async_context(serving(app, adapter="fast"))
                self.urls.append(f"http://127.0.0.1:{server.port}")
            self._started.set()
            await self._stop.wait()

    async def _node(
        self, name: str, client: Coordination, stack: AsyncExitStack, *, is_server: bool
    ) -> Gateway:
        folder = self._folder / name
        folder.mkdir()
        clock = SystemClock()
        people = People(wall=clock.time)
        shared = SharedPeople(folder, people)
        shared.restore(CLUSTER)
        authenticator = Authenticator([self._record], require_key=False, wall=clock.time)
        authenticator.know(people)
        signers = Signers(folder, NodeId(name), people)
        follow = shared.follow(client, cluster=CLUSTER, removed=lambda _: False)
        stack.push_async_callback(end, [asyncio.create_task(follow)])
        if is_server:
            await signers.step(client, cluster=CLUSTER, now=clock.time())
        provider = None
        if self._oidc is not None and is_server:
            provider = ConfiguredProvider(self._oidc, clock)
            stack.push_async_callback(provider.aclose)

        async def link() -> Coordination:
            return client

        desk = Desk(
            shared,
            signers,
            authenticator,
            clock,
            link,
            passwords=Passwords(time_cost=1, memory_kib=8),
            provider=provider,
        )
        keeper: Any = SimpleNamespace(
            linked=_linked(is_server),
            state=SimpleNamespace(servers=(NodeId("one"),), nodes={}),
        )
        hop: Any = self.hop
        service = PeopleService(shared, desk, signers, keeper, pool=hop, door=hop, clock=clock)
        access = AccessDesk(
            MemoryBook(), authenticator, clock.time, node=NodeId(name), last_used=lambda _: None
        )
        parts = {"inference": ScriptedInference(HELLO), **self._parts}
        return gateway(
            authenticator=authenticator,
            access=access,
            people=service,
            policy=SitePolicy(hosts=["models.example"], origins=["https://ui.example"]),
            **parts,
        )

    def start(self) -> None:
        self._thread.start()
        assert self._started.wait(SOON_S)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(SOON_S)


async def _client(engine: MemoryEngine, name: str) -> Any:
    return engine.client(name)


def _linked(is_server: bool) -> Any:
    async def linked() -> tuple[Any, Any]:
        return SimpleNamespace(is_server=is_server, need_server=lambda: None), None

    return linked


@contextmanager
def people_nodes(folder: Path, oidc: OidcSettings | None = None, **parts: Any) -> Iterator[PeopleNodes]:
    nodes = PeopleNodes(folder, oidc, **parts)
    usual = structlog.get_config()
    # Commands under test print to the same stdout as the log.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    nodes.start()
    try:
        yield nodes
    finally:
        nodes.stop()
        structlog.configure(**usual)


_PROVIDER = """
import json, sys, threading
import oidc_provider_mock as provider

users = [provider.User(sub=sub, claims=claims) for sub, claims in json.loads(sys.argv[1]).items()]
with provider.run_server_in_thread(user_claims=users, require_nonce=True) as server:
    print(server.server_port, flush=True)
    sys.stdin.read()
"""


@contextmanager
def oidc_provider(**users: dict[str, object]) -> Iterator[str]:
    """A real OpenID Connect provider on loopback (its own forms, keys and checks); its issuer. `users`:
    their claims by subject."""
    command = [sys.executable, "-W", "ignore", "-c", _PROVIDER, json.dumps(users)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        yield f"http://localhost:{int(process.stdout.readline())}"
        process.kill()
