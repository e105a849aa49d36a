"""Models on their way under `/api/v1`: from node to node, and all that is under way."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ollama_distributed.base.errors import MissingBody
from ollama_distributed.distribution.downloads import Transfer
from ollama_distributed.distribution.service import ModelStatus
from ollama_distributed.gateway.cold import ColdRequest
from ollama_distributed.gateway.ports import Moves
from ollama_distributed.gateway.routes.table import ColdRoute, json_response

TAG = "REST"


class DistributeAsk(msgspec.Struct, frozen=True):
    nodes: tuple[str, ...] = ()
    """Their names or ids; none: every living node that lacks the model."""


class TransfersAnswer(msgspec.Struct, frozen=True):
    transfers: tuple[Transfer, ...]


class CopiesAnswer(msgspec.Struct, frozen=True):
    models: tuple[ModelStatus, ...]


_DISTRIBUTE = msgspec.json.Decoder(DistributeAsk)


def transfer_routes(moves: Moves) -> list[ColdRoute]:
    handlers = _Handlers(moves)
    return [
        ColdRoute(
            method="POST",
            path="/api/v1/models/{name:path}/distribute",
            verb="models",
            run=handlers.distribute,
            tag=TAG,
            summary="Have nodes fetch a model from those that have it; all that lack it when none is named",
            body=DistributeAsk,
            body_optional=True,
            answer=TransfersAnswer,
            status=202,
        ),
        ColdRoute(
            method="GET",
            path="/api/v1/models/{name:path}/status",
            verb="read",
            run=handlers.status,
            tag=TAG,
            summary="Where a model is, in which versions, and where it is going",
            answer=ModelStatus,
        ),
        ColdRoute(
            method="GET",
            path="/api/v1/copies",
            verb="read",
            run=handlers.copies,
            tag=TAG,
            summary="Where every model of the cluster is",
            answer=CopiesAnswer,
        ),
        ColdRoute(
            method="GET",
            path="/api/v1/transfers",
            verb="read",
            run=handlers.transfers,
            tag=TAG,
            summary="Models on their way to any node, and those that arrived lately",
            answer=TransfersAnswer,
        ),
        ColdRoute(
            method="GET",
            path="/api/v1/transfers/{id}",
            verb="read",
            run=handlers.transfer,
            tag=TAG,
            summary="One transfer: bytes, rate, time left, nodes that it comes from",
            answer=Transfer,
        ),
        ColdRoute(
            method="DELETE",
            path="/api/v1/transfers/{id}",
            verb="models",
            run=handlers.cancel,
            tag=TAG,
            summary="Cancel a transfer; what came is kept for the next time",
            answer=Transfer,
        ),
    ]


class _Handlers:
    def __init__(self, moves: Moves) -> None:
        self._moves = moves

    async def distribute(self, cold: ColdRequest, request: Request) -> Response:
        try:
            ask = await cold.body(request, _DISTRIBUTE)
        except MissingBody:
            ask = DistributeAsk()
        begun = await self._moves.distribute(request.path_params["name"], ask.nodes)
        return json_response(TransfersAnswer(tuple(begun)), 202)

    async def status(self, _cold: ColdRequest, request: Request) -> Response:
        return json_response(await self._moves.get_status(request.path_params["name"]))

    async def copies(self, _cold: ColdRequest, _request: Request) -> Response:
        return json_response(CopiesAnswer(tuple(self._moves.list())))

    async def transfers(self, _cold: ColdRequest, _request: Request) -> Response:
        return json_response(TransfersAnswer(tuple(await self._moves.transfers())))

    async def transfer(self, _cold: ColdRequest, request: Request) -> Response:
        return json_response(await self._moves.transfer(request.path_params["id"]))

    async def cancel(self, _cold: ColdRequest, request: Request) -> Response:
        return json_response(await self._moves.cancel(request.path_params["id"]))
