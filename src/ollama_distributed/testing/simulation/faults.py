"""What goes wrong, by chance: every kind of fault, several at once, each over by itself.

`Faults.run` draws one after the other until it is cancelled; the world heals what is left.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import anyio
from anyio.abc import TaskGroup

from ollama_distributed.testing.simulation.engine import NAME as ENGINE
from ollama_distributed.testing.simulation.engine import WatchedEngine
from ollama_distributed.testing.simulation.link import FaultyLink
from ollama_distributed.testing.simulation.node import SimulatedNode
from ollama_distributed.testing.simulation.trace import Trace

MEAN_GAP_S = 4.0
"""Between the beginnings of two faults; they last longer, so they overlap."""
MOST_AT_ONCE = 30
"""Nodes that one fault meets. Each change of a node is an event on every other: half of a
thousand nodes that come back are a million events, minutes of a core."""


class Faults:
    def __init__(
        self,
        nodes: list[SimulatedNode],
        engine: WatchedEngine,
        link: FaultyLink,
        trace: Trace,
        chance: random.Random,
    ) -> None:
        self._nodes = nodes
        self._engine = engine
        self._link = link
        self._trace = trace
        self._chance = chance
        self._kinds: dict[Callable[[], Coroutine[Any, Any, None]], int] = {
            self.noise: 3,
            self.isolation: 3,
            self.leader_isolation: 3,
            self.one_way: 3,
            self.crash: 3,
            self.leader_crash: 2,
            self.restart: 1,
            self.quorum_loss: 2,
            self.swizzle: 2,
            self.flapping: 2,
            self.clock_jump: 1,
            self.power_cut: 1,
        }

    async def run(self, group: TaskGroup) -> None:
        while True:
            await anyio.sleep(self._chance.expovariate(1 / MEAN_GAP_S))
            kind = self._chance.choices(list(self._kinds), list(self._kinds.values()))[0]
            group.start_soon(kind)

    # ── the network ─────────────────────────────────────────────────────────────────

    async def noise(self) -> None:
        """Messages get lost and late, everywhere."""
        loss, slow_s = self._chance.uniform(0, 0.2), self._chance.choice([0.0, 0.02, 0.2])
        seconds = self._seconds(2, 15)
        self._trace.note("fault.noise", loss=f"{loss:.3f}", slow_s=slow_s, seconds=seconds)
        self._link.loss, self._link.slow_s = loss, slow_s
        await anyio.sleep(seconds)
        self._link.loss = self._link.slow_s = 0.0

    async def isolation(self) -> None:
        """Some nodes are cut off from the others and from the engine."""
        await self._isolate(self._some(self._nodes))

    async def leader_isolation(self) -> None:
        await self._isolate(self._leaders())

    async def one_way(self) -> None:
        """Some nodes are heard but hear nothing, or the other way round."""
        nodes = self._leaders() if self._chance.random() < 0.5 else self._some(self._nodes)
        ends = [node.id for node in nodes]
        others = [ENGINE]
        if self._chance.random() < 0.5:
            others += [node.id for node in self._nodes if node.id not in ends]
        seconds, deaf = self._seconds(1, 20), self._chance.random() < 0.5
        self._trace.note(
            "fault.one_way", nodes=",".join(ends), deaf=deaf, engine_only=len(others) == 1, seconds=seconds
        )
        sources, targets = (others, ends) if deaf else (ends, others)
        self._link.cut(sources, targets)
        await anyio.sleep(seconds)
        self._link.mend(sources, targets)

    async def swizzle(self) -> None:
        """Nodes are clogged one by one and freed in another order (FoundationDB)."""
        nodes = self._some(self._nodes, most=0.6)
        all_by = anyio.current_time() + self._seconds(3, 8)
        self._trace.note("fault.swizzle", nodes=",".join(node.id for node in nodes))
        for node in nodes:
            self._link.clog(node.id, all_by + self._chance.uniform(0, 8))
            await anyio.sleep(self._chance.uniform(0, 2 * (all_by - anyio.current_time()) / len(nodes)))

    async def flapping(self) -> None:
        """One node is there and not there."""
        node = self._chance.choice(self._nodes)
        self._trace.note("fault.flapping", node=node.id)
        others = [ENGINE, *(other.id for other in self._nodes)]
        for _ in range(self._chance.randint(3, 6)):
            self._cut_off([node.id], others)
            await anyio.sleep(self._chance.uniform(3, 6))
            self._mend([node.id], others)
            await anyio.sleep(self._chance.uniform(1, 5))

    # ── processes ───────────────────────────────────────────────────────────────────

    async def crash(self) -> None:
        await self._crash(self._some(self._nodes, most=0.2))

    async def leader_crash(self) -> None:
        await self._crash(self._leaders())

    async def power_cut(self) -> None:
        """All nodes at once; the engine keeps what it acknowledged."""
        await self._crash(self._nodes[:MOST_AT_ONCE])

    async def restart(self) -> None:
        """In good order."""
        node = self._chance.choice(self._nodes)
        node.stop()
        await anyio.sleep(self._seconds(0, 5))
        await node.start()

    async def quorum_loss(self) -> None:
        """The engine refuses, or does not even answer."""
        seconds, silent = self._seconds(0.5, 12), self._chance.random() < 0.5
        self._trace.note("fault.quorum_loss", silent=silent, seconds=seconds)
        nodes = [node.id for node in self._nodes]
        if silent:
            self._cut_off([ENGINE], nodes)
        else:
            self._engine.available = False
        await anyio.sleep(seconds)
        if silent:
            self._mend([ENGINE], nodes)
        else:
            self._engine.available = True

    async def clock_jump(self) -> None:
        """A wall clock is set; nothing may depend on it."""
        node = self._chance.choice(self._nodes)
        node.clock.skew_s = self._chance.uniform(-7200, 7200)
        self._trace.note("fault.clock_jump", node=node.id, skew_s=f"{node.clock.skew_s:.3f}")

    # ── steps ───────────────────────────────────────────────────────────────────────

    async def _isolate(self, nodes: list[SimulatedNode]) -> None:
        ends = [node.id for node in nodes]
        others = [ENGINE, *(node.id for node in self._nodes if node.id not in ends)]
        seconds = self._seconds(1, 20)
        self._trace.note("fault.isolation", nodes=",".join(ends), seconds=seconds)
        self._cut_off(ends, others)
        await anyio.sleep(seconds)
        self._mend(ends, others)

    async def _crash(self, nodes: list[SimulatedNode]) -> None:
        for node in nodes:
            node.crash()
        for node in nodes:
            await anyio.sleep(self._seconds(0, 10) / len(nodes))
            await node.start()

    def _cut_off(self, ends: Sequence[str], others: Sequence[str]) -> None:
        self._link.cut(ends, others)
        self._link.cut(others, ends)

    def _mend(self, ends: Sequence[str], others: Sequence[str]) -> None:
        self._link.mend(ends, others)
        self._link.mend(others, ends)

    def _some(self, nodes: list[SimulatedNode], *, most: float = 0.5) -> list[SimulatedNode]:
        most_nodes = min(MOST_AT_ONCE, max(1, int(most * len(nodes))))
        return self._chance.sample(nodes, self._chance.randint(1, most_nodes))

    def _leaders(self) -> list[SimulatedNode]:
        """Who leads now; some node where nobody does."""
        return [node for node in self._nodes if node.leads] or [self._chance.choice(self._nodes)]

    def _seconds(self, least: float, most: float) -> float:
        return round(self._chance.uniform(least, most), 3)
