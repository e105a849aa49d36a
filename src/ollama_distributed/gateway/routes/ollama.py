"""Ollama's management routes (`reference/ollama-api.md`, 2, 7 and 8)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from ollama_distributed.base.errors import BlobNotFound, Invalid, NotOffered
from ollama_distributed.catalog.wire import CreateRequest, CreateStatus
from ollama_distributed.gateway.cold import ColdRequest
from ollama_distributed.gateway.dialects.fields import decode
from ollama_distributed.gateway.errors import as_ours, ollama_error_body
from ollama_distributed.gateway.out import STREAM_HEADERS
from ollama_distributed.gateway.routes.models import model_row, newest_first, resident_rows, shown_row
from ollama_distributed.gateway.routes.table import ColdRoute, Node, Run, json_response

TAG = "Ollama: models"


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


_SHOW = msgspec.json.Decoder(ShowBody)
_NAME = msgspec.json.Decoder(NameBody)
_COPY = msgspec.json.Decoder(CopyBody)
_CREATE = msgspec.json.Decoder(CreateRequest)
_STREAM = msgspec.json.Decoder(StreamBody)


def ollama_routes(node: Node) -> list[ColdRoute]:
    handlers = _Handlers(node)
    return [
        ColdRoute(
            method="GET", path="/api/version", verb="read", run=handlers.version, tag=TAG, summary="Version"
        ),
        ColdRoute(
            method="GET",
            path="/api/status",
            verb="read",
            run=handlers.status,
            tag=TAG,
            summary="Cloud status",
        ),
        ColdRoute(
            method="GET", path="/api/tags", verb="read", run=handlers.tags, tag=TAG, summary="Models on disk"
        ),
        ColdRoute(
            method="GET", path="/api/ps", verb="read", run=handlers.ps, tag=TAG, summary="Models in memory"
        ),
        ColdRoute(
            method="POST",
            path="/api/show",
            verb="read",
            run=handlers.show,
            tag=TAG,
            summary="Details of a model",
            body=ShowBody,
        ),
        ColdRoute(
            method="POST",
            path="/api/create",
            verb="models",
            run=handlers.create,
            tag=TAG,
            summary="Make a model from another or from uploaded files",
            body=CreateRequest,
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
            summary="Upload a blob, streamed",
        ),
        ColdRoute(
            method="POST",
            path="/api/pull",
            verb="models",
            run=_transfer("pull"),
            tag=TAG,
            summary="Not offered yet",
        ),
        ColdRoute(
            method="POST",
            path="/api/push",
            verb="models",
            run=_transfer("push"),
            tag=TAG,
            summary="Not offered yet",
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
        return json_response(
            {
                "version": version.ollama,
                "ollama_distributed": version.version,
                "engine": version.engines[0] if version.engines else None,
            }
        )

    async def status(self, _cold: ColdRequest, _request: Request) -> Response:
        return json_response({"cloud": {"disabled": True, "source": "config"}})

    async def tags(self, _cold: ColdRequest, _request: Request) -> Response:
        specs = newest_first(self._node.catalog.list())
        return json_response({"models": [model_row(spec) for spec in specs]})

    async def ps(self, _cold: ColdRequest, _request: Request) -> Response:
        return json_response({"models": resident_rows(list(self._node.residents.loaded()))})

    async def show(self, cold: ColdRequest, request: Request) -> Response:
        body = await cold.body(request, _SHOW)
        name = _need(body.model or body.name, "model is required")
        return json_response(shown_row(await self._node.catalog.show(name, verbose=bool(body.verbose))))

    async def create(self, cold: ColdRequest, request: Request) -> Response:
        raw = await cold.raw_body(request)
        wanted = decode(raw, _STREAM)
        statuses = self._node.catalog.create(decode(raw, _CREATE))
        return await progress(statuses, stream=wanted.stream is not False)

    async def copy(self, cold: ColdRequest, request: Request) -> Response:
        body = await cold.body(request, _COPY)
        source = _need(body.source, 'source "" is invalid')
        destination = _need(body.destination, 'destination "" is invalid')
        await self._node.catalog.copy(source, destination)
        return Response()

    async def delete(self, cold: ColdRequest, request: Request) -> Response:
        body = await cold.body(request, _NAME)
        await self._node.catalog.delete(_need(body.model or body.name, "model is required"))
        return Response()

    async def has_blob(self, _cold: ColdRequest, request: Request) -> Response:
        digest = request.path_params["digest"]
        if not await self._node.catalog.has_blob(digest):
            raise BlobNotFound(f'blob "{digest}" not found')
        return Response()

    async def put_blob(self, cold: ColdRequest, request: Request) -> Response:
        made = await self._node.catalog.put_blob(request.path_params["digest"], cold.upload(request))
        return Response(status_code=201 if made else 200)


async def progress(statuses: AsyncIterator[CreateStatus], *, stream: bool) -> Response:
    """Status lines as NDJSON, or only the last. An error before the first has its status."""
    if not stream:
        last: Any = CreateStatus(status="success")
        async for status in statuses:
            last = status
        return json_response(last)
    try:
        first = await anext(statuses)
    except StopAsyncIteration:
        first = CreateStatus(status="success")
    headers = {name.decode("ascii"): value.decode("ascii") for name, value in STREAM_HEADERS}
    return StreamingResponse(_lines(first, statuses), headers=headers, media_type="application/x-ndjson")


async def _lines(first: CreateStatus, rest: AsyncIterator[CreateStatus]) -> AsyncIterator[bytes]:
    yield msgspec.json.encode(first) + b"\n"
    try:
        async for status in rest:
            yield msgspec.json.encode(status) + b"\n"
    except Exception as exc:  # the status line is gone: the error is the last line
        yield ollama_error_body(as_ours(exc)) + b"\n"


def _transfer(verb: str) -> Run:
    async def transfer(_cold: ColdRequest, _request: Request) -> Response:
        raise NotOffered(
            f"{verb} is not available in this version: it comes with model transfer. Until then bring a "
            "model with 'ollama-distributed import FILE.gguf --name NAME', or upload it "
            "(POST /api/blobs, then /api/create)"
        )

    transfer.__name__ = verb
    return transfer


def _need(value: str | None, text: str) -> str:
    if not value:
        raise Invalid(text)
    return value
