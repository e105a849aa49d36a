"""Whether a coordination server lost records; every voter looks.

One whose files were damaged can go on with what is left, and its vote with it: nothing else tells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from ollama_distributed.adapters.coordination.nats.damage import damaged
from ollama_distributed.adapters.coordination.nats.seat import Formation
from ollama_distributed.adapters.coordination.nats.wire import Bucket
from ollama_distributed.base.ids import NodeId
from ollama_distributed.node.cluster.compared import Compared
from ollama_distributed.node.cluster.link import BUCKET

if TYPE_CHECKING:
    from ollama_distributed.node.cluster.life import Life

FIRST_S, EVERY_S = 60.0, 3600.0
AGAIN_S = 30.0
"""A server that was under way at one look is not at the next."""


class Comparison:
    """A server's duty: compares what the voters hold, hourly."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self._wait_s = FIRST_S

    async def step(self) -> None:
        """
        Raises:
            Unavailable: no two of them could be compared.
        """
        await self._wait()
        formation = self._formation()
        found = await self._odd(formation)
        if found:
            await anyio.sleep(AGAIN_S)
            again = await self._odd(formation)
            found = tuple(node for node in found if node in again)
        self._life.compared = Compared(formation=formation, odd=found)
        self._wait_s = EVERY_S

    async def _wait(self) -> None:
        """Until it is time, or the voters are others than were compared."""
        waited_s = 0.0
        while waited_s < self._wait_s:
            await anyio.sleep(FIRST_S)
            waited_s += FIRST_S
            if self._formation() != self._life.compared.formation:
                return

    def _formation(self) -> Formation | None:
        bus = self._life.bus
        return bus.formation if bus is not None else None

    async def _odd(self, formation: Formation | None) -> tuple[NodeId, ...]:
        bus = self._life.bus
        if bus is None or formation is None or self._life.parts.node not in formation.nodes:
            return ()
        if len(formation.nodes) < 2:  # nobody to compare with
            return ()
        return await damaged(bus.system(self._life.bus_urls()), formation, Bucket(BUCKET).stream)
