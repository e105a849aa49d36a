"""The SDK's errors: one class per error code of the server, and those of the way to it.

The names and codes are those of `base/errors.py` (a test compares them). A class of its own is
needed here: a client's error also knows the HTTP status, the request id and how long to wait.
"""

from __future__ import annotations

from typing import ClassVar


class ClientError(Exception):
    """Base of all errors that the SDK raises. `str(error)` is the server's own message."""

    code: ClassVar[str] = "internal"
    retryable: bool = False
    """The same request may succeed a little later."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        request_id: str | None = None,
        retryable: bool | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        """HTTP status; None when there was none (no connection, or an error inside a stream)."""
        self.request_id = request_id
        """Names the request in the server's log."""
        self.retry_after_s = retry_after_s
        if retryable is not None:
            self.retryable = retryable


class Internal(ClientError):
    """A defect of the server."""


# ── what was asked ──────────────────────────────────────────────────────────────────


class Invalid(ClientError):
    code = "invalid_request"


class MissingBody(Invalid):
    code = "missing_body"


class Malformed(Invalid):
    code = "malformed_body"


class BodyTooLarge(Invalid):
    code = "body_too_large"


class HeadersTooLarge(Invalid):
    code = "headers_too_large"


class RequestTimeout(Invalid):
    """The server did not get the request in time."""

    code = "request_timeout"


class UnsupportedMedia(Invalid):
    code = "unsupported_media_type"


class InvalidName(Invalid):
    code = "invalid_name"


class InvalidModel(Invalid):
    code = "invalid_model"


class DigestMismatch(Invalid):
    code = "digest_mismatch"


class Unsupported(Invalid):
    code = "unsupported_capability"


class ContextExceeded(Invalid):
    code = "context_length_exceeded"


class Unauthenticated(ClientError):
    code = "unauthenticated"


class TooManyAttempts(ClientError):
    """Too many wrong passwords; `retry_after_s` says when the next one is looked at."""

    code = "too_many_attempts"
    retryable = True


class Forbidden(ClientError):
    code = "forbidden"


class ForeignHost(Forbidden):
    code = "foreign_host"


class NotFound(ClientError):
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class BlobNotFound(NotFound):
    code = "blob_not_found"


class MethodNotAllowed(ClientError):
    code = "method_not_allowed"


class Conflict(ClientError):
    code = "conflict"


class NotOffered(ClientError):
    """A part of the API that this server does not have."""

    code = "not_offered"


# ── what the server can do now ──────────────────────────────────────────────────────


class QueueFull(ClientError):
    code = "queue_full"
    retryable = True


class RateLimited(ClientError):
    """The key or its team has had what it may have in a minute or a month; `retry_after_s` says when
    there is more."""

    code = "rate_limited"
    retryable = True


class BudgetSpent(ClientError):
    """The money of the key or its team for the month is spent."""

    code = "budget_spent"


class Unavailable(ClientError):
    code = "unavailable"
    retryable = True


class Overloaded(Unavailable):
    """The server itself is short of memory; another one may not be."""

    code = "overloaded"


class NoCapacity(ClientError):
    code = "no_capacity"


class DiskFull(ClientError):
    code = "disk_full"


class DeadlineExceeded(ClientError):
    code = "deadline_exceeded"
    retryable = True


class Cancelled(ClientError):
    code = "cancelled"


class EngineError(ClientError):
    code = "engine_error"


class RunnerDied(EngineError):
    code = "runner_died"
    retryable = True


class LoadFailed(EngineError):
    code = "load_failed"


class Quarantined(EngineError):
    code = "quarantined"


class RegistryError(ClientError):
    """The registry that the server asked, not the server, is at fault."""

    code = "registry_error"


# ── the way there ───────────────────────────────────────────────────────────────────


class ConnectionFailed(Unavailable):
    """No server answered at any of the URLs; nothing was asked."""

    code = "connection_failed"


class ConnectionLost(Unavailable):
    """The connection broke; the request may have been carried out."""

    code = "connection_lost"


class TimedOut(DeadlineExceeded):
    """The server was silent for longer than `timeout`."""

    code = "timed_out"


class BadAnswer(ClientError):
    """What came back is not what this API answers: another program listens there."""

    code = "bad_answer"


def _tree(root: type[ClientError]) -> list[type[ClientError]]:
    return [root, *(found for child in root.__subclasses__() for found in _tree(child))]


BY_CODE: dict[str, type[ClientError]] = {Internal.code: Internal} | {
    cls.code: cls for cls in _tree(ClientError) if cls not in (ClientError, Internal)
}
