"""OpenAI's files and batches under `/v1`: a file comes as a form and goes to the disk as it comes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import msgspec
import structlog
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from ollama_distributed.base.batches import Batch, BatchAsk, BatchList, FileDeleted, FileList, FileObject
from ollama_distributed.base.errors import Forbidden, Invalid, OllamaDistributedError
from ollama_distributed.base.identity import Identity
from ollama_distributed.gateway.asgi import Send
from ollama_distributed.gateway.batch_port import BatchLane
from ollama_distributed.gateway.cold import ColdRequest
from ollama_distributed.gateway.multipart import Field, FileBegins, FileData, FileEnds, Multipart, boundary_of
from ollama_distributed.gateway.routes.table import ColdRoute, json_response

TAG = "OpenAI: batches"
FORM = "multipart/form-data"
MOST_FILES, MOST_BATCHES = 10_000, 100
"""Of one page, as OpenAI has it."""
_BATCHES_DEFAULT = 20
_SECONDS = "expires_after[seconds]"
_ANCHOR = "expires_after[anchor]"

_ASK = msgspec.json.Decoder(BatchAsk)

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


def batch_routes(lane: BatchLane) -> list[ColdRoute]:
    handlers = _Handlers(lane)
    return [
        ColdRoute(
            method="POST",
            path="/v1/files",
            verb="inference",
            run=handlers.upload,
            tag=TAG,
            summary="Send a file with the requests of a batch (purpose=batch, one JSON object a line)",
            upload=FORM,
            answer=FileObject,
        ),
        ColdRoute(
            method="GET",
            path="/v1/files",
            verb="read",
            run=handlers.files,
            tag=TAG,
            summary="One's own files, newest first",
            words=("purpose", "limit", "order", "after"),
            answer=FileList,
        ),
        ColdRoute(
            method="GET",
            path="/v1/files/{id}",
            verb="read",
            run=handlers.file,
            tag=TAG,
            summary="One file",
            answer=FileObject,
        ),
        ColdRoute(
            method="GET",
            path="/v1/files/{id}/content",
            verb="read",
            run=handlers.content,
            tag=TAG,
            summary="What is in a file: requests that were sent, or results",
            media="application/jsonl",
        ),
        ColdRoute(
            method="DELETE",
            path="/v1/files/{id}",
            verb="inference",
            run=handlers.delete,
            tag=TAG,
            summary="Delete a file that no batch reads any more",
            answer=FileDeleted,
        ),
        ColdRoute(
            method="POST",
            path="/v1/batches",
            verb="inference",
            run=handlers.create,
            tag=TAG,
            summary="Have the requests of a file answered in idle slots",
            body=BatchAsk,
            answer=Batch,
        ),
        ColdRoute(
            method="GET",
            path="/v1/batches",
            verb="read",
            run=handlers.batches,
            tag=TAG,
            summary="One's own batches, newest first",
            words=("limit", "after"),
            answer=BatchList,
        ),
        ColdRoute(
            method="GET",
            path="/v1/batches/{id}",
            verb="read",
            run=handlers.batch,
            tag=TAG,
            summary="How far a batch is, and the files with its results",
            answer=Batch,
        ),
        ColdRoute(
            method="POST",
            path="/v1/batches/{id}/cancel",
            verb="inference",
            run=handlers.cancel,
            tag=TAG,
            summary="End a batch; the results that are there stay",
            answer=Batch,
        ),
    ]


class _Handlers:
    def __init__(self, lane: BatchLane) -> None:
        self._lane = lane

    async def upload(self, cold: ColdRequest, request: Request) -> Response:
        form = _Form(cold, request)
        filename = await form.read_until_file()
        if form.fields.get("purpose", "batch") != "batch":
            raise Invalid("the only purpose of files here is batch", param="purpose")
        expires = _seconds(form.fields)
        file = await self._lane.upload(_identity(cold), filename, form.content(), expires_after_s=expires)
        try:
            await form.read_rest()
            if form.fields.get("purpose") != "batch":
                raise Invalid("purpose is missing; send purpose=batch", param="purpose")
            if _seconds(form.fields) != expires:
                raise Invalid("expires_after comes before the file in the form", param=_SECONDS)
        except OllamaDistributedError:
            await self._lane.delete(_identity(cold), file.id)
            raise
        return json_response(file)

    async def files(self, cold: ColdRequest, request: Request) -> Response:
        query = request.query_params
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise Invalid("order is asc or desc", param="order")
        rows = await self._lane.files(
            _identity(cold),
            limit=_limit(request, MOST_FILES, MOST_FILES),
            after=query.get("after", ""),
            oldest=order == "asc",
            purpose=query.get("purpose", ""),
        )
        return json_response(rows)

    async def file(self, cold: ColdRequest, request: Request) -> Response:
        return json_response(await self._lane.file(_identity(cold), request.path_params["id"]))

    async def content(self, cold: ColdRequest, request: Request) -> Response:
        file, pieces = await self._lane.content(_identity(cold), request.path_params["id"])
        return _Content(cold, file, pieces)

    async def delete(self, cold: ColdRequest, request: Request) -> Response:
        return json_response(await self._lane.delete(_identity(cold), request.path_params["id"]))

    async def create(self, cold: ColdRequest, request: Request) -> Response:
        return json_response(await self._lane.create(_identity(cold), await cold.body(request, _ASK)))

    async def batches(self, cold: ColdRequest, request: Request) -> Response:
        limit = _limit(request, _BATCHES_DEFAULT, MOST_BATCHES)
        after = request.query_params.get("after", "")
        return json_response(await self._lane.batches(_identity(cold), limit=limit, after=after))

    async def batch(self, cold: ColdRequest, request: Request) -> Response:
        return json_response(await self._lane.batch(_identity(cold), request.path_params["id"]))

    async def cancel(self, cold: ColdRequest, request: Request) -> Response:
        return json_response(await self._lane.cancel(_identity(cold), request.path_params["id"]))


def _identity(cold: ColdRequest) -> Identity:
    if cold.identity is None:
        raise Forbidden("this route needs an identity")
    return cold.identity


def _limit(request: Request, default: int, most: int) -> int:
    text = request.query_params.get("limit")
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 6 and 1 <= int(text) <= most):
        raise Invalid(f"limit is a number from 1 to {most}", param="limit")
    return int(text)


def _seconds(fields: dict[str, str]) -> int | None:
    if fields.get(_ANCHOR, "created_at") != "created_at":
        raise Invalid("expires_after counts from created_at", param=_ANCHOR)
    text = fields.get(_SECONDS)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise Invalid("expires_after[seconds] is a number", param=_SECONDS)
    return int(text)


class _Form:
    """A form with one file, read as it comes."""

    def __init__(self, cold: ColdRequest, request: Request) -> None:
        self._parser = Multipart(boundary_of(request.headers.get("content-type", "")))
        self._chunks = cold.upload(request)
        self._events: list[object] = []
        self.fields: dict[str, str] = {}

    async def read_until_file(self) -> str:
        """The name that the client has for it.

        Raises:
            Invalid, Malformed: there is none.
        """
        async for event in self._next():
            match event:
                case Field(name, value):
                    self._take(name, value)
                case FileBegins("file", filename):
                    return filename
                case FileBegins():
                    raise Invalid("the form's file is called `file`", param="file")
        raise Invalid("the form has no file", param="file")

    async def content(self) -> AsyncIterator[bytes]:
        async for event in self._next():
            match event:
                case FileData(data):
                    yield data
                case FileEnds():
                    return

    async def read_rest(self) -> None:
        async for event in self._next():
            match event:
                case Field(name, value):
                    self._take(name, value)
                case FileBegins():
                    raise Invalid("the form has more than one file", param="file")
        self._parser.finish()

    def _take(self, name: str, value: str) -> None:
        if name in self.fields:
            raise Invalid(f"the form has the field {name[:80]} twice", param=name[:80])
        self.fields[name] = value

    async def _next(self) -> AsyncIterator[object]:
        while True:
            while self._events:
                yield self._events.pop(0)
            chunk = await anext(self._chunks, None)
            if chunk is None:
                return
            self._events += self._parser.feed(chunk)


class _Content(StreamingResponse):
    """Ends early, and the connection with it, when the rest cannot be had."""

    def __init__(self, cold: ColdRequest, file: FileObject, pieces: AsyncIterator[bytes]) -> None:
        self._cold = cold
        self._pieces = _as_generator(pieces)
        super().__init__(
            self._pieces,
            # What somebody sent is never shown as a page of ours.
            headers={"content-length": str(file.bytes), "content-disposition": "attachment"},
            media_type="application/jsonl",
        )

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._pieces):
            try:
                await super().stream_response(send)
            except OllamaDistributedError as exc:
                self._cold.error_code = exc.code
                log.warning("gateway.file_broke", request_id=self._cold.request_id, error=exc.message)


async def _as_generator(pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    async for piece in pieces:
        yield piece
