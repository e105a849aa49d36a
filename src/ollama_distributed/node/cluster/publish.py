"""Writes what this node says of itself into the state: its advert and its models.

Each is written when it differs from what the state has, by compare-and-set, and again when
it changes, or when the state lost it (a node that was removed and came back). Refused writes
are repeated: nothing here waits on another node.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import anyio
import structlog

from ollama_distributed.base.errors import Conflict
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.ports import Coordination
from ollama_distributed.state import keys
from ollama_distributed.state.cluster import ClusterState
from ollama_distributed.state.codec import encode
from ollama_distributed.state.records import Advert, Holdings

log = structlog.get_logger("cluster.publish")

PUBLISHED = "cluster.published"
SETTLE_S = 0.05
"""Changes that come together (a start, many models) are written together."""
AGAIN_S = 1.0
"""While the state is not known, or old."""
LOOK_S = 30.0
"""Compared again after so long, whatever happened."""


class View(Protocol):
    """`cluster.mirror.Mirror`."""

    @property
    def state(self) -> ClusterState: ...

    @property
    def synced(self) -> bool: ...


class Publisher:
    def __init__(
        self,
        coordination: Coordination,
        mirror: View,
        *,
        node: NodeId,
        advert: Callable[[], Advert],
        holdings: Callable[[], Holdings],
        allowed: Callable[[], bool],
    ) -> None:
        """`allowed`: false once this node was removed; it then says nothing more."""
        self._coordination = coordination
        self._mirror = mirror
        self._node = node
        self._advert = advert
        self._holdings = holdings
        self._allowed = allowed
        self._news = anyio.Event()

    def wake(self) -> None:
        """Something of this node changed."""
        self._news.set()

    def look(self, before: ClusterState, after: ClusterState) -> None:
        """The state changed; does it say something else of this node?"""
        if not before.revision or before.nodes.get(self._node) is not after.nodes.get(self._node):
            self.wake()

    async def step(self) -> None:
        """Write what differs, then wait for a change. To be repeated."""
        self._news = news = anyio.Event()
        look_s = AGAIN_S
        if self._mirror.synced and self._allowed():
            await self._write(keys.advert(self._node), self._advert())
            await self._write(keys.holdings(self._node), self._holdings())
            look_s = LOOK_S
        with anyio.move_on_after(look_s):
            await news.wait()
            await anyio.sleep(SETTLE_S)

    async def _write(self, key: str, record: Advert | Holdings) -> None:
        value = encode(record)
        state = self._mirror.state
        stored = state.raw.get(key)
        if stored is not None and stored[0] == value:
            return
        try:
            revision = await self._coordination.put(key, value, revision=state.revision_of(key))
        except Conflict:
            # The mirror is behind this node's own last write: it will say so and wake us.
            log.debug(PUBLISHED, key=key, reason="the mirror is behind")
            return
        log.info(PUBLISHED, key=key, revision=revision)
