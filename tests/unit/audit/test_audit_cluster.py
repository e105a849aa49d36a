"""Chains of several nodes, read and checked at one of them; copies speak for a node that is away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.unit.audit.test_audit_log import Clock, entry

from ollama_distributed.access.audit.cluster import ClusterAudit
from ollama_distributed.access.audit.copies import Copies
from ollama_distributed.access.audit.log import AuditLog
from ollama_distributed.access.audit.ports import (
    CheckAnswer,
    CheckAsk,
    PageAnswer,
    PageAsk,
    TakeAnswer,
    TakeAsk,
)
from ollama_distributed.adapters.audit.disk import AuditDisk
from ollama_distributed.base.audit import AuditFilter, VerifyAnswer
from ollama_distributed.base.errors import Unavailable
from ollama_distributed.base.ids import NodeId

DEADLINE_S = 30.0


class World:
    """Three servers, joined without a network. Also the way of each to the others."""

    def __init__(self, root: Path) -> None:
        self.away: set[str] = set()
        self.dead: set[str] = set()
        clock = Clock()
        names = ("n1", "n2", "n3")
        self.disks = {name: AuditDisk(root / name) for name in names}
        self.logs = {name: AuditLog(NodeId(name), self.disks[name], clock) for name in names}
        self.audits = {
            name: ClusterAudit(self.logs[name], self.disks[name], self, name, self.state)  # type: ignore[arg-type]
            for name in names
        }
        self.copies = {
            name: Copies(self.logs[name], self.disks[name], _As(self, name), self.state)  # type: ignore[arg-type]
            for name in names
        }

    def state(self) -> Any:
        server = SimpleNamespace(role="server")
        return SimpleNamespace(
            nodes={
                NodeId(name): SimpleNamespace(
                    id=NodeId(name), name=name, alive=name not in self.dead, advert=server
                )
                for name in self.disks
            },
            resolve=NodeId,
        )

    async def page(self, node: NodeId, ask: PageAsk) -> PageAnswer:
        return await self._reached(node, lambda: self.audits[node].page_here(ask))

    async def check(self, node: NodeId, ask: CheckAsk) -> CheckAnswer:
        return await self._reached(node, lambda: self.audits[node].check_here(ask))

    async def _reached(self, node: NodeId, ask: Callable[[], Awaitable[Any]]) -> Any:
        if node in self.away | self.dead:
            raise Unavailable("no answer")
        return await ask()

    async def copied(self, source: str) -> None:
        """Until both others have all of a node's records."""
        task = asyncio.create_task(self.copies[source].run())
        want = await self.disks[source].head(source)
        try:
            async with asyncio.timeout(DEADLINE_S):
                for name, disk in self.disks.items():
                    while name != source and await disk.head(source) != want:
                        await asyncio.sleep(0.005)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def verified(self) -> VerifyAnswer:
        return await self.audits["n2"].verify()


class _As:
    """The way of one node to the others: they know who asks."""

    def __init__(self, world: World, name: str) -> None:
        self._world = world
        self._name = NodeId(name)

    async def take(self, node: NodeId, ask: TakeAsk) -> TakeAnswer:
        return await self._world.copies[node].take(self._name, ask)


async def test_a_node_that_is_away_is_spoken_for(tmp_path: Path) -> None:
    world = World(tmp_path)
    for number in range(4):
        await world.logs["n1"].write(entry(number))
        await world.logs["n3"].write(entry(number))
    await world.copied("n1")
    page = await world.audits["n2"].page(AuditFilter(limit=5))
    assert [(one.node, one.seq) for one in page.records] == [
        ("n3", 4), ("n1", 4), ("n3", 3), ("n1", 3), ("n3", 2),
    ]  # fmt: skip
    for gone in (world.away, world.dead):
        gone.add("n1")
        page = await world.audits["n2"].page(AuditFilter(node="n1"))
        assert ([one.seq for one in page.records], page.away) == ([4, 3, 2, 1], ())
        page = await world.audits["n2"].page(AuditFilter())
        assert (len(page.records), page.away) == (8, ())
    world.away.add("n3")
    assert (await world.audits["n2"].page(AuditFilter())).away == ("n3",), "of it nobody has a copy"


async def test_a_chain_made_anew_is_found_by_its_copies(tmp_path: Path) -> None:
    world = World(tmp_path)
    for number in range(4):
        await world.logs["n1"].write(entry(number))
    await world.copied("n1")
    assert (await world.verified()).ok
    for file in (tmp_path / "n1").iterdir():
        file.unlink()
    forger = AuditLog(NodeId("n1"), world.disks["n1"], Clock())
    for number in range(6):
        await forger.write(entry(number, detail="another story"))
    answer = await world.verified()
    assert not answer.ok
    (bad,) = [report for report in answer.chains if report.fault]
    assert (bad.node, bad.at, bad.fault_seq) == ("n1", "n1", 4)
    world.dead.add("n1")
    answer = await world.verified()
    assert (answer.ok, answer.away) == (True, ("n1",)), "the copies are whole"
