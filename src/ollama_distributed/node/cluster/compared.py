"""What the last comparison of the voters' records found, and for how long it holds. Pure."""

from __future__ import annotations

import msgspec

from ollama_distributed.adapters.coordination.nats.seat import Formation
from ollama_distributed.base.ids import NodeId


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    formation: Formation | None = None
    """The voters that were compared; None: nobody was."""
    odd: tuple[NodeId, ...] = ()
    """Those whose server holds less than the others'."""

    def lost(self, formation: Formation | None) -> tuple[NodeId, ...]:
        """Of the present voters: who was taken out and in again was filled anew."""
        return self.odd if formation == self.formation else ()
