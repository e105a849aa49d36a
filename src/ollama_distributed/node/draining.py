"""Frees a node that drains: answers end in their time, or other nodes go on with them; then its models go.

It is the same whether an operator drains it, or its own policy lets it rest. Nothing is broken for it:
an answer that cannot be continued (a grammar, tools), or whose model no other living node has, goes on
here to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import anyio
import structlog

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.base.ids import NodeId
from ollama_distributed.models.names import name_key
from ollama_distributed.serving.loaded import LoadedModel
from ollama_distributed.state.cluster import ClusterState

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

LOOK_S = 1.0
DRAINS, MOVED, NOT_UNLOADED = "drain.begun", "drain.moved", "drain.not_unloaded"


class Answers(Protocol):
    """`streams.service.Answers`: of this node's own clients."""

    def move(self, away_from: Sequence[str]) -> int: ...


class Door(Protocol):
    """`adapters.peers.door.PeerDoor`: of other nodes' clients."""

    def move(self, elsewhere: Callable[[str], bool]) -> int: ...


class Runs(Protocol):
    """`serving.service.Serving`."""

    def loaded(self) -> list[LoadedModel]: ...

    async def unload(self, name: str) -> None: ...


class Draining:
    def __init__(
        self,
        me: NodeId,
        *,
        answers: Answers,
        door: Door,
        runs: Runs,
        state: Callable[[], ClusterState],
        draining: Callable[[], bool],
        resting: Callable[[], bool],
        patience_s: float,
        clock: Clock,
    ) -> None:
        """`resting`: by its own policy, so that its memory is wanted back."""
        self._me = me
        self._answers = answers
        self._door = door
        self._runs = runs
        self._state = state
        self._draining = draining
        self._resting = resting
        self.patience_s = patience_s
        """Answers may take so long to end by themselves."""
        self._clock = clock
        self._since: float | None = None
        self._leaving: set[str] = set()
        """Models that were loaded when the drain began. One that is loaded later was asked for on this
        machine, or nobody else has it: keep-alive ends it."""

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await anyio.sleep(LOOK_S)
            await self.look()

    async def look(self) -> None:
        if not self._draining():
            self._since = None
            return
        now = self._clock.monotonic()
        if self._since is None:
            self._since = now
            self._leaving = {model.spec.name for model in self._runs.loaded()}
            log.info(DRAINS, resting=self._resting())
        if now - self._since >= self.patience_s:
            moved = self._answers.move(("", self._me)) + self._door.move(self.elsewhere)
            if moved:
                log.info(MOVED, answers=moved)
        for model in [one for one in self._runs.loaded() if one.spec.name in self._leaving]:
            # A model that placement keeps here leaves when it runs elsewhere, by its plan.
            if self._resting() or (not model.held and self.elsewhere(model.spec.name)):
                await self._unload(model)

    async def _unload(self, model: LoadedModel) -> None:
        """Now, or when its answers have ended."""
        try:
            await self._runs.unload(model.spec.name)
            self._leaving.discard(model.spec.name)
        except OllamaDistributedError as error:
            log.info(NOT_UNLOADED, model=model.name, code=error.code, reason=error.message)

    def elsewhere(self, model: str) -> bool:
        """Whether a living node that takes work has it, too."""
        state = self._state()
        held = state.models.get(name_key(model))
        nodes = (state.nodes.get(node) for node in held or () if node != self._me)
        return any(node is not None and node.status == "online" for node in nodes)
