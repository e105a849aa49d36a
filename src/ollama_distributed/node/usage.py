"""What this node's gateway counted: into the ledger within a second, to keepers within some, and the
answer to who asks for all of the cluster.

Every answer is counted once, where its stream was: at the gateway that the client spoke to. The
ledger is on this node's disk; servers keep copies, so that a node that is away is still counted.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import anyio
import msgspec
import structlog

from ollama_distributed.access.metering import SYNC_S, TOP_UP_EVERY_S, BorrowAsk, Borrowed, Meter, Ticket
from ollama_distributed.access.quotas import holders_of
from ollama_distributed.access.usage import (
    DAY_S,
    HOUR_S,
    Book,
    Group,
    Price,
    add_request,
    day_text,
    energy_row,
    grouped,
    merged,
    model_label,
    month_of,
    price_of,
    shown,
)
from ollama_distributed.adapters.hardware.energy import EnergyMeter
from ollama_distributed.adapters.hardware.gpus import open_nvml
from ollama_distributed.adapters.ledger.files import Batch, Copies, LedgerFiles, Summed
from ollama_distributed.adapters.peers.usage import (
    Counted,
    Counts,
    KeepAsk,
    Kept,
    UsageAsk,
)
from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import DiskFull, OllamaDistributedError
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.inference import InferenceRequest, Usage
from ollama_distributed.base.usage import By, Doubt, Row, RowKey, Sums, UsageAnswer, UsageFigures
from ollama_distributed.cluster.loops import keep_going
from ollama_distributed.cluster.tasks import end
from ollama_distributed.gateway.metering import Need
from ollama_distributed.gateway.summary import Summary
from ollama_distributed.node.settings import Settings
from ollama_distributed.state.cluster import ClusterState

log = structlog.get_logger("usage")

NOT_WRITTEN, COPY_UNREADABLE = "usage.not_written", "usage.copy_unreadable"
FLUSH_S = 0.5
"""At most so long, and the disk's own time, what was counted is only in memory."""
MEASURE_S = 1.0
KEEP_S = 3.0
COPIES_S = 20.0
"""Copies are written down so often; they are sent again if lost."""
MOST_ASKED = 32
"""In a larger cluster only servers are asked: they keep copies of the others'."""
KEEPERS = 3
CONTEXT_TOKENS = 4096
"""As serving has it where nothing says otherwise."""
INLINE_ROWS = 2_000
"""Grouping them takes 4 ms; more are grouped in a thread."""
OFFLINE_KEEPS_S = 300.0
"""A node that is offline holds its shares so long: it may live and only be cut off."""


class Exchange(Protocol):
    """`adapters.peers.usage.UsageExchange`."""

    async def borrow(self, node: NodeId, ask: BorrowAsk) -> Borrowed: ...

    async def keep(self, node: NodeId, ask: KeepAsk) -> Kept: ...

    async def counts(self, node: NodeId, ask: UsageAsk) -> Counts: ...


class _Copy(msgspec.Struct):
    """Of another node's ledger."""

    name: str
    book: Book
    doubts: tuple[Doubt, ...] = ()
    dirty: bool = False


