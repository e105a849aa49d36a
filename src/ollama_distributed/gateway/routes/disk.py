"""Disks of nodes: how full, what may go, whether files are sound."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, nullcontext

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ollama_distributed.base.disk import DiskAnswer, EvictAnswer, EvictAsk, ScrubRow
from ollama_distributed.base.errors import MissingBody
from ollama_distributed.gateway.cluster_port import Cluster
from ollama_distributed.gateway.cold import ColdRequest
from ollama_distributed.gateway.disk_port import Disks
from ollama_distributed.gateway.routes.nodes import TAG, naming
from ollama_distributed.gateway.routes.table import ColdRoute, json_response

_EVICT = msgspec.json.Decoder(EvictAsk)


def disk_routes(disks: Disks, cluster: Cluster | None) -> list[ColdRoute]:
    """`cluster`: knows which nodes there are, for who mistyped one."""
    handlers = _Handlers(disks, cluster)
    return [
        ColdRoute(
            method="GET",
            path="/api/v1/nodes/{id}/disk",
            verb="read",
            run=handlers.disk,
            tag=TAG,
            summary="How full a node's disk is, which models may go from it, how far a scrub is",
            answer=DiskAnswer,
        ),
        ColdRoute(
            method="POST",
            path="/api/v1/nodes/{id}/scrub",
            verb="admin",
            run=handlers.scrub,
            tag=TAG,
            summary="Read every file of a node's models again; damaged ones are fetched from other nodes",
            answer=ScrubRow,
            status=202,
        ),
        ColdRoute(
            method="POST",
            path="/api/v1/models/{name:path}/evict",
            verb="models",
            run=handlers.evict,
            tag="REST",
            summary="Let a node's copy of a model go; the last one only if that is said",
            body=EvictAsk,
            body_optional=True,
            answer=EvictAnswer,
        ),
    ]


class _Handlers:
    def __init__(self, disks: Disks, cluster: Cluster | None) -> None:
        self._disks = disks
        self._cluster = cluster

    async def disk(self, _cold: ColdRequest, request: Request) -> Response:
        node = request.path_params["id"]
        async with self._naming(node):
            return json_response(await self._disks.disk(node))

    async def scrub(self, _cold: ColdRequest, request: Request) -> Response:
        node = request.path_params["id"]
        async with self._naming(node):
            return json_response(await self._disks.scrub(node), 202)

    async def evict(self, cold: ColdRequest, request: Request) -> Response:
        try:
            ask = await cold.body(request, _EVICT)
        except MissingBody:
            ask = EvictAsk()
        name = request.path_params["name"]
        async with self._naming(ask.node):
            return json_response(await self._disks.evict(name, ask.node, last_copy=ask.last_copy))

    def _naming(self, node: str) -> AbstractAsyncContextManager[None]:
        return naming(self._cluster, node) if self._cluster is not None and node else nullcontext()
