"""What the gateway's management routes need of the node: models on disk, models in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

import msgspec

from ollama_distributed.catalog.wire import CreateRequest, CreateStatus, ShownModel
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.serving.ports import EngineInfo


class Catalog(Protocol):
    """The models on disk (`catalog/service.py`)."""

    async def resolve(self, name: str) -> ModelSpec: ...

    def list(self) -> list[ModelSpec]: ...

    async def show(self, name: str, *, verbose: bool = False) -> ShownModel: ...

    def create(self, request: CreateRequest, /) -> AsyncIterator[CreateStatus]: ...

    async def copy(self, source: str, destination: str) -> None: ...

    async def delete(self, name: str) -> None: ...

    async def has_blob(self, digest: str) -> bool: ...

    async def put_blob(self, digest: str, chunks: AsyncIterator[bytes]) -> bool: ...


class Resident(Protocol):
    """One loaded model (`serving.service.LoadedModel`)."""

    @property
    def name(self) -> str: ...

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def memory_bytes(self) -> int: ...

    @property
    def vram_bytes(self) -> int: ...

    @property
    def context_tokens(self) -> int: ...

    @property
    def slots(self) -> int: ...

    @property
    def slots_busy(self) -> int: ...

    @property
    def expires_at(self) -> float | None:
        """Seconds since the Unix epoch; None: never."""
        ...

    @property
    def engine(self) -> EngineInfo: ...


class Residents(Protocol):
    """The models in memory (`serving/service.py`)."""

    def loaded(self) -> list[Resident]: ...

    async def unload(self, name: str) -> None: ...


class VersionInfo(msgspec.Struct, frozen=True, kw_only=True):
    version: str
    """Of this program."""
    ollama: str
    """The Ollama version whose API is spoken; some clients compare it."""
    node: str = ""
    engines: tuple[EngineInfo, ...] = ()