class _Gateways:
    """Implements `access.metering.Gateways` from the state."""

    def __init__(self, me: NodeId, state: Callable[[], ClusterState], wall: Callable[[], float]) -> None:
        self._me = me
        self._state = state
        self._wall = wall
        self._seen: tuple[ClusterState | None, int] = (None, 0)
        self._holders: tuple[NodeId, ...] = (me,)

    def holders(self) -> tuple[NodeId, ...]:
        state, now = self._state(), self._wall()
        seen = (state, int(now // 10.0))
        if seen[0] is not self._seen[0] or seen[1] != self._seen[1]:
            self._seen = seen
            there = [
                node.id
                for node in state.nodes.values()
                if node.alive or (node.member is not None and now - node.member.since < OFFLINE_KEEPS_S)
            ]
            servers = [node for node in state.servers if node in there]
            found = holders_of(servers, [node for node in there if node not in servers]) or (self._me,)
            if found != self._holders:
                self._holders = found
        return self._holders

    def living(self, nodes: Sequence[NodeId]) -> Sequence[NodeId]:
        known = self._state().nodes
        return [node for node in nodes if node in known and known[node].alive]


class NodeUsage:
    """Implements `access.metering.Months`, and `gateway.usage_port.UsageDesk`."""

    def __init__(
        self,
        settings: Settings,
        me: NodeId,
        exchange: Exchange,
        *,
        folder: Path,
        state: Callable[[], ClusterState],
        clock: Clock,
        busy: Callable[[], bool],
        energy: Callable[[], float | None],
        parameters: Callable[[str], Mapping[str, Any]],
    ) -> None:
        """`busy`: whether an engine works now; `energy`: joules since the last call, blocking;
        `parameters`: a model's own, as far as this node has it."""
        self._settings = settings
        self._prices = prices_of(settings)
        self._me = me
        self._name = settings.name
        self._exchange = exchange
        self._state = state
        self._clock = clock
        self._busy = busy
        self._energy = energy
        self._parameters = parameters
        self._files = LedgerFiles(folder, me)
        self._copied = Copies(folder / "copies")
        self._disk = asyncio.Lock()
        self._ledger = ""
        self._book = Book()
        self._doubts: tuple[Doubt, ...] = ()
        self._pending: dict[RowKey, Sums] = {}
        self._writing: dict[RowKey, Sums] = {}
        self._copies: dict[str, _Copy] = {}
        self._kept_by: dict[NodeId, int] = {}
        self._measured_at = clock.monotonic()
        self._counting: dict[tuple[int, str, str, str, str], tuple[Sums, Price]] = {}
        """What is pending, by what a request says of itself."""
        self.failing = False
        """The disk refuses what was counted."""
        self.meter = Meter(me, _Gateways(me, state, clock.time), exchange, self, clock.time)

    def use(self, settings: Settings) -> None:
        """From now on."""
        self._settings, self._prices = settings, prices_of(settings)
        self._counting.clear()

    # ── what is counted ─────────────────────────────────────────────────────────────

    def count(self, summary: Summary) -> None:
        """A request for inference ended. Never raises, never waits."""
        at, usage = int(self._clock.time()), summary.usage
        who = summary.key_id or (f"user:{summary.user}" if summary.user else summary.role)
        # Of a model that there is: what clients make up would fill the ledger.
        there = summary.status < 400 or summary.status >= 500 or (usage and usage.prompt_tokens)
        asked = summary.model if there else ""
        row = (at // HOUR_S, who, summary.team, asked, summary.node)
        found = self._counting.get(row)
        if found is None:
            label = model_label(asked) if asked else ""
            key = RowKey(at // HOUR_S * HOUR_S, who, summary.team, label, summary.node or self._name)
            sums = self._pending.setdefault(key, Sums())
            found = self._counting[row] = (sums, price_of(self._prices, label))
        add_request(*found, summary.outcome, usage)

    # ── limits ──────────────────────────────────────────────────────────────────────

    def longest(self, request: InferenceRequest) -> int:
        parameters = self._parameters(request.model)
        own = parameters.get("num_predict")
        if isinstance(own, int) and own > 0:
            return own
        context = request.options.num_ctx or parameters.get("num_ctx") or self._settings.context_length
        return int(context or CONTEXT_TOKENS)

    def admit(self, identity: Identity, need: Need) -> Ticket | None:
        return self.meter.admit(identity, need.amounts, self._cost(need))

    async def borrow(self, identity: Identity, need: Need) -> Ticket:
        return await self.meter.borrow(identity, need.amounts, self._cost(need))

    def _cost(self, need: Need) -> float:
        """At most."""
        price = price_of(self._prices, model_label(need.model))
        return price.cost(Usage(prompt_tokens=need.prompt_tokens, completion_tokens=need.answer_tokens))

    def figures(self) -> UsageFigures:
        return UsageFigures(
            rows=len(self._book),
            copies=len(self._copies),
            failing=self.failing,
            limited=self.meter.accounts,
            refused=self.meter.refused,
            borrowed=self.meter.borrowed,
        )

    # ── of the month ────────────────────────────────────────────────────────────────

    def own(self, at: float, *, key: str, team: str) -> Sums:
        found = Sums()
        found.add(self._book.month(at, key=key, team=team))
        for rows in (self._pending, self._writing):
            for row, sums in rows.items():
                if row.key == key if key else row.team == team:
                    found.add(sums)
        return found

    async def others(self, at: float, *, key: str, team: str) -> Sums:
        first, following = month_of(at // 60.0 * 60.0)
        ledgers, _ = await self._gather(UsageAsk(by=(), start=first, end=following, key=key, team=team))
        found = Sums()
        for ledger in ledgers:
            for group in ledger.groups:
                found.add(group.sums)
        return found

    def _add(self, key: RowKey, sums: Sums) -> None:
        held = self._pending.get(key)
        if held is None:
            self._pending[key] = sums
        else:
            held.add(sums)

    # ── the ledger ──────────────────────────────────────────────────────────────────

    async def open(self) -> None:
        """
        Raises:
            DiskFull
        """
        opened = await asyncio.to_thread(self._files.open, self._clock.time())
        self._ledger, self._doubts = opened.ledger, opened.doubts
        self._book.enter(opened.summed.batch, opened.summed.rows)
        for batch in opened.batches:
            self._book.enter(batch.number, batch.rows)
        if opened.batches:
            await self._sum_up()
        await self._write(())
        for data in await asyncio.to_thread(self._copied.read):
            try:
                kept = msgspec.msgpack.decode(data, type=KeepAsk)
            except msgspec.MsgspecError as damaged:
                log.warning(COPY_UNREADABLE, reason=str(damaged))
                continue
            self.keep(msgspec.structs.replace(kept, since=0))

    async def flush(self) -> None:
        """Write down what was counted."""
        async with self._disk:
            if not self._pending:
                return
            self._writing, self._pending = self._pending, {}
            self._counting.clear()
            rows = tuple(Row(key, sums) for key, sums in self._writing.items())
            try:
                await self._write(rows)
            except DiskFull as full:
                if not self.failing:
                    log.warning(NOT_WRITTEN, reason=full.message)
                self.failing = True
                for row in rows:
                    self._add(row.key, row.sums)
            else:
                self.failing = False
            finally:
                self._writing = {}
            if self._files.large:
                await self._sum_up()

    async def _write(self, rows: tuple[Row, ...], *, closed: bool = False) -> None:
        batch = Batch(number=self._book.batch + 1, at=self._clock.time(), rows=rows, closed=closed)
        with anyio.CancelScope(shield=True):
            await asyncio.to_thread(self._files.append, batch)
            self._book.enter(batch.number, batch.rows)

    async def _sum_up(self) -> None:
        now = self._clock.time()
        self._book.fold(now - self._settings.usage_hours_kept, now - self._settings.usage_kept)
        summed = Summed(batch=self._book.batch, rows=tuple(self._book.rows()), doubts=self._doubts)
        with anyio.CancelScope(shield=True):
            await asyncio.to_thread(self._files.sum_up, summed)

    async def close(self) -> None:
        await self.flush()
        try:
            await self._write((), closed=True)
        except DiskFull as full:
            log.warning(NOT_WRITTEN, reason=full.message)
        await self._save_copies()
        await asyncio.to_thread(self._files.close)

    async def measure(self) -> None:
        """What this node drew since the last time, if it worked."""
        now = self._clock.monotonic()
        took_s, self._measured_at = now - self._measured_at, now
        measured = await asyncio.to_thread(self._energy)
        if not self._busy():
            return
        joules = measured if measured is not None else self._settings.power_watts * took_s
        if joules:
            self._add(energy_row(self._clock.time(), self._name), Sums(joules=joules))

    # ── copies ──────────────────────────────────────────────────────────────────────

    def keep(self, ask: KeepAsk) -> Kept:
        """Keep a copy of another node's ledger."""
        copy = self._copies.get(ask.ledger)
        if copy is None:
            copy = self._copies[ask.ledger] = _Copy(name=ask.name, book=Book())
        if ask.since <= copy.book.batch < ask.batch or ask.doubts != copy.doubts:
            if ask.since <= copy.book.batch:
                copy.book.replace(ask.batch, ask.rows)
            copy.name, copy.doubts, copy.dirty = ask.name, ask.doubts, True
        return Kept(batch=copy.book.batch)

    async def send_copies(self) -> None:
        """Have keepers take what changed since they did last."""
        for node in self._keepers():
            since = self._kept_by.get(node, 0)
            for _ in range(2):  # the second time from where it really is
                if since == self._book.batch:
                    break
                ask = KeepAsk(
                    ledger=self._ledger,
                    name=self._name,
                    since=since,
                    batch=self._book.batch,
                    rows=self._book.since(since),
                    doubts=self._doubts,
                )
                try:
                    since = (await self._exchange.keep(node, ask)).batch
                except OllamaDistributedError as away:
                    log.debug("usage.not_kept", node=node, reason=away.message)
                    break
                self._kept_by[node] = since

    def _keepers(self) -> list[NodeId]:
        state = self._state()
        servers = [node for node in state.servers if node != self._me and state.nodes[node].alive]
        return sorted(servers, key=lambda node: _rank(self._ledger, node))[:KEEPERS]

    async def _save_copies(self) -> None:
        for ledger, copy in list(self._copies.items()):
            if not copy.dirty:
                continue
            copy.dirty = False
            whole = KeepAsk(
                ledger=ledger,
                name=copy.name,
                since=0,
                batch=copy.book.batch,
                rows=copy.book.since(0),
                doubts=copy.doubts,
            )
            data = msgspec.msgpack.encode(whole)
            try:
                await asyncio.to_thread(self._copied.write, ledger, data)
            except DiskFull as full:
                copy.dirty = True
                log.warning(NOT_WRITTEN, reason=full.message)
                return

    # ── questions ───────────────────────────────────────────────────────────────────

    def lend(self, to: NodeId, ask: BorrowAsk) -> Borrowed:
        return self.meter.lend(to, ask)

    async def counts(self, ask: UsageAsk) -> Counts:
        """This node's own ledger, and copies."""
        await self.flush()
        own = await self._counted(self._ledger, self._name, self._book, self._doubts, ask)
        copies = [
            await self._counted(ledger, copy.name, copy.book, copy.doubts, ask)
            for ledger, copy in list(self._copies.items())
        ]
        return Counts(ledgers=(own, *copies))

    async def _counted(
        self, ledger: str, name: str, book: Book, doubts: tuple[Doubt, ...], ask: UsageAsk
    ) -> Counted:
        rows = book.rows()
        work = partial(grouped, rows, ask.by, ask.start, ask.end, key=ask.key, team=ask.team)
        groups = work() if len(book) <= INLINE_ROWS else await asyncio.to_thread(work)
        told = tuple(
            msgspec.structs.replace(doubt, node=name) for doubt in doubts if ask.start <= doubt.at < ask.end
        )
        return Counted(ledger=ledger, name=name, batch=book.batch, groups=groups, doubts=told)

    async def _gather(self, ask: UsageAsk) -> tuple[list[Counted], list[str]]:
        """What all others counted, the newest of each ledger; and the names of who did not answer."""
        state = self._state()
        nodes = [node for node in state.nodes.values() if node.alive and node.id != self._me]
        if len(nodes) > MOST_ASKED:
            nodes = [node for node in nodes if node.id in state.servers]
        found: dict[str, Counted] = {}
        missing: list[str] = []

        async def one(node: NodeId, name: str) -> None:
            try:
                answer = await self._exchange.counts(node, ask)
            except OllamaDistributedError as away:
                log.debug("usage.not_answered", node=node, reason=away.message)
                missing.append(name)
                return
            for counted in answer.ledgers:
                take(counted)

        def take(counted: Counted) -> None:
            held = found.get(counted.ledger)
            if counted.ledger != self._ledger and (held is None or held.batch < counted.batch):
                found[counted.ledger] = counted

        for ledger, copy in list(self._copies.items()):
            take(await self._counted(ledger, copy.name, copy.book, copy.doubts, ask))
        async with asyncio.TaskGroup() as asking:
            for node in nodes:
                asking.create_task(one(node.id, node.name))
        return list(found.values()), sorted(missing)

    async def usage(
        self, by: Sequence[By], start: float, end: float, *, key: str = "", team: str = ""
    ) -> UsageAnswer:
        """Of the whole cluster, from `start` until before `end`."""
        ask = UsageAsk(by=tuple(by), start=start, end=end, key=key, team=team)
        await self.flush()
        own = await self._counted(self._ledger, self._name, self._book, self._doubts, ask)
        others, missing = await self._gather(ask)
        ledgers = [own, *others]
        price = self._settings.kwh_price
        groups = merged(one.groups for one in ledgers)
        total = Sums()
        for group in groups:
            total.add(group.sums)
        return UsageAnswer(
            start=day_text(start),
            end=day_text(end - DAY_S / 2),
            by=ask.by,
            rows=tuple(shown(group, ask.by, price) for group in groups) if by else (),
            total=shown(Group((), total), (), price),
            currency=self._settings.currency,
            in_doubt=tuple(sorted((d for one in ledgers for d in one.doubts), key=lambda d: d.at)),
            missing=tuple(missing),
        )

    # ── life ────────────────────────────────────────────────────────────────────────

    async def write_down(self) -> None:
        await anyio.sleep(FLUSH_S)
        await self.flush()

    async def measure_energy(self) -> None:
        await anyio.sleep(MEASURE_S)
        await self.measure()

    async def share_quotas(self) -> None:
        await anyio.sleep(TOP_UP_EVERY_S)
        await self.meter.step()

    async def follow_months(self) -> None:
        await anyio.sleep(SYNC_S)
        await self.meter.sync_months()

    async def keep_copies(self) -> None:
        await anyio.sleep(KEEP_S)
        await self.send_copies()

    async def save_copies(self) -> None:
        await anyio.sleep(COPIES_S)
        await self._save_copies()


@asynccontextmanager
async def usage_of(
    settings: Settings,
    me: NodeId,
    exchange: Exchange,
    *,
    state: Callable[[], ClusterState],
    clock: Clock,
    busy: Callable[[], bool],
    parameters: Callable[[str], Mapping[str, Any]],
) -> AsyncIterator[NodeUsage]:
    """While it is open, what is counted is written down and given to keepers.

    Raises:
        DiskFull: the ledger cannot be written.
    """
    meter = await asyncio.to_thread(lambda: EnergyMeter(open_nvml()))
    usage = NodeUsage(
        settings,
        me,
        exchange,
        folder=settings.data_dir / "usage",
        state=state,
        clock=clock,
        busy=busy,
        energy=meter.read,
        parameters=parameters,
    )
    await usage.open()
    chance = random.Random()  # noqa: S311  # jitter
    tasks = [
        asyncio.create_task(keep_going(name, step, chance), name=name)
        for name, step in (
            ("usage ledger", usage.write_down),
            ("usage energy", usage.measure_energy),
            ("usage copies", usage.keep_copies),
            ("usage copies on disk", usage.save_copies),
            ("quotas", usage.share_quotas),
            ("months", usage.follow_months),
        )
    ]
    try:
        yield usage
    finally:
        await end(tasks)
        await usage.close()


def prices_of(settings: Settings) -> Mapping[str, Price]:
    return {glob: msgspec.convert(price, Price) for glob, price in settings.prices.items()}


def _rank(ledger: str, node: NodeId) -> bytes:
    """Rendezvous hashing: keepers stay the same when others come and go."""
    return hashlib.blake2b(f"{ledger}/{node}".encode(), digest_size=8).digest()
