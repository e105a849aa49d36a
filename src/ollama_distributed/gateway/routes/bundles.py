"""Models in one file under `/api/v1`: sent as it is read, taken as it comes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec
import structlog
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from ollama_distributed.access.policies import demand_all_models
from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.distribution.packing import Bundle
from ollama_distributed.distribution.unpacking import Imported
from ollama_distributed.gateway.asgi import Send
from ollama_distributed.gateway.cold import ColdRequest
from ollama_distributed.gateway.ports import Bundles
from ollama_distributed.gateway.routes.table import ColdRoute, flag, json_response
from ollama_distributed.models.bundle import MEDIA_TYPE
from ollama_distributed.models.names import ModelName

TAG = "REST"

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class ImportAnswer(msgspec.Struct, frozen=True):
    models: tuple[Imported, ...]


def bundle_routes(bundles: Bundles) -> list[ColdRoute]:
    handlers = _Handlers(bundles)
    return [
        ColdRoute(
            method="GET",
            path="/api/v1/models/{name:path}/bundle",
            verb="models",
            run=handlers.export_one,
            tag=TAG,
            summary="A model as one file (an OCI image layout in a tar), for a cluster without registry",
            media=MEDIA_TYPE,
        ),
        ColdRoute(
            method="GET",
            path="/api/v1/bundles",
            verb="models",
            run=handlers.export_many,
            tag=TAG,
            summary="Several models as one file (?model=NAME&model=NAME); what they share is in it once",
            words=("model",),
            media=MEDIA_TYPE,
        ),
        ColdRoute(
            method="POST",
            path="/api/v1/bundles",
            verb="models",
            run=handlers.take,
            tag=TAG,
            summary="Take the models of such a file, all or none; ?name=NAME: of its one model",
            upload=MEDIA_TYPE,
            words=("name",),
            query=("replace",),
            answer=ImportAnswer,
        ),
    ]


class _Handlers:
    def __init__(self, bundles: Bundles) -> None:
        self._bundles = bundles

    async def export_one(self, cold: ColdRequest, request: Request) -> Response:
        return await self._export(cold, [request.path_params["name"]])

    async def export_many(self, cold: ColdRequest, request: Request) -> Response:
        return await self._export(cold, request.query_params.getlist("model"))

    async def _export(self, cold: ColdRequest, names: Sequence[str]) -> Response:
        for name in names:
            cold.check_model(name)
        return _File(cold, await self._bundles.pack(names))

    async def take(self, cold: ColdRequest, request: Request) -> Response:
        demand_all_models(cold.identity)  # what the file holds is not known before
        done = await self._bundles.unpack(
            cold.upload(request), name=request.query_params.get("name", ""), replace=flag(request, "replace")
        )
        return json_response(ImportAnswer(tuple(done)))


class _File(StreamingResponse):
    """Ends early, and the connection with it, when the rest cannot be had."""

    def __init__(self, cold: ColdRequest, bundle: Bundle) -> None:
        headers = {
            "content-length": str(bundle.length),
            "content-disposition": f'attachment; filename="{_filename(bundle)}"',
        }
        self._cold = cold
        self._chunks: AsyncGenerator[bytes] = bundle.chunks()
        super().__init__(self._chunks, headers=headers, media_type=MEDIA_TYPE)

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._chunks):
            try:
                await super().stream_response(send)
            except OllamaDistributedError as exc:
                self._cold.error_code = exc.code
                log.warning("gateway.bundle_broke", request_id=self._cold.request_id, error=exc.message)


def _filename(bundle: Bundle) -> str:
    if len(bundle.models) != 1:
        return "models.tar"
    name = ModelName.parse(bundle.models[0])
    return f"{name.model}-{name.tag}.tar"
