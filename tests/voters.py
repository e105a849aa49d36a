"""Voting servers of a throw-away cluster on loopback, each with its own folder and certificate."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TypeVar

import anyio

from ollama_distributed.adapters.coordination.nats.client import NatsCoordination
from ollama_distributed.adapters.coordination.nats.growth import Growth
from ollama_distributed.adapters.coordination.nats.seat import Formation
from ollama_distributed.adapters.coordination.nats.server import NatsServer
from ollama_distributed.adapters.coordination.nats.session import Address, Session
from ollama_distributed.adapters.coordination.nats.streams import Stream
from ollama_distributed.adapters.coordination.nats.system import System
from ollama_distributed.adapters.coordination.nats.voter import LocalVoter
from ollama_distributed.base.errors import Conflict, DeadlineExceeded, Unavailable
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.ports import ABSENT, Write
from tests.limits import SOON_S
from tests.trust import Trust

FOUNDER = "n1"
T = TypeVar("T")


class Voters:
    """`n1` founds and grows; the others are as on other machines. Close it in the end."""

    def __init__(self, folder: Path) -> None:
        self.trust = Trust(folder)
        self._hosts: dict[str, LocalVoter] = {}
        self.growth = self._growth()

    def _growth(self) -> Growth:
        return Growth(self[FOUNDER], cluster=self.trust.cluster, login=self.trust.login(FOUNDER))

    def __getitem__(self, name: str) -> LocalVoter:
        if name not in self._hosts:
            server = NatsServer(self.trust.folder / name, self.trust.access(name), name=name)
            self._hosts[name] = LocalVoter(
                server, advertise="127.0.0.1", route_host="127.0.0.1", port=0, route_port=0
            )
        return self._hosts[name]

    def hosts(self, *names: str) -> list[LocalVoter]:
        return [self[name] for name in names]

    def server(self, name: str) -> NatsServer:
        return self[name].server

    async def start(self, size: int = 1) -> None:
        """Found the cluster and grow it to `size`; `client` makes the bucket before."""
        self[FOUNDER].sit(alone=True)
        await self.growth.__aenter__()
        if size > 1:
            async with self.client(FOUNDER, create=True):
                pass
            await again(lambda: self.growth.to_three(self.hosts("n2", "n3")))
        if size == 5:
            await again(lambda: self.growth.to_five(self.hosts("n2", "n3"), self.hosts("n4", "n5")))

    async def restart(self) -> None:
        """As if the founder's node had ended and come back."""
        await self.growth.__aexit__(None, None, None)
        self.growth = self._growth()
        await self.growth.__aenter__()

    async def close(self) -> None:
        await self.growth.__aexit__(None, None, None)
        for host in self._hosts.values():
            await host.stop()

    @property
    def formation(self) -> Formation:
        found = self.growth.formation
        assert found is not None, "several voters"
        return found

    @property
    def urls(self) -> tuple[str, ...]:
        found = self.growth.formation
        return found.urls if found is not None else (self.server(FOUNDER).url,)

    def address(self, node: str) -> Address:
        return Address(urls=self.urls, login=self.trust.login(node))

    def client(self, node: str, *, create: bool = False) -> NatsCoordination:
        return NatsCoordination(self.address(node), name=node, create=create)

    # ── what they are, and harm ─────────────────────────────────────────────────────

    @property
    def system(self) -> System:
        return self.server(FOUNDER).system_at(self.urls)

    def stream(self) -> Stream:
        return Stream(self.address("looker"), name="looker")

    async def voting(self) -> set[str]:
        """Who votes now; waits while they elect."""
        with anyio.fail_after(SOON_S):
            while True:
                try:
                    return set(await self.system.voters())
                except Unavailable:
                    await anyio.sleep(0.05)

    async def leader(self, deadline_s: float = SOON_S) -> str:
        """Of the state's stream."""
        with anyio.fail_after(deadline_s):
            while True:
                try:
                    found = await self.stream().info()
                except Unavailable:
                    found = None
                if found is not None and found.leader:
                    return found.leader
                await anyio.sleep(0.02)

    def kill(self, name: str) -> None:
        """Its node starts it again at once."""
        os.kill(self.server(name).pid, signal.SIGKILL)

    async def lose(self, name: str) -> NodeId:
        """For good: the machine is gone."""
        host = self._hosts.pop(name)
        self.kill_quietly(host)
        await host.stop()
        return NodeId(name)

    @staticmethod
    def kill_quietly(host: LocalVoter) -> None:
        os.kill(host.server.pid, signal.SIGKILL)

    async def counts(self, names: Sequence[str]) -> list[tuple[int, int] | None]:
        """Messages and last sequence of each server's own replica."""
        found: list[tuple[int, int] | None] = []
        for name in names:
            replica = (await self.system.jetstream(name)).replica("KV_cfg")
            found.append(None if replica is None else (replica.messages, replica.last_seq))
        return found

    async def agree(self, names: Sequence[str], deadline_s: float = SOON_S) -> None:
        """Wait until every replica holds the same; nobody writes."""
        with anyio.fail_after(deadline_s):
            while True:
                try:
                    counts = await self.counts(names)
                except Unavailable:
                    counts = [None]
                if None not in counts and len(set(counts)) == 1:
                    return
                await anyio.sleep(0.05)


async def again(grow: Callable[[], Awaitable[T]]) -> T:
    """Once more if the voters stayed as they were, as nodes do: on a slow machine a replica may take
    longer than that waits."""
    try:
        return await grow()
    except Unavailable:
        return await grow()


async def ready(*clients: NatsCoordination) -> None:
    """Each is connected, has read the state, and lets writes through: each finds out for itself, and
    calls wait `REFUSAL_S` at most."""
    with anyio.fail_after(SOON_S):
        for client in clients:
            while True:
                with suppress(Unavailable):
                    await client.scan()
                    if client.connected and client.writable:
                        break
                await anyio.sleep(0.02)


async def written(client: NatsCoordination, key: str, value: bytes, *, revision: int = ABSENT) -> int:
    """Its revision, however long the voters elect. `value`: no other one like it is at the key."""
    with anyio.fail_after(SOON_S):
        while True:
            try:
                return await client.put(key, value, revision=revision)
            except (Unavailable, DeadlineExceeded):
                await anyio.sleep(0.05)
            except Conflict:  # an earlier attempt may have won
                entry = await client.get(key)
                if entry is None or entry.value != value:
                    raise
                return entry.revision


async def filled(client: NatsCoordination, writes: Sequence[Write]) -> None:
    """However slow the disks are. `writes`: whatever the keys stand at."""
    with anyio.fail_after(SOON_S):
        while True:
            try:
                await client.batch(writes)
            except (Unavailable, DeadlineExceeded):
                await anyio.sleep(0.05)
            else:
                return


async def refused(address: Address, name: str, why: str) -> bool:
    """Whether the servers there turn `name` away, saying `why`; a slow one is asked again."""
    with anyio.fail_after(SOON_S):
        while True:
            session = Session(address, name=name)
            try:
                await session.open(1.0)
            except Unavailable as said:
                if re.search(why, said.message):
                    return True
            else:
                return False
            finally:
                await session.close()


@asynccontextmanager
async def voters(folder: Path, size: int = 1) -> AsyncIterator[Voters]:
    made = Voters(folder)
    try:
        await made.start(size)
        yield made
    finally:
        with anyio.CancelScope(shield=True):
            await made.close()
