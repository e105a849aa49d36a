"""The chains of all nodes, read and checked at any node."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

import msgspec

from ollama_distributed.access.audit.log import AuditLog
from ollama_distributed.access.audit.ports import (
    ChainDisk,
    CheckAnswer,
    CheckAsk,
    Others,
    PageAnswer,
    PageAsk,
)
from ollama_distributed.base.audit import (
    AuditEntry,
    AuditFilter,
    AuditPage,
    AuditRecord,
    ChainReport,
    VerifyAnswer,
)
from ollama_distributed.base.errors import DeadlineExceeded, NotFound, Unavailable
from ollama_distributed.base.ids import NodeId
from ollama_distributed.state.cluster import ClusterState

AT_ONCE = 32

T = TypeVar("T")


class ClusterAudit:
    """What the gateway asks of the audit log."""

    def __init__(
        self, own: AuditLog, disk: ChainDisk, others: Others, name: str, state: Callable[[], ClusterState]
    ) -> None:
        self._own = own
        self._disk = disk
        self._others = others
        self._name = name
        self._state = state

    async def write(self, entry: AuditEntry) -> None:
        await self._own.write(entry)

    def note(self, entry: AuditEntry) -> None:
        self._own.note(entry)

    def refused(self, entry: AuditEntry) -> None:
        self._own.refused(entry)

    async def page(self, wanted: AuditFilter) -> AuditPage:
        state = self._state()
        if wanted.node and wanted.node != self._own.node:
            wanted = msgspec.structs.replace(wanted, node=state.resolve(wanted.node))
        gone = [node.id for node in state.nodes.values() if not node.alive]
        answers, away = await self._pages(PageAsk(wanted=wanted, copies=tuple(gone)))
        if away:  # more are gone than was known: who has copies of theirs?
            gone += away
            answers, away = await self._pages(PageAsk(wanted=wanted, copies=tuple(gone)))
        copied = {node for answer in answers for node in answer.copies}
        found: dict[tuple[str, int], AuditRecord] = {}
        for answer in answers:
            for record in answer.records:
                found.setdefault((record.node, record.seq), record)
        rows = sorted(found.values(), key=lambda record: (record.at, record.node, record.seq), reverse=True)
        shown = tuple(rows[: wanted.limit])
        more = len(rows) > wanted.limit
        return AuditPage(
            records=shown,
            next=f"{shown[-1].at!r}:{shown[-1].node}:{shown[-1].seq}" if more else None,
            away=self._names(node for node in {*gone, *away} if node not in copied),
        )

    async def _pages(self, ask: PageAsk) -> tuple[Sequence[PageAnswer], Sequence[NodeId]]:
        return await self._all(self.page_here(ask), lambda node: self._others.page(node, ask))

    async def page_here(self, ask: PageAsk) -> PageAnswer:
        """This node's own chain, and its copies of those that are away."""
        here = [node for node in await self._disk.nodes() if node in ask.copies]
        records = await self._disk.page([self._own.node, *here], ask.wanted)
        return PageAnswer(records=tuple(records), copies=tuple(here))

    async def verify(self) -> VerifyAnswer:
        """Every chain and every copy, from the first record to the last; and each against its copies."""
        copies, away = await self._all(
            self.check_here(CheckAsk(own=False)),
            lambda node: self._others.check(node, CheckAsk(own=False)),
        )
        reports = [report for answer in copies for report in answer.chains]

        def ask(node: str) -> CheckAsk:
            return CheckAsk(
                own=True,
                expect={str(one.records): one.head for one in reports if one.node == node and one.records},
            )

        own, away_too = await self._all(
            self.check_here(ask(self._own.node)), lambda node: self._others.check(node, ask(node))
        )
        chains = [*(report for answer in own for report in answer.chains), *reports]
        chains.sort(key=lambda report: (report.name, report.name != report.at, report.at))
        gone = [node.id for node in self._state().nodes.values() if not node.alive]
        return VerifyAnswer(
            ok=not any(report.fault for report in chains),
            chains=tuple(chains),
            away=self._names({*away, *away_too, *gone}),
        )

    async def check_here(self, ask: CheckAsk) -> CheckAnswer:
        if ask.own:
            expect = {int(seq): known for seq, known in ask.expect.items() if seq.isdigit()}
            return CheckAnswer(chains=(await self._report(self._own.node, expect, None),))
        others = [node for node in await self._disk.nodes() if node != self._own.node]
        due_before = self._own.due_before
        return CheckAnswer(chains=tuple([await self._report(node, {}, due_before) for node in others]))

    async def _report(self, node: str, expect: dict[int, str], due_before: float | None) -> ChainReport:
        checked = await self._disk.check(node, expect, due_before)
        return ChainReport(
            node=node,
            name=self._named(node),
            at=self._name,
            first=checked.first,
            records=checked.head.seq,
            head=checked.head.hash,
            fault=checked.fault,
            fault_seq=checked.fault_seq,
        )

    def _named(self, node: str) -> str:
        if node == self._own.node:
            return self._name
        known = self._state().nodes.get(NodeId(node))
        return known.name if known is not None else node

    def _names(self, nodes: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted({self._named(node) for node in nodes}))

    async def _all(
        self, own: Awaitable[T], ask: Callable[[NodeId], Awaitable[T]]
    ) -> tuple[Sequence[T], Sequence[NodeId]]:
        """The answers of all living nodes, this one's first; and who gave none."""
        away: list[NodeId] = []
        turns = asyncio.Semaphore(AT_ONCE)

        async def one(node: NodeId) -> T | None:
            try:
                async with turns:
                    return await ask(node)
            except (Unavailable, DeadlineExceeded, NotFound):
                away.append(node)
                return None

        living = [one.id for one in self._state().nodes.values() if one.alive and one.id != self._own.node]
        first = await own
        rest = await asyncio.gather(*map(one, living))
        return [first, *(answer for answer in rest if answer is not None)], away
