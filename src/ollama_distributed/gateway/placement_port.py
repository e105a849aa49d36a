"""What the routes of models' places need of the node (`placement.desk.Desk`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ollama_distributed.base.placement import (
    FitAnswer,
    PlaceAsk,
    PlacementFigures,
    PlacesAnswer,
    ReplicasAsk,
    WhatIfAnswer,
)


class Places(Protocol):
    """Names of models as people write them, nodes by id or by a name that only one has. Orders go
    to the leader and may raise `Unavailable`, `Conflict`, `NotFound` and `Invalid`."""

    async def fit(
        self, name: str, *, context_tokens: int | None, slots: int | None, look: bool = True
    ) -> FitAnswer:
        """None: as nodes load it when nobody says otherwise. `look`: at a model that no node has, in
        its registry."""
        ...

    async def places(self, name: str) -> PlacesAnswer: ...

    async def all_places(self) -> Sequence[PlacesAnswer]:
        """Of every model, without rows."""
        ...

    def figures(self) -> PlacementFigures: ...

    async def replicas(self, name: str, ask: ReplicasAsk, *, actor: str) -> PlacesAnswer: ...

    async def place(self, name: str, ask: PlaceAsk, *, actor: str) -> PlacesAnswer: ...

    async def pin(self, name: str, node: str, *, actor: str) -> PlacesAnswer: ...

    async def unpin(self, name: str, node: str, *, actor: str) -> PlacesAnswer: ...

    async def what_if(self, lose: Sequence[str]) -> WhatIfAnswer: ...
