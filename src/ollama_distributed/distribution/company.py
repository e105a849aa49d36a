"""Keeps up with what other nodes have of a blob that is fetched, and chooses whose table it goes by."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import anyio
from anyio.abc import TaskGroup

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import NotFound, OllamaDistributedError
from ollama_distributed.base.ids import NodeId
from ollama_distributed.distribution.exchange import MAX_PEERS, Exchange, HaveAnswer, HaveAsk, from_bytes
from ollama_distributed.distribution.pieces import Table
from ollama_distributed.distribution.plan import Wants
from ollama_distributed.distribution.trust import Trust
from ollama_distributed.models.names import BlobId

NOT_YET_S = 0.5
"""A node that has nothing of the blob yet is asked again after this, at first."""
AWAY_S = 5.0
"""The longest wait until a node that was away is asked again; waits double up to it."""
WHOLE_S = 5.0
"""A node that has it all is asked so often whether that is still so."""
AT_ONCE_S = 0.02
"""Between two questions to a node that does not wait for news before it answers."""


class Company:
    """All nodes that have something of one blob, or will. `begin`: called with the first sound table
    and who gave it, returns what is still needed; `woken`: there may be more to ask for."""

    def __init__(
        self,
        me: NodeId,
        blob: BlobId,
        size: int,
        *,
        exchange: Exchange,
        trust: Trust,
        clock: Clock,
        begin: Callable[[NodeId, Table], Wants],
        woken: Callable[[], None],
    ) -> None:
        self._me = me
        self._blob = blob
        self._size = size
        self._exchange = exchange
        self._trust = trust
        self._clock = clock
        self._begin = begin
        self._woken = woken
        self._met: set[NodeId] = set()
        self._wants: Wants | None = None
        self._table_id = b""
        self.disagrees: set[NodeId] = set()
        """Their tables are other ones than that which the fetch goes by."""

    def meet(self, nodes: Iterable[NodeId], tasks: TaskGroup) -> None:
        """Follow these too, if there are not too many already."""
        for node in nodes:
            if node != self._me and node not in self._met and len(self._met) < MAX_PEERS:
                self._met.add(node)
                if self._trust.of(self._blob, node):
                    tasks.start_soon(self._follow, node, tasks)
        if self._wants is not None:
            self._wants.company = len(self._met)

    @property
    def trusted(self) -> bool:
        """Any of them is."""
        return any(self._trust.of(self._blob, node) for node in self._met)

    async def _follow(self, node: NodeId, tasks: TaskGroup) -> None:
        seen, wait_s = -1, NOT_YET_S
        while self._trust.of(self._blob, node):
            asked_at = self._clock.monotonic()
            ask = HaveAsk(blob=self._blob.digest, seen=seen, table=self._wants is None)
            try:
                answer = await self._exchange.have(node, ask)
            except OllamaDistributedError as exc:
                seen = -1
                if self._wants is not None and not isinstance(exc, NotFound):
                    self._wants.drop(node)
                await anyio.sleep(wait_s)
                wait_s = min(AWAY_S, 2 * wait_s)
                continue
            wait_s = NOT_YET_S
            if not self._fits(node, answer):
                await anyio.sleep(AWAY_S)
                continue
            assert self._wants is not None
            self._wants.heard(node, from_bytes(answer.has), whole=answer.whole)
            seen = answer.version
            self._woken()
            self.meet(answer.peers, tasks)
            took_s = self._clock.monotonic() - asked_at
            await anyio.sleep(WHOLE_S if answer.whole else max(0.0, AT_ONCE_S - took_s))

    def _fits(self, node: NodeId, answer: HaveAnswer) -> bool:
        """The first table is the one to go by."""
        table = answer.table
        if self._wants is None:
            if table is None or not table.sound or table.size != self._size:
                return False
            if table.id() != answer.table_id:
                return False
            self._table_id = answer.table_id
            self._wants = self._begin(node, table)
            self._wants.company = len(self._met)
        if answer.table_id == self._table_id:
            self.disagrees.discard(node)
            return True
        self.disagrees.add(node)
        return False
