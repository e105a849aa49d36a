"""Nodes of a cluster in memory: mirror, consensus and config each, over links that can be cut."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

import anyio

from ollama_distributed.adapters.coordination.memory import MemoryCoordination, MemoryEngine
from ollama_distributed.base.errors import Invalid
from ollama_distributed.base.ids import NodeId, NodeRole
from ollama_distributed.cluster.config import ConfigManager
from ollama_distributed.cluster.consensus import ConsensusEngine
from ollama_distributed.cluster.mirror import Mirror
from ollama_distributed.cluster.ports import Write
from ollama_distributed.state import keys
from ollama_distributed.state.codec import encode
from ollama_distributed.state.records import Advert
from ollama_distributed.testing.virtual_time import VirtualClock

DELAY_S = 0.001


class Wires:
    """A `Link` that can be cut, one way or both, and that loses messages by chance."""

    def __init__(self, seed: int) -> None:
        self.loss = 0.0
        self.slow: dict[tuple[str, str], float] = {}
        self._cut: set[tuple[str, str]] = set()
        self._chance = random.Random(seed)

    def delay_s(self, source: str, target: str) -> float | None:
        if source == target:
            return 0.0
        if {(source, target), (source, "*"), ("*", target)} & self._cut:
            return None
        if self.loss and self._chance.random() < self.loss:
            return None
        return self.slow.get((source, target), 0.0) + DELAY_S * (1 + self._chance.random())

    def cut(self, node: str, *, sends: bool = True, hears: bool = True) -> None:
        if sends:
            self._cut.add((node, "*"))
        if hears:
            self._cut.add(("*", node))

    def heal(self) -> None:
        self._cut.clear()


class StoppableClock(VirtualClock):
    """A node's clock; stopped, the node believes that no time passes (as after SIGSTOP)."""

    def __init__(self, drift: float = 0.0) -> None:
        super().__init__(drift=drift)
        self._stopped: float | None = None

    def stop(self) -> None:
        self._stopped = super().monotonic()

    def step(self, seconds: float) -> None:
        assert self._stopped is not None
        self._stopped += seconds

    def monotonic(self) -> float:
        return super().monotonic() if self._stopped is None else self._stopped


def validate(values: Mapping[str, Any]) -> None:
    if "bad" in values:
        raise Invalid("there is no setting 'bad'")


class Node:
    def __init__(self, cluster: Cluster, name: str, role: NodeRole, drift: float) -> None:
        self.id = NodeId(name)
        self.clock = StoppableClock(drift)
        self.coordination: MemoryCoordination = cluster.engine.client(name)
        self.mirror = Mirror(self.coordination, clock=self.clock)
        self.consensus = ConsensusEngine(
            self.coordination,
            self.mirror,
            node=self.id,
            role=role,
            clock=self.clock,
            random=random.Random(f"{cluster.seed} {name}"),
        )
        self.config = ConfigManager(self.consensus, self.mirror, validate=validate)
        self._open = AsyncExitStack()

    async def start(self) -> None:
        await self._open.enter_async_context(self.coordination)
        await self._open.enter_async_context(self.mirror)
        await self._open.enter_async_context(self.consensus)

    async def stop(self) -> None:
        await self._open.aclose()


@contextmanager
def late_news(node: Node) -> Iterator[None]:
    """Inside, the node's mirror stands still, as on a busy machine; after it, it catches up."""
    mirror, held = node.mirror, list[tuple[str, bytes | None, int]]()
    mirror._step = lambda *event: held.append(event)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del mirror._step  # the class's own again
        for event in held:
            mirror._step(*event)


class Cluster:
    """Use `cluster(...)`."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.wires = Wires(seed)
        self.engine = MemoryEngine(self.wires)
        self.nodes: dict[str, Node] = {}

    async def add(self, name: str, role: NodeRole = "server", *, drift: float = 0.0) -> Node:
        node = self.nodes[name] = Node(self, name, role, drift)
        await node.start()
        return node

    async def advertise(self) -> None:
        """Every node writes its advert."""
        for node in self.nodes.values():
            advert = Advert(
                node=node.id, name=f"name-{node.id}", role="server", version="1", boot="b", started_at=1.0
            )
            await node.coordination.create(keys.advert(node.id), encode(advert))

    async def write(self, key: str, value: bytes) -> None:
        """As somebody else, in reach of the engine."""
        async with self.engine.client("somebody") as somebody:
            await somebody.batch([Write(key, value)])

    async def kill(self, node: Node) -> None:
        """As `kill -9` would: nothing that it still wants to say is heard."""
        del self.nodes[node.id]
        self.wires.cut(node.id)
        await node.stop()

    def leaders(self) -> list[NodeId]:
        return [node.id for node in self.nodes.values() if node.consensus.is_leader()]

    async def leader(self, within_s: float = 10.0) -> Node:
        """The one leader, once it leads and every node in reach knows."""

        def known() -> bool:
            return len(self.leaders()) == 1 and all(
                node.consensus.get_leader() == self.leaders()[0] for node in self.nodes.values()
            )

        await until(known, within_s)
        return self.nodes[self.leaders()[0]]

    def others(self, *nodes: Node) -> list[Node]:
        return [node for node in self.nodes.values() if node not in nodes]

    async def agree(self, within_s: float = 15.0) -> None:
        """Until every node's mirror shows what the engine has."""
        await until(
            lambda: all(
                {key: raw[1] for key, raw in node.mirror.state.raw.items()}
                == {key: entry.revision for key, entry in self.engine.entries.items()}
                for node in self.nodes.values()
            ),
            within_s,
        )


@asynccontextmanager
async def cluster(*names: str, seed: int = 1) -> AsyncIterator[Cluster]:
    """Servers of these names, in virtual time."""
    made = Cluster(seed)
    try:
        for name in names:
            await made.add(name)
        yield made
    finally:
        made.wires.heal()
        for node in made.nodes.values():
            await node.stop()


async def until(condition: Callable[[], bool], within_s: float = 10.0, *, step_s: float = 0.01) -> float:
    """How long it took; asked every `step_s` of virtual time."""
    begun = anyio.current_time()
    with anyio.fail_after(within_s):
        while not condition():
            await anyio.sleep(step_s)
    return anyio.current_time() - begun
