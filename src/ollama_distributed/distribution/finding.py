"""Which nodes have a blob: they are asked, since the replicated state knows of models only."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import structlog

from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.tasks import end
from ollama_distributed.distribution.neighbours import Neighbours
from ollama_distributed.models.names import BlobId

log = structlog.get_logger()

MOST_ASKED = 32
MORE_S = 0.1
"""After the first that has it, for others that may have it too: more of them give faster."""


async def holding(neighbours: Neighbours, blob: BlobId, nodes: Iterable[NodeId]) -> dict[NodeId, int]:
    """Of so many of `nodes` as are asked those that have it whole, with its size in bytes."""
    found: dict[NodeId, int] = {}

    async def look(node: NodeId) -> None:
        try:
            size = await neighbours.size(node, blob.digest)
        except OllamaDistributedError as exc:
            log.info("distribution.not_asked", node=node, error=exc.message)
            return
        if size is not None:
            found[node] = size

    looking = {asyncio.create_task(look(node), name=f"blob at {node}") for node in list(nodes)[:MOST_ASKED]}
    try:
        waiting = looking
        while waiting and not found:
            _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if waiting:
            await asyncio.wait(waiting, timeout=MORE_S)
    finally:
        await end(list(looking))
    return found
