"""Ollama's management routes (`reference/ollama-api.md`, 2, 7 and 8)."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ollama_distributed.access.policies import demand_all_models
from ollama_distributed.base.errors import BlobNotFound, Invalid, ModelNotFound
from ollama_distributed.catalog.wire import CreateRequest, CreateStatus
from ollama_distributed.distribution.ports import Status
from ollama_distributed.gateway.cold import ColdRequest
from ollama_distributed.gateway.dialects.fields import decode
from ollama_distributed.gateway.dialects.ollama_answer import NDJSON
from ollama_distributed.gateway.routes.models import (
    ResidentsAnswer,
    ShowAnswer,
    TagsAnswer,
    model_row,
    newest_first,
    residents_answer,
    show_answer,
)
from ollama_distributed.gateway.routes.progress import progress
from ollama_distributed.gateway.routes.table import ColdRoute, Node, json_response
from ollama_distributed.serving.ports import EngineInfo

TAG = "Ollama: models"


class OllamaVersion(msgspec.Struct, frozen=True, kw_only=True):
    version: str
    """Of the Ollama that this answers like."""
    ollama_distributed: str
    """Ours."""
    engine: EngineInfo | None


class Cloud(msgspec.Struct, frozen=True):
    disabled: bool
    source: str


class CloudAnswer(msgspec.Struct, frozen=True):
    """Ollama's own cloud, which nobody has here."""

    cloud: Cloud


class ShowBody(msgspec.Struct, frozen=True, kw_only=True):
    model: str | None = None
    name: str | None = None
    """Older spelling of `model`."""
    verbose: bool | None = None


class NameBody(msgspec.Struct, frozen=True, kw_only=True):
    model: str | None = None
    name: str | None = None
    """Older spelling of `model`."""


class CopyBody(msgspec.Struct, frozen=True, kw_only=True):
    source: str | None = None
    destination: str | None = None


class StreamBody(msgspec.Struct, frozen=True, kw_only=True):
    stream: bool | None = None


class TransferBody(msgspec.Struct, frozen=True, kw_only=True):
    """Of pull and push."""

    model: str | None = None
    name: str | None = None
    """Older spelling of `model`."""
    insecure: bool | None = None
    """Read and not used: which registries speak plain http is said in the settings."""
    stream: bool | None = None


_SIZE_DIGITS = 16
"""Of a Content-Length that can be meant."""

_SHOW = msgspec.json.Decoder(ShowBody)
_NAME = msgspec.json.Decoder(NameBody)
_COPY = msgspec.json.Decoder(CopyBody)
_CREATE = msgspec.json.Decoder(CreateRequest)
_TRANSFER = msgspec.json.Decoder(TransferBody)
_STREAM = msgspec.json.Decoder(StreamBody)


def ollama_routes(node: Node) -> list[ColdRoute]:
    handlers = _Handlers(node)
    return [
        ColdRoute(
            method="GET",
            path="/api/version",
            verb="read",
            run=handlers.version,
            tag=TAG,
            summary="Version",
            answer=OllamaVersion,
        ),
        ColdRoute(
            method="GET",
            path="/api/status",
            verb="read",
            run=handlers.status,
            tag=TAG,
            summary="Cloud status",
            answer=CloudAnswer,
        ),
        ColdRoute(
            method="GET",
            path="/api/tags",
            verb="read",
            run=handlers.tags,
            tag=TAG,
            summary="Models on disk",
            answer=TagsAnswer,
        ),
        ColdRoute(
            method="GET",
            path="/api/ps",
            verb="read",
            run=handlers.ps,
            tag=TAG,
            summary="Models in memory",
            answer=ResidentsAnswer,
        ),
        ColdRoute(
            method="POST",
            path="/api/show",
            verb="read",
            run=handlers.show,
            tag=TAG,
            summary="Details of a model",
            body=ShowBody,
            answer=ShowAnswer,
        ),
        ColdRoute(
            method="POST",
            path="/api/create",
            verb="models",
            run=handlers.create,
            tag=TAG,
            summary="Make a model from another or from uploaded files",
            body=CreateRequest,
            answer=CreateStatus,
            other_media=(NDJSON,),
        ),
        ColdRoute(
            method="POST",
            path="/api/copy",
            verb="models",
            run=handlers.copy,
            tag=TAG,
            summary="Give a model a second name",
            body=CopyBody,
        ),
        ColdRoute(
            method="DELETE",
            path="/api/delete",
            verb="models",
            run=handlers.delete,
            tag=TAG,
            summary="Delete a model",
            body=NameBody,
        ),
        ColdRoute(
            method="HEAD",
            path="/api/blobs/{digest}",
            verb="models",
            run=handlers.has_blob,
            tag=TAG,
            summary="Whether a blob is here",
        ),
        ColdRoute(
            method="POST",
            path="/api/blobs/{digest}",
            verb="models",
            run=handlers.put_blob,
            tag=TAG,
            summary="Upload a blob, streamed; 201: it is new",
            other=(201,),
        ),
        ColdRoute(
            method="POST",
            path="/api/pull",
            verb="models",
            run=handlers.pull,
            tag=TAG,
            summary="Fetch a model from its registry",
            body=TransferBody,
            answer=Status,
            other_media=(NDJSON,),
        ),
        ColdRoute(
            method="POST",
            path="/api/push",
            verb="models",
            run=handlers.push,
            tag=TAG,
            summary="Send a model to its registry",
            body=TransferBody,
            answer=Status,
            other_media=(NDJSON,),
        ),
        *(
            ColdRoute(method="HEAD", path=path, verb="read", run=run, tag=TAG, summary="", hidden=True)
            for path, run in (("/api/version", handlers.version), ("/api/tags", handlers.tags))
        ),
    ]


