"""Questions about files and batches from node to node: both sides of the hop."""

from __future__ import annotations

import msgspec

from ollama_distributed.adapters.peers.door import PeerDoor
from ollama_distributed.adapters.peers.pool import PeerPool
from ollama_distributed.base.batches import Batch, FileDeleted, FileObject
from ollama_distributed.base.ids import NodeId
from ollama_distributed.batches.files import Files
from ollama_distributed.batches.records import Asked, CreateAsked, ListAsked, ReadAsked
from ollama_distributed.batches.service import Batches
from ollama_distributed.cluster.identity.ca import Peer

FILE, FILES, READ, DELETE = "files/one", "files/list", "files/read", "files/delete"
CREATE, BATCH, BATCHES, CANCEL = "batches/create", "batches/one", "batches/list", "batches/cancel"

SHOW_S = 3.0
"""It is a look into memory."""
CHANGE_S = 10.0
"""A file is read, or a record written."""


class _FileRows(msgspec.Struct, frozen=True):
    rows: tuple[FileObject, ...]


class _BatchRows(msgspec.Struct, frozen=True):
    rows: tuple[Batch, ...]


class _Piece(msgspec.Struct, frozen=True):
    data: bytes


class BatchExchange:
    """Implements `batches.cluster.Others`."""

    def __init__(self, pool: PeerPool) -> None:
        self._pool = pool

    async def file(self, node: NodeId, asked: Asked) -> FileObject:
        return await self._pool.ask(node, FILE, asked, FileObject, deadline_s=SHOW_S, fresh=False)

    async def files(self, node: NodeId, asked: ListAsked) -> tuple[FileObject, ...]:
        return (await self._pool.ask(node, FILES, asked, _FileRows, deadline_s=SHOW_S, fresh=False)).rows

    async def read(self, node: NodeId, asked: ReadAsked) -> bytes:
        return (await self._pool.ask(node, READ, asked, _Piece, deadline_s=CHANGE_S, fresh=False)).data

    async def delete_file(self, node: NodeId, asked: Asked) -> FileDeleted:
        return await self._pool.ask(node, DELETE, asked, FileDeleted, deadline_s=CHANGE_S)

    async def create(self, node: NodeId, asked: CreateAsked) -> Batch:
        return await self._pool.ask(node, CREATE, asked, Batch, deadline_s=CHANGE_S)

    async def batch(self, node: NodeId, asked: Asked) -> Batch:
        return await self._pool.ask(node, BATCH, asked, Batch, deadline_s=SHOW_S, fresh=False)

    async def batches(self, node: NodeId, asked: ListAsked) -> tuple[Batch, ...]:
        return (await self._pool.ask(node, BATCHES, asked, _BatchRows, deadline_s=SHOW_S, fresh=False)).rows

    async def cancel(self, node: NodeId, asked: Asked) -> Batch:
        return await self._pool.ask(node, CANCEL, asked, Batch, deadline_s=CHANGE_S, fresh=False)


def open_batch_door(door: PeerDoor, files: Files, batches: Batches) -> None:
    """Answer other nodes' questions about what this node keeps."""

    async def file(_peer: Peer, asked: Asked) -> FileObject:
        return files.get(asked)

    async def listed(_peer: Peer, asked: ListAsked) -> _FileRows:
        return _FileRows(tuple(files.list(asked)))

    async def read(_peer: Peer, asked: ReadAsked) -> _Piece:
        return _Piece(await files.read(asked))

    async def delete(_peer: Peer, asked: Asked) -> FileDeleted:
        return await files.delete(asked)

    async def create(_peer: Peer, asked: CreateAsked) -> Batch:
        return await batches.create(asked)

    async def batch(_peer: Peer, asked: Asked) -> Batch:
        return batches.get(asked)

    async def made(_peer: Peer, asked: ListAsked) -> _BatchRows:
        return _BatchRows(tuple(batches.list(asked)))

    async def cancel(_peer: Peer, asked: Asked) -> Batch:
        return await batches.cancel(asked)

    door.add(FILE, file, Asked)
    door.add(FILES, listed, ListAsked)
    door.add(READ, read, ReadAsked)
    door.add(DELETE, delete, Asked)
    door.add(CREATE, create, CreateAsked)
    door.add(BATCH, batch, Asked)
    door.add(BATCHES, made, ListAsked)
    door.add(CANCEL, cancel, Asked)
