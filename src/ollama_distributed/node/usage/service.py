"""What this node's gateway counted, and the answer to who asks for all of the cluster.

Every answer is counted once, where its stream was: at the gateway that the client spoke to. The
ledger is on this node's disk; servers keep copies, so that a node that is away is still counted.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import anyio
import msgspec
import structlog

from ollama_distributed.access.metering import SYNC_S, TOP_UP_EVERY_S, BorrowAsk, Borrowed, Meter, Ticket
from ollama_distributed.access.remaining import LOOK_S, LeftAsk, LeftTold
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
from ollama_distributed.adapters.peers.usage import Counted, Counts, KeepAsk, Kept, UsageAsk
from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import OllamaDistributedError, Unavailable
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.inference import InferenceRequest, Usage
from ollama_distributed.base.usage import By, Doubt, Row, RowKey, Sums, UsageAnswer, UsageFigures
from ollama_distributed.cluster.loops import keep_going
from ollama_distributed.cluster.tasks import end
from ollama_distributed.gateway.metering import Need
from ollama_distributed.gateway.summary import Summary
from ollama_distributed.node.settings import Settings
from ollama_distributed.node.usage import ledger as ledgers
from ollama_distributed.node.usage.copies import KeptCopies
from ollama_distributed.node.usage.gateways import Gateways
from ollama_distributed.node.usage.ledger import Ledger
from ollama_distributed.state.cluster import ClusterState

log = structlog.get_logger("usage")

FLUSH_S = 0.5
"""At most so long, and the disk's own time, what was counted is only in memory."""
MEASURE_S, COPY_S, SAVE_S = 1.0, 3.0, 20.0
MOST_ASKED = 32
"""In a larger cluster only servers are asked: they keep copies of the others'."""
CONTEXT_TOKENS = 4096
"""As serving has it where nothing says otherwise."""
INLINE_ROWS = 2_000
"""Grouping them takes 4 ms; more are grouped in a thread."""


class Exchange(Protocol):
    """`adapters.peers.usage.UsageExchange`."""

    async def borrow(self, node: NodeId, ask: BorrowAsk) -> Borrowed: ...

    async def left(self, node: NodeId, ask: LeftAsk) -> LeftTold: ...

    async def keep(self, node: NodeId, ask: KeepAsk) -> Kept: ...

    async def counts(self, node: NodeId, ask: UsageAsk) -> Counts: ...


