"""The nodes of the cluster under `/api/v1/nodes`. A node is named by its id, or by a name that
only one node has."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ollama_distributed.base.cluster import LabelAsk, NodeRow, NodesAnswer
from ollama_distributed.base.errors import NotFound
from ollama_distributed.gateway.cluster_port import Cluster
from ollama_distributed.gateway.cold import ColdRequest
from ollama_distributed.gateway.routes.table import ColdRoute, actor, flag, json_response
from ollama_distributed.state.naming import unknown_node

TAG = "Cluster: nodes"

_LABELS = msgspec.json.Decoder(LabelAsk)


def nodes_routes(cluster: Cluster) -> list[ColdRoute]:
    handlers = _Handlers(cluster)
    return [
        ColdRoute(
            method="GET",
            path="/api/v1/nodes",
            verb="read",
            run=handlers.nodes,
            tag=TAG,
            summary="All nodes with status and usage",
            answer=NodesAnswer,
        ),
        ColdRoute(
            method="GET",
            path="/api/v1/nodes/{id}",
            verb="read",
            run=handlers.node,
            tag=TAG,
            summary="One node, by id or name",
            answer=NodeRow,
        ),
        ColdRoute(
            method="PATCH",
            path="/api/v1/nodes/{id}",
            verb="admin",
            run=handlers.label,
            tag=TAG,
            summary="Set labels; null takes one away",
            body=LabelAsk,
            answer=NodeRow,
        ),
        ColdRoute(
            method="POST",
            path="/api/v1/nodes/{id}/drain",
            verb="admin",
            run=handlers.drain,
            tag=TAG,
            summary="Give the node no new work",
            answer=NodeRow,
        ),
        ColdRoute(
            method="POST",
            path="/api/v1/nodes/{id}/undrain",
            verb="admin",
            run=handlers.undrain,
            tag=TAG,
            summary="Give the node work again",
            answer=NodeRow,
        ),
        ColdRoute(
            method="DELETE",
            path="/api/v1/nodes/{id}",
            verb="admin",
            run=handlers.remove,
            tag=TAG,
            summary="Revoke a node's identity; one that is online only with ?force=true",
            query=("force",),
            status=204,
        ),
    ]


class _Handlers:
    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    async def nodes(self, cold: ColdRequest, _request: Request) -> Response:
        return json_response(NodesAnswer({row.id: _seen(row, cold) for row in await self._cluster.nodes()}))

    async def node(self, cold: ColdRequest, request: Request) -> Response:
        name = request.path_params["id"]
        async with naming(self._cluster, name):
            return json_response(_seen(await self._cluster.node(name), cold))

    async def label(self, cold: ColdRequest, request: Request) -> Response:
        name = request.path_params["id"]
        ask = await cold.body(request, _LABELS)
        async with naming(self._cluster, name):
            row = await self._cluster.label(name, ask.labels, actor=actor(cold))
        return json_response(_seen(row, cold))

    async def drain(self, cold: ColdRequest, request: Request) -> Response:
        name = request.path_params["id"]
        async with naming(self._cluster, name):
            row = await self._cluster.drain(name, actor=actor(cold))
        return json_response(_seen(row, cold))

    async def undrain(self, cold: ColdRequest, request: Request) -> Response:
        name = request.path_params["id"]
        async with naming(self._cluster, name):
            row = await self._cluster.undrain(name, actor=actor(cold))
        return json_response(_seen(row, cold))

    async def remove(self, cold: ColdRequest, request: Request) -> Response:
        name = request.path_params["id"]
        force = flag(request, "force")
        async with naming(self._cluster, name):
            await self._cluster.remove(name, force=force, actor=actor(cold))
        return Response(status_code=204)


def _seen(row: NodeRow, cold: ColdRequest) -> NodeRow:
    """Without models that who asks does not see."""
    return msgspec.structs.replace(row, models=tuple(filter(cold.sees, row.models)))


@asynccontextmanager
async def naming(cluster: Cluster, *asked: str) -> AsyncIterator[None]:
    """A node that is not found becomes a message that names those that are."""
    try:
        yield
    except NotFound as exc:
        rows = await cluster.nodes()
        known = {row.id for row in rows} | {row.name for row in rows}
        unknown = next((name for name in asked if name not in known), None)
        if unknown is None:
            raise
        raise NotFound(unknown_node(unknown, (row.name for row in rows))) from exc
