"""Models that come from other nodes: what a registry is to a pull, the cluster is to a copy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import msgspec
import structlog

from ollama_distributed.base.errors import (
    ModelNotFound,
    NotFound,
    NotOffered,
    OllamaDistributedError,
    RegistryError,
    Unavailable,
)
from ollama_distributed.base.ids import NodeId
from ollama_distributed.distribution.downloads import Origins
from ollama_distributed.distribution.exchange import CopyAsk, Exchange
from ollama_distributed.distribution.ports import Blobs, Partial, Told
from ollama_distributed.distribution.swarm import Swarm
from ollama_distributed.models.manifest import MAX_MANIFEST_BYTES, Layer
from ollama_distributed.models.names import BlobId, ModelName, name_key

log = structlog.get_logger()

MAX_NAMES = 256
"""Copies whose origins are remembered."""
MAX_SOURCES = 16
"""Holders that are asked; more are met through them."""

Holders = Callable[[str], Iterable[NodeId]]
"""Of a model, by `name_key`: living nodes that have the version that counts, as the replicated
state says."""
MadeAt = Callable[[str, str], float | None]
"""Of a model, by `name_key`, and its manifest's sha256 in hex: when that version was made."""


class Given:
    """What nodes gave of a model. Implements `swarm.Told`."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}
        self.dropped: dict[str, None] = {}

    @property
    def origins(self) -> Origins:
        return Origins(dict(self.bytes), tuple(self.dropped))

    def received(self, node: NodeId, count: int) -> None:
        self.bytes[node] = self.bytes.get(node, 0) + count

    def lied(self, node: NodeId) -> None:
        self.dropped[node] = None


class _Copy(Given):
    """What is known of the copy of one name."""

    def __init__(self, ask: CopyAsk) -> None:
        super().__init__()
        self.ask = ask
        self.made_at: float | None = None


class ClusterSource:
    """Implements `ports.Registry` as far as fetching goes."""

    def __init__(
        self,
        swarm: Swarm,
        exchange: Exchange,
        holders: Holders,
        made_at: MadeAt = lambda _key, _digest: None,
    ) -> None:
        self._swarm = swarm
        self._exchange = exchange
        self._holders = holders
        self._made_at = made_at
        self._copies: dict[str, _Copy] = {}

    def expect(self, ask: CopyAsk) -> None:
        """The next copy of this name has these sources and peers."""
        key = name_key(ask.name)
        self._copies.pop(key, None)
        self._copies[key] = _Copy(ask)
        if len(self._copies) > MAX_NAMES:
            del self._copies[next(iter(self._copies))]

    def origins(self, name: str) -> Origins:
        copy = self._copies.get(name_key(name))
        return Origins() if copy is None else copy.origins

    def made_at(self, name: ModelName) -> float | None:
        """Of the version whose manifest came last."""
        copy = self._copies.get(name.key)
        return copy.made_at if copy is not None else None

    # ── `ports.Registry` ────────────────────────────────────────────────────────────

    def check(self, name: ModelName) -> None:
        """Any name: nobody outside is asked."""

    async def manifest(self, name: ModelName) -> bytes:
        """
        Raises:
            ModelNotFound: nobody has the model.
            Unavailable: who has it cannot be reached, or has another version than is wanted.
        """
        failure: OllamaDistributedError = ModelNotFound(f"no node has model '{name.display}'")
        wanted = self._wanted(name_key(str(name)))
        for node in self._sources(name):
            try:
                data = await self._exchange.manifest(node, str(name))
            except NotFound:
                continue
            except OllamaDistributedError as exc:
                failure = exc
                continue
            if len(data) <= MAX_MANIFEST_BYTES and wanted in ("", hashlib.sha256(data).hexdigest()):
                # Noted now: until the copy is there the version may be deleted everywhere.
                copy = self._copies.setdefault(name.key, _Copy(CopyAsk(name=str(name))))
                copy.made_at = self._made_at(name.key, hashlib.sha256(data).hexdigest())
                return data
            if len(data) <= MAX_MANIFEST_BYTES:
                failure = Unavailable(f"node {node} has another version of '{name.display}' by now")
                continue
            failure = RegistryError(f"node {node} sends a manifest that is too long")
        raise failure

    async def fetch(self, name: ModelName, blob: BlobId, into: Partial) -> None:
        copy = self._copies.setdefault(name_key(str(name)), _Copy(CopyAsk(name=str(name))))
        sources = self._sources(name)
        if not sources:
            raise Unavailable(f"no node that lives has model '{name.display}'")
        await self._swarm.fetch(blob, into, (*sources, *copy.ask.peers), copy)

    def disproved(self, name: ModelName, blob: BlobId) -> bool:
        giver = self._swarm.disproved(blob)
        copy = self._copies.get(name_key(str(name)))
        if giver is not None and copy is not None:
            copy.lied(giver)
        return any(self._swarm.trusted(blob, node) for node in self._sources(name))

    async def read_part(self, name: ModelName, _layer: Layer, _begin: int, _end: int) -> bytes:
        raise NotOffered(f"{name.display}: what nodes hold of it is in the state")

    async def send(self, name: ModelName, _layer: Layer, _source: Blobs, _told: Told) -> None:
        raise NotOffered(f"{name.display}: nodes fetch what they need; nothing is pushed to them")

    async def send_manifest(self, name: ModelName, _data: bytes) -> None:
        raise NotOffered(f"{name.display}: nodes fetch what they need; nothing is pushed to them")

    # ── inside ──────────────────────────────────────────────────────────────────────

    def _wanted(self, key: str) -> str:
        """The version that this copy was asked for; who copies the name next may want another."""
        copy = self._copies.get(key)
        if copy is None or not copy.ask.digest:
            return ""
        wanted, copy.ask = copy.ask.digest, msgspec.structs.replace(copy.ask, digest="")
        return wanted

    def _sources(self, name: ModelName) -> tuple[NodeId, ...]:
        key = name_key(str(name))
        copy = self._copies.get(key)
        told = copy.ask.sources if copy is not None else ()
        found = dict.fromkeys((*told, *self._holders(key)))
        found.pop(self._swarm.me, None)
        return tuple(found)[:MAX_SOURCES]
