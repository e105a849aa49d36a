"""Who waits: the queues of all nodes, or of one."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, nullcontext

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ollama_distributed.base.queue import QueueAnswer, QueueNode
from ollama_distributed.gateway.cluster_port import Cluster
from ollama_distributed.gateway.cold import ColdRequest
from ollama_distributed.gateway.queue_port import Queues
from ollama_distributed.gateway.routes.nodes import naming
from ollama_distributed.gateway.routes.table import ColdRoute, json_response


def queue_routes(queues: Queues, cluster: Cluster | None) -> list[ColdRoute]:
    """`cluster`: knows which nodes there are, for who mistyped one."""

    async def show(cold: ColdRequest, request: Request) -> Response:
        node = request.query_params.get("node", "")
        naming_it: AbstractAsyncContextManager[None] = (
            naming(cluster, node) if cluster is not None and node else nullcontext()
        )
        async with naming_it:
            answer = await queues.queue(node)
        seen = [_seen(one, cold) for one in answer.nodes]
        return json_response(QueueAnswer(nodes=tuple(seen)))

    def _seen(node: QueueNode, cold: ColdRequest) -> QueueNode:
        """Without models that who asks does not see."""
        return msgspec.structs.replace(node, models=tuple(m for m in node.models if cold.sees(m.model)))

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
