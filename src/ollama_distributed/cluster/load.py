"""How loaded the nodes are that this one sends work to: fresh, and only those.

Each node says its load on `load.<id>` every second, by core messages. A node listens only to
the nodes it was asked about lately, so that traffic grows with the routes in use and not with
the square of the nodes. Figures carry their age; whoever decides by them judges it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Annotated

import anyio
import msgspec
import structlog

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import Invalid, OllamaDistributedError
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.loops import keep_going
from ollama_distributed.cluster.ports import Coordination, Message
from ollama_distributed.cluster.tasks import end

SUBJECT = "load."
REPORT_S = 1.0
QUIET_S = 5.0
"""An unchanged load is said so often: who listens can tell quiet from gone."""
JITTER = 0.1
IDLE_S = 60.0
"""A node that nobody asked about for so long is listened to no more."""
SWEEP_S = 5.0
MAX_INTEREST = 1024
"""Nodes listened to at once; the one asked about longest ago gives way."""
ASK_S = 1.0
"""For the first figures of a node, so that it need not be waited for until it reports."""
MAX_MODELS = 256
MAX_REPORT_BYTES = 128 * 1024

REPORT_REFUSED = "load.refused"
FIRST_REPORT_MISSED = "load.not_answered"

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class ModelLoad(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A model in memory."""

    name: str
    """Canonical full name."""
    slots: int = 0
    busy: int = 0
    queued: int = 0
    tokens_per_s: float = 0.0
    memory_bytes: int = 0
    vram_bytes: int = 0
    context_tokens: int = 0
    expires_at: float | None = None
    """When it goes if nobody uses it, seconds since the Unix epoch; None: never."""
    engine: str = ""
    """`name/variant/version`."""
    read_tokens_per_s: float = 0.0
    """Of a prompt, as measured; 0: not yet."""
    life: int = 0
    """Another number after each load: what was cached before is gone."""
    used_at: float = 0.0
    """When it was used last, by the node's clock, in steps of ten seconds."""


class Load(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    boot: str = ""
    slots: int = 0
    busy: int = 0
    """Slots of all loaded models, and how many of them work."""
    queued: int = 0
    memory_free_bytes: int = 0
    draining: bool = False
    models: Annotated[tuple[ModelLoad, ...], msgspec.Meta(max_length=MAX_MODELS)] = ()
    age_s: float | None = None
    """Set by the reader: how long ago this arrived."""


_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(Load)


def decode_load(data: bytes) -> Load:
    """
    Raises:
        Invalid: no load report.
    """
    if len(data) > MAX_REPORT_BYTES:
        raise Invalid(f"a load report has at most {MAX_REPORT_BYTES} bytes, this one {len(data)}")
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise Invalid(f"no load report: {exc}") from exc


class _Ear(msgspec.Struct):
    """One node that is listened to."""

    asked_at: float
    load: Load | None = None
    heard_at: float = 0.0
    task: asyncio.Task[None] | None = None


class LoadReports:
    """An async context manager; inside, this node's `own` load is reported and answered."""

    def __init__(
        self,
        coordination: Coordination,
        *,
        node: NodeId,
        clock: Clock,
        chance: random.Random,
        own: Callable[[], Load],
    ) -> None:
        self._coordination = coordination
        self._node = node
        self._clock = clock
        self._chance = chance
        self._own = own
        self._said: Load | None = None
        self._said_at = float("-inf")
        self._ears: dict[NodeId, _Ear] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._running = False

    async def __aenter__(self) -> LoadReports:
        self._running = True
        self._tasks = [
            self._start("load reports", self._report),
            self._start("load answers", self._answer),
            self._start("load interest", self._sweep),
        ]
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._running = False
        listening = [ear.task for ear in self._ears.values() if ear.task is not None]
        self._ears.clear()
        await end([*self._tasks, *listening])

    def interest(self, nodes: Iterable[NodeId]) -> None:
        """These may get work soon: listen to them from now on. Cheap; call it as often as you
        like, and again while the interest lasts."""
        now = self._clock.monotonic()
        for node in nodes:
            ear = self._ears.get(node)
            if ear is not None:
                ear.asked_at = now
            elif self._running and node != self._node:
                self._ears[node] = ear = _Ear(now)
                ear.task = self._start(f"load of {node}", partial(self._listen, node, ear))
        while len(self._ears) > MAX_INTEREST:
            self._drop(min(self._ears, key=lambda node: self._ears[node].asked_at))

    def report(self, node: NodeId) -> Load | None:
        """The latest figures of `node`, with their age; None: none came yet. Of this node
        itself always the present ones."""
        if node == self._node:
            return msgspec.structs.replace(self._own(), age_s=0.0)
        ear = self._ears.get(node)
        if ear is None or ear.load is None:
            return None
        now = self._clock.monotonic()
        ear.asked_at = now
        return msgspec.structs.replace(ear.load, age_s=now - ear.heard_at)

    @property
    def listening(self) -> tuple[NodeId, ...]:
        return tuple(self._ears)

    def _start(self, name: str, step: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        work = keep_going(name, step, self._chance, max_wait_s=REPORT_S)
        return asyncio.create_task(work, name=f"{name} at {self._node}")

    # ── this node's load ────────────────────────────────────────────────────────────

    async def _report(self) -> None:
        load = msgspec.structs.replace(self._own(), age_s=None)
        now = self._clock.monotonic()
        if load != self._said or now - self._said_at >= QUIET_S - REPORT_S:
            await self._coordination.publish(SUBJECT + self._node, _encode(load))
            self._said, self._said_at = load, now
        await anyio.sleep(REPORT_S * (1.0 - JITTER * self._chance.random()))

    async def _answer(self) -> None:
        async def handle(message: Message) -> bytes:  # noqa: ARG001  # the question says nothing
            return _encode(msgspec.structs.replace(self._own(), age_s=None))

        async with self._coordination.serve(_question(self._node), handle):
            await anyio.sleep_forever()

    # ── the others' ─────────────────────────────────────────────────────────────────

    async def _listen(self, node: NodeId, ear: _Ear) -> None:
        async with self._coordination.subscribe(SUBJECT + node) as messages:
            await self._ask(node, ear)
            async for message in messages:
                self._take(node, ear, message.data)

    async def _ask(self, node: NodeId, ear: _Ear) -> None:
        try:
            data = await self._coordination.request(_question(node), b"", timeout_s=ASK_S)
        except OllamaDistributedError as exc:
            log.debug(FIRST_REPORT_MISSED, node=node, code=exc.code)  # its next report comes anyway
        else:
            self._take(node, ear, data)

    def _take(self, node: NodeId, ear: _Ear, data: bytes) -> None:
        try:
            ear.load = decode_load(data)
            ear.heard_at = self._clock.monotonic()
        except Invalid as exc:
            log.warning(REPORT_REFUSED, node=node, error=exc.message)

    async def _sweep(self) -> None:
        await anyio.sleep(SWEEP_S)
        now = self._clock.monotonic()
        for node in [n for n, ear in self._ears.items() if now - ear.asked_at > IDLE_S]:
            self._drop(node)

    def _drop(self, node: NodeId) -> None:
        task = self._ears.pop(node).task
        if task is not None:
            task.cancel()
            self._tasks.append(task)
            self._tasks = [task for task in self._tasks if not task.done()]


def _question(node: NodeId) -> str:
    return f"cmd.{node}.load"