class NodeUsage:
    """Implements `access.metering.Months`, `adapters.peers.usage.Here` and
    `gateway.usage_port.UsageDesk`."""

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
        self._measured_at = clock.monotonic()
        self._ledger = Ledger(folder, me, clock, self._kept)
        self._counted_in: dict[RowKey, Sums] = {}
        self._counting: dict[tuple[int, str, str, str, str], tuple[Sums, Price]] = {}
        """What is pending, by what a request says of itself."""
        self.copies = KeptCopies(
            folder / "copies", me, settings.name, self._ledger, exchange, state, clock.time
        )
        self.meter = Meter(me, Gateways(me, state, clock.time), exchange, self, clock.time)

    def use(self, settings: Settings) -> None:
        """From now on."""
        self._settings, self._prices = settings, prices_of(settings)
        self._counting.clear()

    def _kept(self) -> ledgers.Kept:
        return ledgers.Kept(self._settings.usage_hours_kept, self._settings.usage_kept)

    async def open(self) -> None:
        """
        Raises:
            DiskFull
        """
        await self._ledger.open()
        await self.copies.open()

    async def flush(self) -> None:
        await self._ledger.flush()

    async def close(self) -> None:
        await self._ledger.close()
        await self.copies.save()

    # ── what is counted ─────────────────────────────────────────────────────────────

    def count(self, summary: Summary) -> None:
        """A request for inference ended. Never raises, never waits."""
        at, usage = int(self._clock.time()), summary.usage
        who = summary.key_id or (f"user:{summary.user}" if summary.user else summary.role)
        # Of a model that there is: what clients make up would fill the ledger.
        there = summary.status < 400 or summary.status >= 500 or (usage and usage.prompt_tokens)
        asked = summary.model if there else ""
        row = (at // HOUR_S, who, summary.team, asked, summary.node)
        if self._counted_in is not self._ledger.pending:
            self._counted_in = self._ledger.pending
            self._counting.clear()
        found = self._counting.get(row)
        if found is None:
            label = model_label(asked) if asked else ""
            key = RowKey(at // HOUR_S * HOUR_S, who, summary.team, label, summary.node or self._name)
            sums = self._counted_in.setdefault(key, Sums())
            found = self._counting[row] = (sums, price_of(self._prices, label))
        add_request(*found, summary.outcome, usage)

    async def measure(self) -> None:
        """What this node drew since the last time, if it worked."""
        now = self._clock.monotonic()
        took_s, self._measured_at = now - self._measured_at, now
        measured = await asyncio.to_thread(self._energy)
        if not self._busy():
            return
        joules = measured if measured is not None else self._settings.power_watts * took_s
        if joules:
            self._ledger.add(energy_row(self._clock.time(), self._name), Sums(joules=joules))

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
            rows=len(self._ledger.book),
            copies=len(self.copies),
            failing=self._ledger.failing,
            limited=self.meter.accounts,
            refused=self.meter.refused,
            borrowed=self.meter.borrowed,
        )

    # ── of the month ────────────────────────────────────────────────────────────────

    def own(self, at: float, *, key: str, team: str) -> Sums:
        return self._ledger.month(at, key=key, team=team)

    async def others(self, at: float, *, key: str, team: str) -> Sums:
        first, following = month_of(at // 60.0 * 60.0)
        ledgers, missing = await self._gather(UsageAsk(by=(), start=first, end=following, key=key, team=team))
        if missing:
            raise Unavailable(f"{', '.join(missing)} did not answer")
        found = Sums()
        for ledger in ledgers:
            for group in ledger.groups:
                found.add(group.sums)
        return found

    # ── questions ───────────────────────────────────────────────────────────────────

    def keep(self, ask: KeepAsk) -> Kept:
        return self.copies.keep(ask)

    def lend(self, to: NodeId, ask: BorrowAsk) -> Borrowed:
        return self.meter.lend(to, ask)

    def left(self, ask: LeftAsk) -> LeftTold:
        return self.meter.left(ask)

    async def counts(self, ask: UsageAsk) -> Counts:
        """This node's own ledger, and copies."""
        await self._ledger.flush()
        own = await self._own(ask)
        copies = [
            await _counted(ledger, copy.name, copy.book, copy.doubts, ask) for ledger, copy in self.copies
        ]
        return Counts(ledgers=(own, *copies))

    async def _own(self, ask: UsageAsk) -> Counted:
        return await _counted(self._ledger.id, self._name, self._ledger.book, self._ledger.doubts, ask)

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
            if counted.ledger != self._ledger.id and (held is None or held.batch < counted.batch):
                found[counted.ledger] = counted

        for ledger, copy in self.copies:
            take(await _counted(ledger, copy.name, copy.book, copy.doubts, ask))
        async with asyncio.TaskGroup() as asking:
            for node in nodes:
                asking.create_task(one(node.id, node.name))
        return list(found.values()), sorted(missing)

    async def usage(
        self, by: Sequence[By], start: float, end: float, *, key: str = "", team: str = ""
    ) -> UsageAnswer:
        """Of the whole cluster, from `start` until before `end`."""
        ask = UsageAsk(by=tuple(by), start=start, end=end, key=key, team=team)
        await self._ledger.flush()
        own = await self._own(ask)
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


async def _counted(ledger: str, name: str, book: Book, doubts: tuple[Doubt, ...], ask: UsageAsk) -> Counted:
    items = book.items()

    def work() -> tuple[Group, ...]:
        rows = (Row(key, sums) for key, (sums, _) in items)
        return grouped(rows, ask.by, ask.start, ask.end, key=ask.key, team=ask.team)

    groups = work() if len(items) <= INLINE_ROWS else await asyncio.to_thread(work)
    told = tuple(
        msgspec.structs.replace(doubt, node=name) for doubt in doubts if ask.start <= doubt.at < ask.end
    )
    return Counted(ledger=ledger, name=name, batch=book.batch, groups=groups, doubts=told)


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

    def every(
        pause_s: float,
        work: Callable[[], Awaitable[None]],
        name: str,
        hurries: Callable[[], bool] = lambda: True,
    ) -> asyncio.Task[None]:
        async def step() -> None:
            # Who does not hurry comes with the ledger: fifteen more wake-ups a second cost llama.cpp 0.2 %.
            await anyio.sleep(pause_s if hurries() else max(pause_s, FLUSH_S))
            await work()

        return asyncio.create_task(keep_going(name, step, chance), name=name)

    tasks = [
        every(FLUSH_S, usage.flush, "usage ledger"),
        every(MEASURE_S, usage.measure, "usage energy"),
        every(COPY_S, usage.copies.send, "usage copies"),
        every(SAVE_S, usage.copies.save, "usage copies on disk"),
        every(TOP_UP_EVERY_S, usage.meter.step, "quotas", lambda: usage.meter.shares),
        every(LOOK_S, usage.meter.hear, "what is left", lambda: usage.meter.shares),
        every(SYNC_S, usage.meter.sync_months, "months"),
    ]
    try:
        yield usage
    finally:
        await end(tasks)
        await usage.close()


def prices_of(settings: Settings) -> Mapping[str, Price]:
    return {glob: msgspec.convert(price, Price) for glob, price in settings.prices.items()}
