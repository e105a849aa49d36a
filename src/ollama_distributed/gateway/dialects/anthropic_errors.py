"""Errors in Anthropic's shape: `{"type": "error", "error": {type, message}, "request_id"}`."""

from __future__ import annotations

import msgspec

from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.base.ids import RequestId
from ollama_distributed.gateway.dialects.contract import ErrorResponse
from ollama_distributed.gateway.dialects.sse import json_value
from ollama_distributed.gateway.errors import error_headers, status_of

_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class AnthropicErrorDetail(msgspec.Struct, frozen=True):
    type: str
    message: str
    code: str
    """Our own stable code; the clients keep fields that they do not know."""


class AnthropicErrorBody(msgspec.Struct, frozen=True):
    """Error body of the Anthropic API."""

    type: str
    error: AnthropicErrorDetail
    request_id: str


def error_body(error: OllamaDistributedError, request_id: RequestId) -> bytes:
    status = status_of(error)
    kind = _TYPES.get(status) or ("invalid_request_error" if 400 <= status < 500 else "api_error")
    return json_value(
        AnthropicErrorBody("error", AnthropicErrorDetail(kind, error.message, error.code), request_id)
    )


def render_error(error: OllamaDistributedError, request_id: RequestId) -> ErrorResponse:
    return ErrorResponse(
        status=status_of(error), body=error_body(error, request_id), headers=error_headers(error, request_id)
    )
