"""Errors in OpenAI's shape: `{"error": {message, type, param, code}}`.

The clients choose their exception by the status; `type` follows it, and `code` is our own
stable code, which for a missing model and a full context is OpenAI's too.
"""

from __future__ import annotations

import msgspec

from ollama_distributed.base.errors import Invalid, OllamaDistributedError
from ollama_distributed.base.ids import RequestId
from ollama_distributed.gateway.dialects.contract import ErrorResponse
from ollama_distributed.gateway.dialects.sse import json_value
from ollama_distributed.gateway.errors import error_headers, status_of

_TYPES = {
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class OpenAIErrorDetail(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str


class OpenAIErrorBody(msgspec.Struct, frozen=True):
    """Error body of the OpenAI API."""

    error: OpenAIErrorDetail


def error_body(error: OllamaDistributedError) -> bytes:
    status = status_of(error)
    kind = _TYPES.get(status) or ("invalid_request_error" if 400 <= status < 500 else "api_error")
    param = error.param if isinstance(error, Invalid) else None
    return json_value(OpenAIErrorBody(OpenAIErrorDetail(error.message, kind, param, error.code)))


def render_error(error: OllamaDistributedError, request_id: RequestId) -> ErrorResponse:
    """The request id rides in the header `x-request-id` only, as OpenAI's does."""
    return ErrorResponse(
        status=status_of(error), body=error_body(error), headers=error_headers(error, request_id)
    )
