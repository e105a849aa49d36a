"""The shape of a dialect: body bytes -> `Call`, events -> bytes.

Pure: no clock, no I/O. The hot path (`gateway/core.py`) owns both ends: it makes the
`RequestContext`, runs the `Call`, and writes what the `Encoder` returns. An error at any
point becomes bytes through the same dialect's `Errors`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import RequestId
from ollama_distributed.base.inference import (
    EmbedRequest,
    EmbedResult,
    Event,
    InferenceRequest,
    RerankRequest,
    RerankResult,
)


class RequestContext(msgspec.Struct, frozen=True, kw_only=True):
    """What a dialect may know beside the body."""

    request_id: RequestId
    identity: Identity
    now: float
    """Seconds since the Unix epoch, when the request came."""
    path: str = ""
    path_model: str = ""
    """The model named in the path, where a route has one."""
    headers: dict[str, str] = {}
    """Lower-case names; only what a dialect asked for is of interest."""
    wall: Callable[[], float] = lambda: 0.0
    """Wall time now, for `created_at` of each streamed line."""


class Encoder(Protocol):
    """Turns the events of one call into bytes. One object per call."""

    content_type: str

    def feed(self, index: int, event: Event) -> bytes:
        """Bytes to write now (often b""). `index`: which of the call's requests spoke.

        A non-streaming encoder returns b"" until it is complete, then the whole body.
        `Failed` never comes here before the first byte was written: it is then an error
        response; after that the encoder writes the dialect's error event.
        """
        ...


class Generate(msgspec.Struct, frozen=True):
    """Open each request (OpenAI's `n` and prompt lists make several), feed the encoder."""

    requests: tuple[InferenceRequest, ...]
    encoder: Encoder
    stream: bool


class Embed(msgspec.Struct, frozen=True):
    request: EmbedRequest
    encode: Callable[[EmbedResult], bytes]


class Rerank(msgspec.Struct, frozen=True):
    request: RerankRequest
    encode: Callable[[RerankResult], bytes]


class CountTokens(msgspec.Struct, frozen=True):
    request: InferenceRequest
    encode: Callable[[int], bytes]


Call = Generate | Embed | Rerank | CountTokens

Parse = Callable[[bytes, RequestContext], Call]
"""Raises `Invalid` and its kin with a message in the dialect's own words."""


class ErrorResponse(msgspec.Struct, frozen=True):
    status: int
    body: bytes
    content_type: str = "application/json; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()


RenderError = Callable[[OllamaDistributedError, RequestId], ErrorResponse]


class HotRoute(msgspec.Struct, frozen=True):
    """One inference route of a dialect."""

    method: str
    path: str
    parse: Parse
    render_error: RenderError
    large_body: bool = False
    """Takes images: JSON strings up to 32 MiB."""
