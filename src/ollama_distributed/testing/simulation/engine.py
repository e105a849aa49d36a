"""The coordination engine of the simulation: the one in memory, with the rules watching."""

from __future__ import annotations

from collections.abc import Sequence

from ollama_distributed.adapters.coordination.memory import Link, MemoryEngine
from ollama_distributed.base.errors import Conflict
from ollama_distributed.cluster.ports import Entry, Fence, Write
from ollama_distributed.testing.simulation.link import node_of
from ollama_distributed.testing.simulation.rules import Rules

NAME = "engine"


class WatchedEngine(MemoryEngine):
    def __init__(self, link: Link, rules: Rules) -> None:
        super().__init__(link, name=NAME)
        self._rules = rules

    def preload(self, writes: Sequence[Write]) -> None:
        """State from before the simulation began."""
        for write in writes:
            assert write.value is not None
            self.revision += 1
            self.entries[write.key] = Entry(write.key, write.value, self.revision)
            self._rules.preloaded(write, self.revision)

    def commit(self, writes: Sequence[Write], fence: Fence | None, by: str) -> tuple[int, ...]:
        before = {write.key: self.entries.get(write.key) for write in writes}
        try:
            revisions = super().commit(writes, fence, by)
        except Conflict:
            self._rules.refused(node_of(by), fence)
            raise
        self._rules.committed(node_of(by), writes, fence, revisions, before)
        return revisions
