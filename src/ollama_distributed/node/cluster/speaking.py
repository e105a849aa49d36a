"""What this node says to others of the callers whose requests it passes on, and what it believes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.identity.assertions import Asserter, Believer
from ollama_distributed.cluster.identity.ca import Peer

if TYPE_CHECKING:
    from ollama_distributed.node.cluster.keeper import Keeper
    from ollama_distributed.node.cluster.life import Life


class Speaking:
    """In whichever cluster the node is now, with its key there."""

    def __init__(
        self, node: NodeId, keeper: Callable[[], Keeper], told: Callable[[Identity], Identity], clock: Clock
    ) -> None:
        self._node = node
        self._keeper = keeper
        self._told = told
        self._clock = clock
        self._life: Life | None = None
        self._sides: tuple[Asserter, Believer] | None = None

    def say(self, identity: Identity) -> bytes:
        """
        Raises:
            Unavailable: the node is between two lives.
        """
        return self._now()[0].say(identity)

    def believe(self, peer: Peer, said: bytes) -> Identity:
        """
        Raises:
            Forbidden: nobody says so who may.
            Unavailable: the node is between two lives.
        """
        return self._now()[1].believe(peer, said)

    def _now(self) -> tuple[Asserter, Believer]:
        life = self._keeper().need_life()
        if self._sides is None or life is not self._life:
            identity, wall = life.identity, self._clock.time
            asserter = Asserter(identity.cluster, self._node, identity.keys.tls, wall)
            self._life, self._sides = life, (asserter, Believer(identity.cluster, wall, self._told))
        return self._sides
