"""What the gateway needs of who counts usage and keeps limits (`node.usage.service.NodeUsage`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ollama_distributed.base.usage import By, UsageAnswer, UsageFigures
from ollama_distributed.gateway.metering import Metering
from ollama_distributed.gateway.summary import Summary


class UsageDesk(Metering, Protocol):
    def count(self, summary: Summary) -> None:
        """A request for inference ended. Called on the event loop; never raises, never waits."""
        ...

    async def usage(
        self, by: Sequence[By], start: float, end: float, *, key: str = "", team: str = ""
    ) -> UsageAnswer:
        """Of the whole cluster, from `start` until before `end`; `key`, `team`: only theirs."""
        ...

    def figures(self) -> UsageFigures:
        """Of this node, from memory."""
        ...
