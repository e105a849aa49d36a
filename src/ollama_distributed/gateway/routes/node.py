"""The node itself: probes, metrics, documentation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ollama_distributed.gateway import metrics
from ollama_distributed.gateway.cold import ColdRequest
from ollama_distributed.gateway.pages import docs_page, page_headers
from ollama_distributed.gateway.routes.table import ColdRoute, Node, json_response
from ollama_distributed.gateway.workers import Offload

TAG = "Node"


class Alive(msgspec.Struct, frozen=True):
    status: Literal["ok"] = "ok"


class PreloadCounts(msgspec.Struct, frozen=True, kw_only=True):
    loaded: int
    coming: int
    failed: int


class Ready(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    status: Literal["ready", "starting", "overloaded"]
    """overloaded: its memory is short, and it refuses new requests."""
    cluster: str = ""
    """In one word; inference does not wait for it, and neither does this."""
    preload: PreloadCounts | None = None
    """Of the models that were to be loaded at the start."""


class ApiDocument:
    """The OpenAPI document as JSON and as a page. Made when first asked for, in a thread: it takes as long as
    many requests."""

    def __init__(self, make: Callable[[], dict[str, Any]], offload: Offload) -> None:
        self._make = make
        self._offload = offload
        self._made: tuple[bytes, str] | None = None

    async def json(self) -> bytes:
        return (await self._both())[0]

    async def page(self) -> str:
        return (await self._both())[1]

    async def _both(self) -> tuple[bytes, str]:
        if self._made is None:
            self._made = await self._offload(self._render)
        return self._made

    def _render(self) -> tuple[bytes, str]:
        document = self._make()
        return msgspec.json.encode(document), docs_page(document)


def node_routes(node: Node, document: ApiDocument) -> list[ColdRoute]:

    async def healthz(_cold: ColdRequest, _request: Request) -> Response:
        return json_response(Alive())

    async def readyz(_cold: ColdRequest, _request: Request) -> Response:
        started, refusing = node.ready(), node.overload.refusing
        preload = None
        if preloaded := node.preloaded():  # numbers only: anyone may read this
            states = Counter(one.state for one in preloaded.values())
            coming = len(preloaded) - states["loaded"] - states["failed"]
            preload = PreloadCounts(loaded=states["loaded"], coming=coming, failed=states["failed"])
        answer = Ready(
            status="starting" if not started else "overloaded" if refusing else "ready",
            cluster=node.cluster_status() if node.cluster_status is not None else "",
            preload=preload,
        )
        return json_response(answer, 200 if answer.status == "ready" else 503)

    async def scrape(_cold: ColdRequest, _request: Request) -> Response:
        disk = node.disks.figures() if node.disks is not None else None
        pieces = node.moves.figures() if node.moves is not None else None
        places = node.places.figures() if node.places is not None else None
        moving = node.transfers.figures() if node.transfers is not None else None
        waiting = node.queues.figures() if node.queues is not None else None
        used = node.usage.figures() if node.usage is not None else None
        memory = node.overload.figures()
        text = node.metrics.render(
            node.residents.loaded(), disk, pieces, places, moving, waiting, used, memory
        )
        return Response(text, headers={"content-type": metrics.CONTENT_TYPE})

    async def openapi(_cold: ColdRequest, _request: Request) -> Response:
        return Response(await document.json(), media_type="application/json; charset=utf-8")

    async def docs(_cold: ColdRequest, _request: Request) -> Response:
        return Response(await document.page(), headers=page_headers(), media_type="text/html")

    ready = ColdRoute(
        method="GET",
        path="/readyz",
        verb=None,
        run=readyz,
        tag=TAG,
        summary="It takes requests; 503: not now",
        answer=Ready,
        same=(503,),
    )
    return [
        ColdRoute(
            method="GET",
            path="/healthz",
            verb=None,
            run=healthz,
            tag=TAG,
            summary="The process is alive",
            answer=Alive,
        ),
        ready,
        msgspec.structs.replace(
            ready, path="/health", summary="As /readyz, under the name that llama-server and vLLM have for it"
        ),
        ColdRoute(
            method="GET",
            path="/metrics",
            verb="read",
            run=scrape,
            tag=TAG,
            summary="Prometheus metrics",
            media="text/plain",
        ),
        ColdRoute(
            method="GET",
            path="/openapi.json",
            verb="read",
            run=openapi,
            tag=TAG,
            summary="This document",
            answer=dict,
        ),
        ColdRoute(
            method="GET",
            path="/docs",
            verb="read",
            run=docs,
            tag=TAG,
            summary="This document, to read",
            media="text/html",
        ),
        *(
            ColdRoute(method="HEAD", path=path, verb=None, run=run, tag=TAG, summary="", hidden=True)
            # Many monitors ask so.
            for path, run in (("/healthz", healthz), ("/readyz", readyz), ("/health", readyz))
        ),
    ]
