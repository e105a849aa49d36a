"""The seed's management routes under `/api/v1`."""

from __future__ import annotations

from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ollama_distributed.base.disk import EvictAnswer
from ollama_distributed.distribution.downloads import Transfer
from ollama_distributed.gateway.cold import ColdRequest
from ollama_distributed.gateway.ports import Preloaded
from ollama_distributed.gateway.routes.models import ModelRow, ModelsAnswer, model_row, newest_first
from ollama_distributed.gateway.routes.table import ColdRoute, Node, flag, json_response
from ollama_distributed.serving.ports import EngineInfo

TAG = "REST"


def seed_routes(node: Node) -> list[ColdRoute]:
    handlers = _Handlers(node)
    return [
        ColdRoute(
            method="GET",
            path="/api/v1/models",
            verb="read",
            run=handlers.models,
            tag=TAG,
            summary="All models",
            answer=ModelsAnswer,
        ),
        ColdRoute(
            method="POST",
            path="/api/v1/models/{name:path}/download",
            verb="models",
            run=handlers.download,
            tag=TAG,
            summary="Begin to fetch a model from its registry",
            answer=Transfer,
        ),
        ColdRoute(
            method="GET",
            path="/api/v1/models/{name:path}",
            verb="read",
            run=handlers.model,
            tag=TAG,
            summary="One model; its name may hold / and :",
            answer=ModelRow,
        ),
        ColdRoute(
            method="DELETE",
            path="/api/v1/models/{name:path}",
            verb="models",
            run=handlers.delete,
            tag=TAG,
            summary="Unload and delete a model; with nodes only their copies (the last one if that is said)",
            words=("nodes",),
            query=("last_copy",),
            answer=RemovedAnswer,
            other=(204,),
        ),
        ColdRoute(
            method="GET",
            path="/api/v1/health",
            verb="read",
            run=handlers.health,
            tag=TAG,
            summary="How this node is; 503: it takes no requests",
            answer=Health,
            same=(503,),
        ),
        ColdRoute(
            method="GET",
            path="/api/v1/version",
            verb="read",
            run=handlers.version,
            tag=TAG,
            summary="Version of the program and its engines",
            answer=Version,
        ),
    ]


class Health(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    status: Literal["ok", "starting"]
    node: str
    """Its id."""
    version: str
    models_loaded: int
    """Here; `/api/ps` tells of all nodes."""
    preload: dict[str, Preloaded] = {}
    """Models that were to be loaded at the start, by name."""


class Version(msgspec.Struct, frozen=True, kw_only=True):
    version: str
    ollama: str
    """The Ollama version that this answers like."""
    node: str
    """Its id."""
    engine: EngineInfo | None
    """The first of `engines`."""
    engines: tuple[EngineInfo, ...]


class RemovedAnswer(msgspec.Struct, frozen=True):
    """Of a removal from some nodes; of the whole model's there is none (204)."""

    removed: tuple[EvictAnswer, ...]


def _nodes(request: Request) -> list[str]:
    """`?nodes=a,b&nodes=c`."""
    texts = request.query_params.getlist("nodes")
    return [name.strip() for text in texts for name in text.split(",") if name.strip()]


class _Handlers:
    def __init__(self, node: Node) -> None:
        self._node = node

    async def models(self, cold: ColdRequest, _request: Request) -> Response:
        specs = [spec for spec in newest_first(self._node.catalog.list()) if cold.sees(spec.display)]
        return json_response(ModelsAnswer({spec.display: model_row(spec) for spec in specs}))

    async def model(self, _cold: ColdRequest, request: Request) -> Response:
        return json_response(model_row(await self._node.catalog.resolve(request.path_params["name"])))

    async def delete(self, _cold: ColdRequest, request: Request) -> Response:
        if nodes := _nodes(request):
            gone = await self._node.need_moves().remove(
                request.path_params["name"], nodes, last_copy=flag(request, "last_copy")
            )
            return json_response(RemovedAnswer(tuple(gone)))
        spec = await self._node.catalog.resolve(request.path_params["name"])
        await self._node.residents.unload(spec.name)
        await self._node.catalog.delete(spec.name)
        return Response(status_code=204)

    async def download(self, _cold: ColdRequest, request: Request) -> Response:
        transfer = self._node.need_transfers().download(request.path_params["name"])
        return json_response(transfer)

    async def health(self, cold: ColdRequest, _request: Request) -> Response:
        ready, preloaded = self._node.ready(), self._node.preloaded()
        return json_response(
            Health(
                status="ok" if ready else "starting",
                node=self._node.version.node,
                version=self._node.version.version,
                models_loaded=sum(not one.node for one in self._node.residents.loaded()),
                preload={name: one for name, one in preloaded.items() if cold.sees(name)},
            ),
            200 if ready else 503,
        )

    async def version(self, _cold: ColdRequest, _request: Request) -> Response:
        version = self._node.version
        return json_response(
            Version(
                version=version.version,
                ollama=version.ollama,
                node=version.node,
                engine=version.engines[0] if version.engines else None,
                engines=version.engines,
            )
        )
