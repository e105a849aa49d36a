"""The models of the whole cluster, as lists and questions show them.

This node's own models come first; of the others, what their nodes wrote of them into the
replicated state. One row a name, because a request can only say a name: this node's, or
else the newest of those that the other nodes hold. What changes a model works on this node's
own disk; for a model that only others hold the refusal says where it is.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from ollama_distributed.base.errors import ModelNotFound, OllamaDistributedError, Unavailable
from ollama_distributed.base.ids import NodeId
from ollama_distributed.catalog.wire import CreateRequest, CreateStatus, ShownModel
from ollama_distributed.models.held import held_model as held_model
from ollama_distributed.models.held import spec_of
from ollama_distributed.models.names import name_key
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.state.cluster import ClusterState
from ollama_distributed.state.records import HeldModel

SHOW_TRIES = 3
_NAMED = 3
"""Nodes that a refusal names; there may be thousands."""


class Own(Protocol):
    """This node's models (`catalog.service.Catalog`)."""

    def knows(self, name: str) -> bool: ...

    async def resolve(self, name: str) -> ModelSpec: ...

    def list(self) -> list[ModelSpec]: ...

    async def show(self, name: str, *, verbose: bool = False) -> ShownModel: ...

    def create(self, request: CreateRequest, /) -> AsyncIterator[CreateStatus]: ...

    async def copy(self, source: str, destination: str) -> None: ...

    async def delete(self, name: str) -> None: ...

    async def has_blob(self, digest: str) -> bool: ...

    async def put_blob(self, digest: str, chunks: AsyncIterator[bytes]) -> bool: ...


class Showing(Protocol):
    """Asks another node for all that it knows of a model (`adapters.peers.pool.PeerPool`)."""

    async def show(self, node: NodeId, name: str, *, verbose: bool = False) -> ShownModel: ...


class ClusterCatalog:
    """Implements `gateway.ports.Catalog`. `state`: the latest, `Mirror.state`."""

    def __init__(self, own: Own, peers: Showing, me: NodeId, state: Callable[[], ClusterState]) -> None:
        self._own = own
        self._peers = peers
        self._me = me
        self._state = state
        self._listed: tuple[object, Sequence[ModelSpec]] = (None, ())

    # ── questions ───────────────────────────────────────────────────────────────────

    def list(self) -> list[ModelSpec]:
        """Newest first. Others' models are made into rows once per change of them."""
        own = self._own.list()
        known = {name_key(spec.name) for spec in own}
        elsewhere = (spec for spec in self._elsewhere() if spec.name not in known)
        return sorted((*own, *elsewhere), key=lambda spec: (-spec.modified_at, spec.name))

    async def resolve(self, name: str) -> ModelSpec:
        try:
            return await self._own.resolve(name)
        except ModelNotFound:
            held = self._newest(name_key(name))
            if held is None:
                raise
            return spec_of(held)

    async def show(self, name: str, *, verbose: bool = False) -> ShownModel:
        """Of a model that is not here, what a node that holds it says."""
        try:
            return await self._own.show(name, verbose=verbose)
        except ModelNotFound:
            holders = self._holders(name_key(name))
            if not holders:
                raise
        failure: OllamaDistributedError | None = None
        for node in holders[:SHOW_TRIES]:
            try:
                return await self._peers.show(node, name, verbose=verbose)
            except (Unavailable, ModelNotFound) as exc:
                failure = exc
        assert failure is not None
        raise failure

    # ── changes: this node's own ────────────────────────────────────────────────────

    def create(self, request: CreateRequest) -> AsyncIterator[CreateStatus]:
        return self._own.create(request)

    async def copy(self, source: str, destination: str) -> None:
        """
        Raises:
            ModelNotFound: it is not here; the message names nodes that hold it.
        """
        try:
            await self._own.copy(source, destination)
        except ModelNotFound as missing:
            raise self._not_here(source, missing, "copy it") from missing

    async def delete(self, name: str) -> None:
        """
        Raises:
            ModelNotFound: as `copy`.
        """
        try:
            await self._own.delete(name)
        except ModelNotFound as missing:
            raise self._not_here(name, missing, "delete it") from missing

    async def has_blob(self, digest: str) -> bool:
        return await self._own.has_blob(digest)

    async def put_blob(self, digest: str, chunks: AsyncIterator[bytes]) -> bool:
        return await self._own.put_blob(digest, chunks)

    # ── inside ──────────────────────────────────────────────────────────────────────

    def _elsewhere(self) -> Sequence[ModelSpec]:
        models = self._state().models
        if self._listed[0] is not models:
            newest = (self._newest(key) for key in models)
            self._listed = (models, [spec_of(held) for held in newest if held is not None])
        return self._listed[1]

    def _newest(self, key: str) -> HeldModel | None:
        """Of the other nodes' models of this name."""
        held = self._state().models.get(key)
        others = (model for node, model in held.items() if node != self._me) if held else ()
        return max(others, key=lambda model: (model.modified_at, model.digest), default=None)

    def _holders(self, key: str) -> tuple[NodeId, ...]:
        """Other nodes with it, living ones first."""
        state = self._state()
        held = [node for node in state.models.get(key, ()) if node != self._me and node in state.nodes]
        return tuple(sorted(held, key=lambda node: not state.nodes[node].alive))

    def _not_here(self, name: str, missing: ModelNotFound, do: str) -> ModelNotFound:
        holders = self._holders(name_key(name))
        if not holders:
            return missing
        names = [self._state().nodes[node].name for node in holders]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        where = ", ".join(names[:_NAMED]) + more
        return ModelNotFound(f"model '{name}' is not on this node but on {where}; {do} there")
