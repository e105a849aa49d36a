"""Finds out whose turn it is to fetch something from outside, and keeps one's own turn.

Two keepers know of each turn, so that one may die, or join, unnoticed. The first one that can
be reached decides. When none can be, everyone is on its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import anyio
import structlog

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.tasks import end
from ollama_distributed.distribution.neighbours import Neighbours, TurnAsk
from ollama_distributed.distribution.turns import Turns, rank

log = structlog.get_logger()

KEEPERS = 2
TRIED = 4
"""Nodes that are tried for keepers."""
RENEW_S = 1.5
LEAVE_S = 1.0
"""To say that a turn is over; else it ends by itself."""


class Matchmaker:
    """`servers`: those that live, this node included if it is one; they keep the turns of all."""

    def __init__(
        self, me: NodeId, neighbours: Neighbours, servers: Callable[[], Sequence[NodeId]], clock: Clock
    ) -> None:
        self.me = me
        self._neighbours = neighbours
        self._servers = servers
        self._clock = clock
        self._turns = Turns()

    def asked(self, node: NodeId, ask: TurnAsk) -> NodeId | None:
        """The keeper's side: another node asks."""
        now = self._clock.monotonic()
        if ask.end:
            self._turns.end(ask.key, node)
        elif ask.take:
            return self._turns.take(ask.key, node, now, instead_of=ask.instead_of)
        return self._turns.holder(ask.key, now)

    @asynccontextmanager
    async def turn(self, key: str, *, instead_of: NodeId | None = None) -> AsyncIterator[NodeId]:
        """Whose turn it is. If it is this node's, it is until the context ends. `instead_of`: a
        node that had it and was seen to fail."""
        keepers, holder = await self._claim(key, instead_of)
        if holder != self.me:
            yield holder
            return
        renewing = asyncio.create_task(self._renew(key), name="turn")
        try:
            yield holder
        finally:
            await end([renewing])
            with anyio.move_on_after(LEAVE_S, shield=True):
                over = TurnAsk(key=key, end=True)
                keepers += [node for node in rank(key, self._servers())[:KEEPERS] if node not in keepers]
                await asyncio.gather(*(self._ask(node, over) for node in keepers))

    # ── inside ──────────────────────────────────────────────────────────────────────

    async def _claim(self, key: str, instead_of: NodeId | None) -> tuple[list[NodeId], NodeId]:
        """Keepers, and whose turn it is."""
        keepers: list[NodeId] = []
        for node in rank(key, self._servers())[:TRIED]:
            reached, holder = await self._ask(node, TurnAsk(key=key))
            if reached:
                keepers.append(node)
            if holder not in (None, self.me, instead_of):
                assert holder is not None
                return [], holder  # also where only the second keeper knows of it
            if len(keepers) == KEEPERS:
                break
        take = TurnAsk(key=key, take=True, instead_of=instead_of)
        for number, node in enumerate(keepers):
            _, holder = await self._ask(node, take)
            if number == 0 and holder not in (None, self.me):
                assert holder is not None
                return [], holder
        return keepers, self.me

    async def _renew(self, key: str) -> None:
        take = TurnAsk(key=key, take=True)
        while True:
            await asyncio.sleep(RENEW_S)
            reached = 0
            for node in rank(key, self._servers())[:TRIED]:
                reached += (await self._ask(node, take))[0]
                if reached == KEEPERS:
                    break

    async def _ask(self, node: NodeId, ask: TurnAsk) -> tuple[bool, NodeId | None]:
        """Whether it could be reached, and what it said."""
        if node == self.me:
            return True, self.asked(self.me, ask)
        try:
            return True, await self._neighbours.turn(node, ask)
        except OllamaDistributedError as exc:
            log.info("distribution.keeper_away", node=node, error=exc.message)
            return False, None
