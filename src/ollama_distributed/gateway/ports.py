"""What the gateway's management routes need of the node: models on disk, models in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Literal, Protocol

import msgspec

from ollama_distributed.base.disk import EvictAnswer
from ollama_distributed.base.pieces import PieceFigures
from ollama_distributed.base.transfers import TransferFigures
from ollama_distributed.catalog.wire import CreateRequest, CreateStatus, ShownModel
from ollama_distributed.distribution.downloads import Transfer
from ollama_distributed.distribution.packing import Bundle
from ollama_distributed.distribution.ports import Status
from ollama_distributed.distribution.service import ModelStatus
from ollama_distributed.distribution.unpacking import Imported
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.serving.loaded import LoadedModel
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

    async def put_blob(self, digest: str, chunks: AsyncIterator[bytes], size: int = 0) -> bool:
        """`size`: how much will come, where that is said."""
        ...


class Residents(Protocol):
    """The models in memory (`serving/service.py`)."""

    def loaded(self) -> list[LoadedModel]: ...

    async def unload(self, name: str) -> None: ...


class Transfers(Protocol):
    """Models from and to registries (`distribution/`)."""

    def pull(self, name: str) -> AsyncIterator[Status]:
        """Fetch a model. Closing the iterator ends the work, unless others wait for it too."""
        ...

    def push(self, name: str) -> AsyncIterator[Status]: ...

    def download(self, name: str) -> Transfer:
        """Begin to fetch a model, and go on without anybody waiting."""
        ...

    def figures(self) -> TransferFigures:
        """Of this node."""
        ...


class Moves(Protocol):
    """Models between nodes (`distribution.service.ModelManager`)."""

    async def distribute(self, name: str, nodes: Sequence[str] = ()) -> Sequence[Transfer]:
        """Have these nodes fetch a model; none named: every living one that lacks it."""
        ...

    async def transfers(self) -> Sequence[Transfer]:
        """Of the whole cluster, newest first."""
        ...

    async def transfer(self, transfer_id: str) -> Transfer: ...

    async def cancel(self, transfer_id: str) -> Transfer:
        """What was fetched stays for the next time."""
        ...

    async def get_status(self, name: str) -> ModelStatus:
        """Where a model is, and where it is going."""
        ...

    def list(self) -> Sequence[ModelStatus]:
        """Of every model, without what is on its way."""
        ...

    async def remove(
        self, name: str, nodes: Sequence[str] = (), *, last_copy: bool = False
    ) -> Sequence[EvictAnswer]:
        """The copies of these nodes; none named: the model. `last_copy`: even if no other has it."""
        ...

    def figures(self) -> PieceFigures:
        """Of this node, from memory."""
        ...


class Bundles(Protocol):
    """Models in one file (`distribution.bundles.Bundles`)."""

    async def pack(self, names: Sequence[str]) -> Bundle: ...

    async def unpack(
        self, chunks: AsyncIterator[bytes], *, name: str = "", replace: bool = False
    ) -> Sequence[Imported]:
        """All models of the file, or none. `name`: of the one model; `replace`: others of its name."""
        ...


PreloadState = Literal["waiting", "fetching", "loading", "loaded", "failed"]


class Preloaded(msgspec.Struct, frozen=True):
    """A model that was to be loaded at the start."""

    state: PreloadState
    error: str = ""


class VersionInfo(msgspec.Struct, frozen=True, kw_only=True):
    version: str
    """Of this program."""
    ollama: str
    """The Ollama version whose API is spoken; some clients compare it."""
    node: str = ""
    """Its id."""
    name: str = ""
    """What people call it; in `X-Ollama-Node` of every answer. Empty: answers do not say."""
    engines: tuple[EngineInfo, ...] = ()
