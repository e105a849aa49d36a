"""Who waits: the queues of all nodes, or of one."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, nullcontext

from starlette.requests import Request
from starlette.responses import Response

from ollama_distributed.base.queue import QueueAnswer
from ollama_distributed.gateway.cluster_port import Cluster
from ollama_distributed.gateway.cold import ColdRequest
from ollama_distributed.gateway.queue_port import Queues
from ollama_distributed.gateway.routes.nodes import naming
from ollama_distributed.gateway.routes.table import ColdRoute, json_response


def queue_routes(queues: Queues, cluster: Cluster | None) -> list[ColdRoute]:
    """`cluster`: knows which nodes there are, for who mistyped one."""

    async def show(_cold: ColdRequest, request: Request) -> Response:
        node = request.query_params.get("node", "")
        naming_it: AbstractAsyncContextManager[None] = (
            naming(cluster, node) if cluster is not None and node else nullcontext()
        )
        async with naming_it:
            return json_response(await queues.queue(node))

    return [
        ColdRoute(
            method="GET",
            path="/api/v1/queue",
            verb="read",
            run=show,
            tag="REST",
            summary="Who waits at which model of which node, by class, and for how long; `node`: of one",
            answer=QueueAnswer,
            words=("node",),
        )
    ]
