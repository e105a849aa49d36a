"""The models of the whole cluster: the same lists and answers at every node, changed from any.

One row a name, because a request can only say a name: of the versions that nodes hold the one
that counts (`catalog.versions`), also where an older one lies on this node's own disk. Of the
others, what their nodes wrote of them into the replicated state; of this node, what its disk
says. A deletion is a record in that state, which each node follows; what is made of a model is
made where the model lies.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Protocol, TypeVar

import msgspec
import structlog

from ollama_distributed.base.errors import (
    DeadlineExceeded,
    InvalidModel,
    InvalidName,
    ModelNotFound,
    OllamaDistributedError,
    Unavailable,
    Unsupported,
)
from ollama_distributed.base.ids import NodeId
from ollama_distributed.catalog.wire import CreateRequest, CreateStatus, ShownModel
from ollama_distributed.models.held import held_model as held_model
from ollama_distributed.models.held import spec_of
from ollama_distributed.models.names import ModelName, name_key
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.state.cluster import ClusterState
from ollama_distributed.state.deleting import DeleteModel
from ollama_distributed.state.records import HeldModel

log = structlog.get_logger()
T = TypeVar("T")

TRIES = 3
"""Holders that are asked, one after the other."""
_NAMED = 3
"""Nodes that a refusal names; there may be thousands."""


class Own(Protocol):
    """This node's models (`catalog.service.Catalog`)."""

    async def resolve(self, name: str) -> ModelSpec: ...

    def list(self) -> list[ModelSpec]: ...

    async def show(self, name: str, *, verbose: bool = False) -> ShownModel: ...

    def create(self, request: CreateRequest, /) -> AsyncIterator[CreateStatus]: ...

    async def copy(self, source: str, destination: str) -> None: ...

    async def delete(self, name: str) -> None: ...

    async def has_blob(self, digest: str) -> bool: ...

    async def put_blob(self, digest: str, chunks: AsyncIterator[bytes], size: int = 0) -> bool: ...


class Peers(Protocol):
    """Asks other nodes about their models (`adapters.peers.names.NameExchange`)."""

    async def show(self, node: NodeId, name: str, *, verbose: bool = False) -> ShownModel: ...

    async def copy(self, node: NodeId, source: str, destination: str) -> None:
        """Give one of its models a second name there."""
        ...


class Bringing(Protocol):
    """Brings here what other nodes hold (`distribution.bringing.Bringing`)."""

    def model(self, name: str) -> AsyncGenerator[Line]:
        """A model as it counts in the cluster."""
        ...

    async def has(self, digest: str) -> bool:
        """Whether another node has the blob."""
        ...

    async def blob(self, digest: str) -> None:
        """
        Raises:
            BlobNotFound: no node that can be reached has it.
        """
        ...


class Line(Protocol):
    """What a copy tells (`distribution.ports.Status`)."""

    @property
    def status(self) -> str: ...

    @property
    def digest(self) -> str: ...

    @property
    def total(self) -> int: ...

    @property
    def completed(self) -> int: ...


class Consensus(Protocol):
    """The door to it; this node may be between two clusters, or cut off."""

    async def propose(self, change: DeleteModel, /) -> None:
        """
        Raises:
            Unavailable: it was not made. DeadlineExceeded: it may have been made. Within two seconds.
        """
        ...

    async def seen(self, predicate: Callable[[ClusterState], bool], /) -> None:
        """Wait until the state here shows it, a second at most."""
        ...


class _Held(msgspec.Struct, frozen=True):
    """What counts of a name among the other nodes."""

    model: HeldModel
    spec: ModelSpec
    alive: bool
    """A node that lives holds it."""


