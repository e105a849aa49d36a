"""Makes this node heard; on servers, hears everyone and keeps their record when it leads.

Heartbeats are core messages and touch no consensus. Every server hears them, so that a new
leader knows at once who lives.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import anyio
import structlog

from ollama_distributed.base.alerts import Alert, decode, encode
from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import Invalid, OllamaDistributedError
from ollama_distributed.base.ids import NodeId, NodeRole
from ollama_distributed.cluster.loops import keep_going
from ollama_distributed.cluster.membership.beats import (
    MAX_LOADED,
    SUBJECT,
    Beat,
    Ears,
    Heard,
    beat_interval_s,
    decode_beat,
    encode_beat,
)
from ollama_distributed.cluster.membership.ports import Leadership, View
from ollama_distributed.cluster.membership.registrar import Registrar
from ollama_distributed.cluster.membership.usage import Usages, answer, subject
from ollama_distributed.cluster.membership.utilization import Utilization
from ollama_distributed.cluster.ports import Coordination, Message
from ollama_distributed.cluster.tasks import end

JITTER = 0.1
"""A beat comes up to so much of the interval early, never late."""
GOODBYE_S = 0.5
RETRY_S = 1.0
"""The longest wait after a failed beat or write: silence would cost more."""

BEAT_REFUSED = "beat.refused"
GOODBYE_LOST = "goodbye.lost"

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Membership:
    """An async context manager: inside, this node is heard, and it says goodbye at the end.

    `usage`, `alerts` and `loaded` are asked before each beat and answer at once. `removed` says whether
    a node was removed from the cluster (the roster of admission): its beats count no more.
    """

    def __init__(
        self,
        coordination: Coordination,
        consensus: Leadership,
        mirror: View,
        *,
        node: NodeId,
        boot: str,
        role: NodeRole,
        clock: Clock,
        chance: random.Random,
        usage: Callable[[], Utilization] = Utilization,
        alerts: Callable[[], Sequence[Alert]] = tuple,
        loaded: Callable[[], Sequence[str]] = tuple,
        removed: Callable[[NodeId], bool] = lambda _: False,
    ) -> None:
        self._coordination = coordination
        self._mirror = mirror
        self._node = node
        self._boot = boot
        self._clock = clock
        self._chance = chance
        self._usage = usage
        self._own_alerts = alerts
        self._loaded = loaded
        self._seq = 0
        self._ears = Ears(node) if role == "server" else None
        self._usages = Usages(coordination, consensus, ears=self._ears, clock=clock)
        self._registrar = (
            None
            if self._ears is None
            else Registrar(coordination, consensus, mirror, self._ears, clock=clock, removed=removed)
        )
        self._beating: asyncio.Task[None] | None = None
        self._hearing: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Membership:
        self._beating = self._start("beats", self._beat)
        if self._ears is not None and self._registrar is not None:
            self._hearing = [
                self._start("hearing", partial(self._hear, self._ears, self._registrar)),
                self._start("members", self._registrar.step),
                self._start("usage", partial(self._answer, self._ears)),
            ]
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._beating is not None
        await end([self._beating])
        with anyio.move_on_after(GOODBYE_S, shield=True):
            try:
                await self._send(stopping=True)
            except OllamaDistributedError as error:
                log.info(GOODBYE_LOST, code=error.code, error=error.message)
        await end(self._hearing)

    def heard(self, node: NodeId) -> Heard | None:
        """On a server: the last that it heard of `node`, by its own monotonic clock."""
        return None if self._ears is None else self._ears.get(node)

    def usage(self, node: NodeId) -> Utilization:
        """The last known figures with their age; asks nobody."""
        return self._usages.get(node)

    async def usages(self) -> dict[NodeId, Utilization]:
        """Of every node that was heard. A server knows; another node asks the leader and waits
        0.5 s at most, then gives what it knew, with its age."""
        return await self._usages.all()

    async def alerts(self) -> dict[NodeId, tuple[Alert, ...]]:
        """What nodes say is wrong with them; asked as `usages`. Of who is silent: nothing."""
        return {node: decode(told) for node, told in (await self._usages.alerts()).items()}

    def _start(self, name: str, step: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        work = keep_going(name, step, self._chance, max_wait_s=RETRY_S)
        return asyncio.create_task(work, name=f"{name} of {self._node}")

    # ── out ─────────────────────────────────────────────────────────────────────────

    async def _beat(self) -> None:
        interval_s = await self._send()
        await anyio.sleep(interval_s * (1.0 - JITTER * self._chance.random()))

    async def _send(self, *, stopping: bool = False) -> float:
        """One beat; within how many seconds the next is due."""
        interval_s = beat_interval_s(len(self._mirror.state.nodes))
        self._seq += 1
        beat = Beat(
            boot=self._boot,
            seq=self._seq,
            interval_s=interval_s,
            usage=self._usage(),
            loaded=tuple(self._loaded())[:MAX_LOADED],
            alerts=encode(self._own_alerts()),
            stopping=stopping,
        )
        await self._coordination.publish(SUBJECT + self._node, encode_beat(beat))
        return interval_s

    # ── in, on servers ──────────────────────────────────────────────────────────────

    async def _hear(self, ears: Ears, registrar: Registrar) -> None:
        async with self._coordination.subscribe(SUBJECT + "*") as messages:
            async for message in messages:
                node = NodeId(message.subject.removeprefix(SUBJECT))
                try:
                    beat = decode_beat(message.data)
                except Invalid as exc:
                    log.warning(BEAT_REFUSED, node=node, error=exc.message)
                    continue
                if ears.hear(node, beat, self._clock.monotonic()).stopped:
                    registrar.wake()

    async def _answer(self, ears: Ears) -> None:
        async def handle(message: Message) -> bytes:
            return answer(ears, message.data, self._clock.monotonic())

        async with self._coordination.serve(subject(self._node), handle):
            await anyio.sleep_forever()
