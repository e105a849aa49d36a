"""The only place that knows HTTP statuses: error class -> status, and each dialect's body.

The nearest class in the tree decides. Ollama's own routes differ from the others in a few
places, because its clients expect it (`reference/ollama-api.md`, 1): a full queue is 503
with a fixed text, and what the engine or the memory refuses is 500. Elsewhere they are 429,
502 and 503, so that clients and proxies retry as they should.

A message of ours is shown as it is; a foreign exception never reaches a client.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import msgspec

from ollama_distributed.base import errors as e
from ollama_distributed.base.ids import RequestId
from ollama_distributed.gateway.dialects.contract import ErrorResponse

STATUS: Mapping[type[e.OllamaDistributedError], int] = {
    e.OllamaDistributedError: 500,
    e.Internal: 500,
    e.Invalid: 400,
    e.MissingBody: 400,
    e.Malformed: 400,
    e.BodyTooLarge: 413,
    e.HeadersTooLarge: 431,
    e.RequestTimeout: 408,
    e.UnsupportedMedia: 415,
    e.InvalidName: 400,
    e.InvalidModel: 400,
    e.DigestMismatch: 400,
    e.Unsupported: 400,
    e.ContextExceeded: 400,
    e.Unauthenticated: 401,
    e.TooManyAttempts: 429,
    e.Forbidden: 403,
    e.ForeignHost: 403,
    e.NotFound: 404,
    e.ModelNotFound: 404,
    e.BlobNotFound: 404,
    e.MethodNotAllowed: 405,
    e.Conflict: 409,
    e.NotOffered: 501,
    e.QueueFull: 429,
    e.RateLimited: 429,
    e.BudgetSpent: 402,
    e.Unavailable: 503,
    e.Overloaded: 503,
    e.NoCapacity: 503,
    e.DiskFull: 507,
    e.DeadlineExceeded: 504,
    e.Cancelled: 499,
    e.EngineError: 502,
    e.RunnerDied: 502,
    e.LoadFailed: 500,
    e.Quarantined: 503,
    e.RegistryError: 502,
}

OLLAMA_STATUS: Mapping[type[e.OllamaDistributedError], int] = {
    **STATUS,
    e.QueueFull: 503,
    e.NoCapacity: 500,
    e.EngineError: 500,
    e.RunnerDied: 500,
    e.Quarantined: 500,
    e.RegistryError: 500,
}

OLLAMA_BUSY = "server busy, please try again.  maximum pending requests exceeded"
"""Ollama's text, with its two spaces: clients compare it."""

_SPREAD_S = 10
"""`Retry-After` of a full queue or node: 1-10 s, unless it asks for more."""
_UNAVAILABLE_RETRY_S = 1
"""A restart or an election is over in about a second."""


def status_of(
    error: e.OllamaDistributedError, table: Mapping[type[e.OllamaDistributedError], int] = STATUS
) -> int:
    for kind in type(error).__mro__:
        status = table.get(kind)
        if status is not None:
            return status
    raise AssertionError("the root of the tree has a status")


_NO_RETRY = (("x-should-retry", "false"),)
"""The clients of OpenAI and Anthropic obey it. Without it they repeat every 409 and 5xx, and Claude Code
repeats a 401 for minutes."""


def error_headers(error: e.OllamaDistributedError, request_id: str) -> tuple[tuple[str, str], ...]:
    """`Retry-After` where waiting helps, `WWW-Authenticate` where a key is missing, and whether the same
    request cannot succeed.

    Who met a full queue together must not come back together: the request's id, which is as
    good as random, spreads them over `_SPREAD_S` seconds.
    """
    if isinstance(error, e.QueueFull | e.Overloaded):
        jitter_s = zlib.crc32(request_id.encode()) % _SPREAD_S
        return (("retry-after", str(max(1, math.ceil(error.retry_after_s)) + jitter_s)),)
    if isinstance(error, e.RateLimited):
        return (("retry-after", str(max(1, math.ceil(error.retry_after_s)))),)
    if isinstance(error, e.TooManyAttempts):
        return (("retry-after", str(max(1, math.ceil(error.retry_after_s)))),)
    if isinstance(error, e.Unavailable):
        return (("retry-after", str(_UNAVAILABLE_RETRY_S)),)
    if isinstance(error, e.Unauthenticated):
        return (("www-authenticate", "Bearer"), *_NO_RETRY)
    return () if error.retryable else _NO_RETRY


def as_ours(error: BaseException) -> e.OllamaDistributedError:
    """The error itself if it is of our tree; else `Internal`, without the foreign text."""
    if isinstance(error, e.OllamaDistributedError):
        return error
    return e.Internal("internal error; the log has the details under the request id")


class SeedErrorDetail(msgspec.Struct, frozen=True):
    code: str
    message: str
    retryable: bool
    request_id: str


class SeedErrorBody(msgspec.Struct, frozen=True):
    """Error body of the seed REST API."""

    error: SeedErrorDetail


class OllamaErrorBody(msgspec.Struct, frozen=True):
    """Error body of the Ollama API."""

    error: str


def seed_error_body(error: e.OllamaDistributedError, request_id: RequestId) -> bytes:
    return msgspec.json.encode(
        SeedErrorBody(SeedErrorDetail(error.code, error.message, error.retryable, request_id))
    )


def render_seed(error: e.OllamaDistributedError, request_id: RequestId) -> ErrorResponse:
    return ErrorResponse(
        status=status_of(error),
        body=seed_error_body(error, request_id),
        headers=error_headers(error, request_id),
    )


def ollama_text(error: e.OllamaDistributedError) -> str:
    """The error in Ollama's words."""
    if isinstance(error, e.QueueFull):
        return OLLAMA_BUSY
    if isinstance(error, e.Cancelled):
        return "request canceled"
    if isinstance(error, e.MissingBody):
        return "missing request body"
    return error.message


def ollama_error_body(error: e.OllamaDistributedError) -> bytes:
    return msgspec.json.encode(OllamaErrorBody(ollama_text(error)))


def render_ollama(error: e.OllamaDistributedError, request_id: RequestId) -> ErrorResponse:
    """`{"error": text}`; the request id rides in the header only, as Ollama's body has no room."""
    return ErrorResponse(
        status=status_of(error, OLLAMA_STATUS),
        body=ollama_error_body(error),
        headers=error_headers(error, request_id),
    )
