"""The settings that hold in the whole cluster, under `/api/v1/config`."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ollama_distributed.base.cluster import ConfigAnswer, ConfigAsk, ConfigHistory, RollbackAsk
from ollama_distributed.gateway.cluster_port import Cluster
from ollama_distributed.gateway.cold import ColdRequest
from ollama_distributed.gateway.dialects.sse import sse_event
from ollama_distributed.gateway.routes.table import ColdRoute, actor, json_response
from ollama_distributed.gateway.watching import Watchers

TAG = "Cluster: configuration"

_ASK = msgspec.json.Decoder(ConfigAsk)
_ROLLBACK = msgspec.json.Decoder(RollbackAsk)


def config_routes(cluster: Cluster, ready: Callable[[], bool]) -> list[ColdRoute]:
    """`ready`: False once the node shuts down; whoever watches is let go then."""
    handlers = _Handlers(cluster, Watchers(ready))
    return [
        ColdRoute(
            method="GET",
            path="/api/v1/config",
            verb="read",
            run=handlers.get,
            tag=TAG,
            summary="The cluster's configuration",
            answer=ConfigAnswer,
        ),
        ColdRoute(
            method="PUT",
            path="/api/v1/config",
            verb="admin",
            run=handlers.put,
            tag=TAG,
            summary="Change settings on all nodes; null takes one out",
            body=ConfigAsk,
            answer=ConfigAnswer,
        ),
        ColdRoute(
            method="GET",
            path="/api/v1/config/history",
            verb="read",
            run=handlers.history,
            tag=TAG,
            summary="Every version, newest first",
            answer=ConfigHistory,
        ),
        ColdRoute(
            method="POST",
            path="/api/v1/config/rollback",
            verb="admin",
            run=handlers.rollback,
            tag=TAG,
            summary="A new version with the values of an old one",
            body=RollbackAsk,
            answer=ConfigAnswer,
        ),
        ColdRoute(
            method="GET",
            path="/api/v1/config/watch",
            verb="read",
            run=handlers.watch,
            tag=TAG,
            summary="The configuration now and each new version, as server-sent events `config`",
            answer=ConfigAnswer,
            media="text/event-stream",
        ),
    ]


class _Handlers:
    def __init__(self, cluster: Cluster, watchers: Watchers) -> None:
        self._cluster = cluster
        self._watchers = watchers

    async def get(self, _cold: ColdRequest, _request: Request) -> Response:
        return json_response(self._cluster.config())

    async def put(self, cold: ColdRequest, request: Request) -> Response:
        ask = await cold.body(request, _ASK)
        return json_response(await self._cluster.put_config(ask, actor=actor(cold)))

    async def history(self, _cold: ColdRequest, _request: Request) -> Response:
        return json_response(await self._cluster.config_history())

    async def rollback(self, cold: ColdRequest, request: Request) -> Response:
        ask = await cold.body(request, _ROLLBACK)
        return json_response(await self._cluster.rollback_config(ask, actor=actor(cold)))

    async def watch(self, cold: ColdRequest, _request: Request) -> Response:
        return self._watchers.stream(self._cluster.watch_config(), _config_event, cold.request_id)


def _config_event(config: ConfigAnswer) -> bytes:
    return b"id: %d\n" % config.version + sse_event("config", config)