class ClusterCatalog:
    """Implements `gateway.ports.Catalog`. `state`: the latest, `Mirror.state`."""

    def __init__(
        self,
        own: Own,
        peers: Peers,
        me: NodeId,
        state: Callable[[], ClusterState],
        consensus: Consensus,
    ) -> None:
        self._own = own
        self._peers = peers
        self._me = me
        self._state = state
        self._consensus = consensus
        self._made_from: tuple[object, object] = (None, None)
        self._others: Mapping[str, _Held] = {}
        self._bringing: Bringing | None = None

    def bring_by(self, bringing: Bringing) -> None:
        """From now on a create finds what it needs on other nodes too."""
        self._bringing = bringing

    # ── questions ───────────────────────────────────────────────────────────────────

    def list(self) -> list[ModelSpec]:
        """Newest first."""
        own = {name_key(spec.name): spec for spec in self._own.list() if not self._deleted(spec)}
        others = self._elsewhere()
        rows = [self._counting(spec, others.get(key)) for key, spec in own.items()]
        rows += [other.spec for key, other in others.items() if key not in own]
        return sorted(rows, key=lambda spec: (-spec.modified_at, spec.name))

    async def resolve(self, name: str) -> ModelSpec:
        other = self._elsewhere().get(name_key(name))
        try:
            own = await self._here(name)
        except (ModelNotFound, InvalidModel):
            if other is None:
                raise
            return other.spec
        return self._counting(own, other)

    async def show(self, name: str, *, verbose: bool = False) -> ShownModel:
        """What a node that holds the version says."""
        spec = await self.resolve(name)
        if await self._is_here(name, spec.digest):
            shown = await self._own.show(name, verbose=verbose)
        else:
            shown = await self._asked(
                name, lambda node: self._peers.show(node, name, verbose=verbose), spec.digest
            )
        return msgspec.structs.replace(shown, modified_at=spec.modified_at)

    async def has_blob(self, digest: str) -> bool:
        """Whether a create here would find it."""
        if await self._own.has_blob(digest):
            return True
        return self._bringing is not None and await self._bringing.has(digest)

    # ── changes ─────────────────────────────────────────────────────────────────────

    async def create(self, request: CreateRequest) -> AsyncIterator[CreateStatus]:
        """Make a model on this node. What it is made from, and other nodes hold, comes here first."""
        if self._bringing is not None:
            for given in (request.files, request.adapters):
                for digest in (given or {}).values():
                    if not await self._own.has_blob(digest):
                        await self._bringing.blob(digest)
            if request.from_ and await self._lies_elsewhere(request.from_):
                async with aclosing(self._bringing.model(request.from_)) as lines:
                    async for line in lines:
                        if line.digest:
                            yield CreateStatus(
                                status=line.status,
                                digest=line.digest,
                                total=line.total,
                                completed=line.completed,
                            )
        async for status in self._own.create(request):
            yield status

    async def put_blob(self, digest: str, chunks: AsyncIterator[bytes], size: int = 0) -> bool:
        return await self._own.put_blob(digest, chunks, size)

    async def copy(self, source: str, destination: str) -> None:
        """Give the model a second name, where it lies.

        Raises:
            ModelNotFound, InvalidName: as of this node's own.
            Unavailable: no node that holds it can be asked.
        """
        key = name_key(source)
        other = self._elsewhere().get(key)
        try:
            own: ModelSpec | None = await self._here(source)
        except (ModelNotFound, InvalidModel):
            own = None
        if other is None or (own is not None and self._counting(own, other).digest == own.digest):
            await self._own.copy(source, destination)
            return
        if other.model.remote:
            raise Unsupported(f"{source} lives in another engine of {self._named(key)} and cannot be copied")
        _check(destination, f'destination "{destination}" is invalid')

        async def copied(node: NodeId) -> NodeId:
            await self._peers.copy(node, source, destination)
            return node

        there, made = await self._asked(source, copied, other.model.digest), name_key(destination)

        def shows(state: ClusterState) -> bool:
            held = state.models.get(made)
            return held is not None and there in held and held[there].digest == other.model.digest

        await self._consensus.seen(shows)

    async def delete(self, name: str) -> None:
        """Remove a name everywhere, also from nodes that are away: they do it when they return.

        Raises:
            ModelNotFound, InvalidName: as of this node's own.
            Unsupported: it lives in an engine of some node.
            Unavailable: other nodes hold it, and the cluster cannot agree on anything now.
        """
        _check(name, f'name "{name}" is invalid')
        key = name_key(name)
        state = self._state()
        held = [model for node, model in state.models.get(key, {}).items() if node != self._me]
        here = False
        try:
            here = (await self._own.resolve(name)).remote is None
        except InvalidModel:
            here = True  # what cannot be served can be deleted
        except ModelNotFound:
            if not held:
                raise
        if held and not here and all(model.remote for model in held):
            raise Unsupported(f"{name} lives in another engine of {self._named(key)}; delete it there")
        if any(node != self._me for node in state.nodes) and (here or held):
            await self._delete_everywhere(key, name, elsewhere=bool(held))
        try:
            await self._own.delete(name)
        except ModelNotFound:
            if here or held:
                return  # it was elsewhere, or the deletion was heard of already
            raise

    # ── inside ──────────────────────────────────────────────────────────────────────

    async def _delete_everywhere(self, key: str, name: str, *, elsewhere: bool) -> None:
        try:
            await self._consensus.propose(DeleteModel(model=key))
        except (Unavailable, DeadlineExceeded) as exc:
            if elsewhere:
                raise type(exc)(
                    f"model '{name}' is also on {self._named(key)}, and the cluster cannot agree to "
                    f"delete it now: {exc.message}"
                ) from exc
            log.info("catalog.deleted_here_only", model=key, reason=exc.message)

    async def _here(self, name: str) -> ModelSpec:
        """
        Raises:
            ModelNotFound: it is not here, or was deleted in the cluster.
        """
        spec = await self._own.resolve(name)
        if self._deleted(spec):
            raise ModelNotFound(f"model '{name}' not found")
        return spec

    async def _lies_elsewhere(self, name: str) -> bool:
        """The version that counts is one that can come from other nodes."""
        other = self._elsewhere().get(name_key(name))
        return (
            other is not None
            and not other.model.remote
            and not await self._is_here(name, (await self.resolve(name)).digest)
        )

    async def _is_here(self, name: str, digest: str) -> bool:
        try:
            return (await self._own.resolve(name)).digest == digest
        except (ModelNotFound, InvalidModel):
            return False

    def _deleted(self, spec: ModelSpec) -> bool:
        record = self._state().deleted.get(name_key(spec.name))
        return record is not None and spec.modified_at <= record.until and spec.remote is None

    def _counting(self, own: ModelSpec, other: _Held | None) -> ModelSpec:
        """Of this node's version and the best of the others' the one that counts."""
        if other is None:
            return own
        if own.digest == other.model.digest:
            latest = max(own.modified_at, other.model.modified_at)
            return own if latest == own.modified_at else msgspec.structs.replace(own, modified_at=latest)
        newer = (other.model.modified_at, other.model.digest) > (own.modified_at, own.digest)
        return other.spec if other.alive and newer else own

    def _elsewhere(self) -> Mapping[str, _Held]:
        """The version of each name that counts among the other nodes; made once per change."""
        state = self._state()
        if self._made_from[0] is not state.models or self._made_from[1] is not state.counts:
            found: dict[str, _Held] = {}
            for key, held in state.models.items():
                best = max(
                    (self._rank(state, node, held[node]) for node in held if node != self._me), default=None
                )
                if best is not None:
                    alive, _, _, node = best
                    found[key] = _Held(held[node], spec_of(held[node]), alive)
            self._made_from, self._others = (state.models, state.counts), found
        return self._others

    def _rank(self, state: ClusterState, node: NodeId, model: HeldModel) -> tuple[bool, float, str, NodeId]:
        known = state.nodes.get(node)
        return known is not None and known.alive, model.modified_at, model.digest, node

    def _holders(self, key: str, digest: str) -> tuple[NodeId, ...]:
        """Other nodes with this version, living ones first."""
        state = self._state()
        same = [
            node
            for node, model in state.models.get(key, {}).items()
            if node != self._me and node in state.nodes and model.digest == digest
        ]
        return tuple(sorted(same, key=lambda node: not state.nodes[node].alive))

    async def _asked(self, name: str, ask: Callable[[NodeId], Awaitable[T]], digest: str) -> T:
        """The first answer of the nodes that hold this version.

        Raises:
            what the last one failed with.
        """
        failure: OllamaDistributedError = ModelNotFound(f"model '{name}' not found")
        for node in self._holders(name_key(name), digest)[:TRIES]:
            try:
                return await ask(node)
            except (Unavailable, ModelNotFound) as exc:
                failure = exc
        raise failure

    def _named(self, key: str) -> str:
        """Other nodes that hold it, for people."""
        state = self._state()
        names = [
            state.nodes[node].name
            for node in state.models.get(key, ())
            if node != self._me and node in state.nodes
        ]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return ", ".join(names[:_NAMED]) + more


def _check(name: str, message: str) -> None:
    try:
        ModelName.parse(name)
    except InvalidName as exc:
        raise InvalidName(message) from exc