class _Handlers:
    def __init__(self, node: Node) -> None:
        self._node = node

    async def version(self, _cold: ColdRequest, _request: Request) -> Response:
        version = self._node.version
        engine = version.engines[0] if version.engines else None
        return json_response(
            OllamaVersion(version=version.ollama, ollama_distributed=version.version, engine=engine)
        )

    async def status(self, _cold: ColdRequest, _request: Request) -> Response:
        return json_response(CloudAnswer(Cloud(disabled=True, source="config")))

    async def tags(self, cold: ColdRequest, _request: Request) -> Response:
        specs = [spec for spec in newest_first(self._node.catalog.list()) if cold.sees(spec.display)]
        return json_response(TagsAnswer(tuple(map(model_row, specs))))

    async def ps(self, cold: ColdRequest, _request: Request) -> Response:
        seen = [model for model in self._node.residents.loaded() if cold.sees(model.name)]
        return json_response(residents_answer(seen))

    async def show(self, cold: ColdRequest, request: Request) -> Response:
        body = await cold.body(request, _SHOW)
        name = _need(body.model or body.name, "model is required")
        cold.check_model(name)
        return json_response(show_answer(await self._node.catalog.show(name, verbose=bool(body.verbose))))

    async def create(self, cold: ColdRequest, request: Request) -> Response:
        raw = await cold.raw_body(request)
        wanted = decode(raw, _STREAM)
        asked = decode(raw, _CREATE)
        for name in (asked.model or asked.name, asked.from_):
            if name:
                cold.check_model(name)
        if asked.files or asked.adapters or asked.draft_files:
            demand_all_models(cold.identity)
        statuses = self._node.catalog.create(asked)
        return await progress(statuses, request, stream=wanted.stream is not False)

    async def pull(self, cold: ColdRequest, request: Request) -> Response:
        body = await cold.body(request, _TRANSFER)
        name = _need(body.model or body.name, "invalid model name")
        cold.check_model(name)
        lines = self._node.need_transfers().pull(name)
        return await progress(lines, request, stream=body.stream is not False, ready=self._node.ready)

    async def push(self, cold: ColdRequest, request: Request) -> Response:
        body = await cold.body(request, _TRANSFER)
        name = _need(body.model or body.name, "model is required")
        cold.check_model(name)
        lines = self._node.need_transfers().push(name)
        return await progress(lines, request, stream=body.stream is not False, ready=self._node.ready)

    async def copy(self, cold: ColdRequest, request: Request) -> Response:
        body = await cold.body(request, _COPY)
        source = _need(body.source, 'source "" is invalid')
        destination = _need(body.destination, 'destination "" is invalid')
        if not cold.sees(source):
            raise ModelNotFound(f'model "{source}" not found')
        cold.check_model(destination)
        await self._node.catalog.copy(source, destination)
        return Response()

    async def delete(self, cold: ColdRequest, request: Request) -> Response:
        body = await cold.body(request, _NAME)
        name = _need(body.model or body.name, "model is required")
        cold.check_model(name)
        await self._node.catalog.delete(name)
        return Response()

    async def has_blob(self, cold: ColdRequest, request: Request) -> Response:
        demand_all_models(cold.identity)
        digest = request.path_params["digest"]
        if not await self._node.catalog.has_blob(digest):
            raise BlobNotFound(f'blob "{digest}" not found')
        return Response()

    async def put_blob(self, cold: ColdRequest, request: Request) -> Response:
        demand_all_models(cold.identity)
        said = request.headers.get("content-length", "")
        size = int(said) if said.isdecimal() and len(said) < _SIZE_DIGITS else 0
        made = await self._node.catalog.put_blob(request.path_params["digest"], cold.upload(request), size)
        return Response(status_code=201 if made else 200)


def _need(value: str | None, text: str) -> str:
    if not value:
        raise Invalid(text)
    return value
