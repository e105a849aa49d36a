"""The cluster as a whole under `/api/v1/cluster`: status, leader, tokens, joining and leaving."""

from __future__ import annotations

from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ollama_distributed.base.cluster import (
    ClusterAnswer,
    JoinAsk,
    LeaderAnswer,
    LeaveAsk,
    NewToken,
    TokenRequest,
    TokensAnswer,
    VoterAsk,
)
from ollama_distributed.base.errors import MissingBody
from ollama_distributed.gateway.cluster_port import Cluster
from ollama_distributed.gateway.cold import ColdRequest
from ollama_distributed.gateway.routes.nodes import naming
from ollama_distributed.gateway.routes.table import ColdRoute, actor, json_response

TAG = "Cluster"

T = TypeVar("T")

_TOKEN = msgspec.json.Decoder(TokenRequest)
_JOIN = msgspec.json.Decoder(JoinAsk)
_LEAVE = msgspec.json.Decoder(LeaveAsk)
_VOTER = msgspec.json.Decoder(VoterAsk)


def cluster_routes(cluster: Cluster) -> list[ColdRoute]:
    handlers = _Handlers(cluster)
    return [
        ColdRoute(
            method="GET",
            path="/api/v1/cluster/status",
            verb="read",
            run=handlers.status,
            tag=TAG,
            summary="How the cluster is, and why",
            answer=ClusterAnswer,
        ),
        ColdRoute(
            method="GET",
            path="/api/v1/cluster/leader",
            verb="read",
            run=handlers.leader,
            tag=TAG,
            summary="Who leads",
            answer=LeaderAnswer,
        ),
        ColdRoute(
            method="POST",
            path="/api/v1/cluster/join",
            verb="admin",
            run=handlers.join,
            tag=TAG,
            summary="Make this node, alone until now, a member of the token's cluster",
            body=JoinAsk,
            answer=ClusterAnswer,
        ),
        ColdRoute(
            method="POST",
            path="/api/v1/cluster/leave",
            verb="admin",
            run=handlers.leave,
            tag=TAG,
            summary="Take this node out of its cluster",
            body=LeaveAsk,
            body_optional=True,
            status=204,
        ),
        ColdRoute(
            method="GET",
            path="/api/v1/cluster/tokens",
            verb="read",
            run=handlers.tokens,
            tag=TAG,
            summary="Join tokens, without their secrets",
            answer=TokensAnswer,
        ),
        ColdRoute(
            method="POST",
            path="/api/v1/cluster/tokens",
            verb="admin",
            run=handlers.create_token,
            tag=TAG,
            summary="A new join token; only this answer shows it",
            body=TokenRequest,
            body_optional=True,
            answer=NewToken,
            status=201,
        ),
        ColdRoute(
            method="DELETE",
            path="/api/v1/cluster/tokens/{id}",
            verb="admin",
            run=handlers.revoke_token,
            tag=TAG,
            summary="Revoke a join token",
            status=204,
        ),
        ColdRoute(
            method="POST",
            path="/api/v1/cluster/voters/replace",
            verb="admin",
            run=handlers.replace_voter,
            tag=TAG,
            summary="Take a dead voter out and a living server in",
            body=VoterAsk,
            answer=ClusterAnswer,
        ),
    ]


class _Handlers:
    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    async def status(self, cold: ColdRequest, _request: Request) -> Response:
        found = await self._cluster.alerts()
        seen = tuple(one if not one.model or cold.sees(one.model) else one.nameless() for one in found)
        return json_response(msgspec.structs.replace(self._cluster.status(), alerts=seen))

    async def leader(self, _cold: ColdRequest, _request: Request) -> Response:
        return json_response(self._cluster.leader())

    async def join(self, cold: ColdRequest, request: Request) -> Response:
        ask = await cold.body(request, _JOIN)
        return json_response(await self._cluster.join(ask.token, actor=actor(cold)))

    async def leave(self, cold: ColdRequest, request: Request) -> Response:
        ask = await _optional(cold, request, _LEAVE, LeaveAsk())
        await self._cluster.leave(force=ask.force, actor=actor(cold))
        return Response(status_code=204)

    async def tokens(self, _cold: ColdRequest, _request: Request) -> Response:
        return json_response(TokensAnswer(tuple(await self._cluster.tokens())))

    async def create_token(self, cold: ColdRequest, request: Request) -> Response:
        ask = await _optional(cold, request, _TOKEN, TokenRequest())
        made = await self._cluster.create_token(ask, actor=actor(cold))
        response = json_response(made, 201)
        response.headers["cache-control"] = "no-store"  # RFC 9111 5.2.2.5: it holds a secret
        return response

    async def revoke_token(self, cold: ColdRequest, request: Request) -> Response:
        await self._cluster.revoke_token(request.path_params["id"], actor=actor(cold))
        return Response(status_code=204)

    async def replace_voter(self, cold: ColdRequest, request: Request) -> Response:
        ask = await cold.body(request, _VOTER)
        async with naming(self._cluster, ask.dead, *([ask.new] if ask.new else [])):
            return json_response(await self._cluster.replace_voter(ask.dead, ask.new, actor=actor(cold)))


async def _optional(cold: ColdRequest, request: Request, decoder: msgspec.json.Decoder[T], absent: T) -> T:
    """The body, or `absent` where there is none."""
    try:
        return await cold.body(request, decoder)
    except MissingBody:
        return absent
