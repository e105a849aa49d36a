"""What placing models needs of a node: something that brings, runs and removes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import msgspec

from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.load import Load
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.placement.facts import Device
from ollama_distributed.state.records import LoadedPlace, MeasuredSpeed


class Inventory(msgspec.Struct, frozen=True, kw_only=True):
    """What a node has for models now."""

    memory_bytes: int = 0
    """Main memory for models, those that run included."""
    gpu_bytes: int = 0
    seats: int = 0
    """Models that may be loaded at once; 0: any number."""
    disk_free_bytes: int = 0
    """For models that are not on their way yet."""
    speeds: tuple[MeasuredSpeed, ...] = ()
    loaded: tuple[LoadedPlace, ...] = ()


class Mover(Protocol):
    """Each is done when it returns, does nothing where it is done already, may be cancelled and
    then asked for again. What cannot be done is an `OllamaDistributedError`."""

    async def inventory(self) -> Inventory: ...

    async def fetch(self, model: str, digest: str, holders: Sequence[NodeId]) -> None:
        """Bring a model, whose manifest has this digest, from nodes that hold it."""
        ...

    async def load(self, model: str, device: Device) -> None:
        """Load it where there is room, and keep it loaded until `unload`."""
        ...

    async def unload(self, model: str) -> None:
        """Once its requests have ended."""
        ...

    async def delete(self, model: str) -> None:
        """Remove the name and the blobs that no other name needs; never the last copy."""
        ...


class Reports(Protocol):
    """How loaded nodes are (`cluster.load.LoadReports`)."""

    def interest(self, nodes: Iterable[NodeId]) -> None:
        """Keep the reports of these coming."""
        ...

    def report(self, node: NodeId) -> Load | None:
        """The latest of a node, with its age; None: none came yet."""
        ...


class Outside(Protocol):
    """Models that no node has (`distribution.looking.Looking`)."""

    async def look(self, name: str) -> tuple[ModelSpec, int]:
        """A model in its registry, and how many bytes were read to know it. Raises what the
        registry refuses with, `ModelNotFound` where it has none."""
        ...
