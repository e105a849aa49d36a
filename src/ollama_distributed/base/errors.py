"""One tree of errors. Each class has a stable `code` and says whether a retry can help.

Rooms raise these; adapters translate foreign errors into them. Only
`gateway/errors.py` knows HTTP statuses, and each dialect shapes its own body there.
A message is written for the person who reads it: what happened, and what to do next.
It never holds a secret, a prompt or a memory address.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from ollama_distributed.base.usage import Left


class OllamaDistributedError(Exception):
    """Base of all our errors."""

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str = "") -> None:
        super().__init__(message or self.__class__.__name__)
        self.message = message or self.__class__.__name__


class Internal(OllamaDistributedError):
    """A defect of ours. The details are in the log, under the request id."""


# ── what the caller sent ────────────────────────────────────────────────────────────


class Invalid(OllamaDistributedError):
    """The request cannot be served as written."""

    code = "invalid_request"

    def __init__(self, message: str = "", *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        """The request's field at fault, e.g. `messages[0].content`, for dialects that name it."""


class MissingBody(Invalid):
    code = "missing_body"


class Malformed(Invalid):
    """The body is not JSON, or breaks a limit of depth, nodes or number size."""

    code = "malformed_body"


class BodyTooLarge(Invalid):
    code = "body_too_large"


class HeadersTooLarge(Invalid):
    """More header bytes or fields than a request may have."""

    code = "headers_too_large"


class RequestTimeout(Invalid):
    """The client sent its request too slowly."""

    code = "request_timeout"


class UnsupportedMedia(Invalid):
    """Content-Type or Content-Encoding that this route does not take."""

    code = "unsupported_media_type"


class InvalidName(Invalid):
    """A model name, tag or digest that breaks the naming rules."""

    code = "invalid_name"


class InvalidModel(Invalid):
    """A GGUF file, manifest or Modelfile that is damaged, hostile or not supported."""

    code = "invalid_model"


class DigestMismatch(Invalid):
    code = "digest_mismatch"


class Unsupported(Invalid):
    """The model or engine lacks a capability (thinking, tools, vision, insert, embedding)."""

    code = "unsupported_capability"


class ContextExceeded(Invalid):
    """The prompt does not fit the context."""

    code = "context_length_exceeded"

    def __init__(self, message: str, *, prompt_tokens: int = 0, context_tokens: int = 0) -> None:
        super().__init__(message)
        self.prompt_tokens = prompt_tokens
        self.context_tokens = context_tokens


# ── who asks ────────────────────────────────────────────────────────────────────────


class Unauthenticated(OllamaDistributedError):
    """No key, or one that is not valid."""

    code = "unauthenticated"


class TooManyAttempts(OllamaDistributedError):
    """Too many wrong passwords for a name, or from an address; the next try must wait."""

    code = "too_many_attempts"
    retryable = True

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Forbidden(OllamaDistributedError):
    """A known identity without the permission."""

    code = "forbidden"


class ForeignHost(Forbidden):
    """The Host header names no address of this node (DNS rebinding)."""

    code = "foreign_host"


# ── what is there ───────────────────────────────────────────────────────────────────


class NotFound(OllamaDistributedError):
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class BlobNotFound(NotFound):
    code = "blob_not_found"


class MethodNotAllowed(OllamaDistributedError):
    code = "method_not_allowed"


class Conflict(OllamaDistributedError):
    """Something else is there already, or was changed by someone else meanwhile."""

    code = "conflict"

    def __init__(self, message: str = "", *, revision: int | None = None) -> None:
        super().__init__(message)
        self.revision = revision
        """Where the entry stands now (0: absent), from replicated state; None: not known."""


class NotOffered(OllamaDistributedError):
    """A known route or feature that this version does not offer; the message says what does."""

    code = "not_offered"


# ── what this node can do now ───────────────────────────────────────────────────────


class QueueFull(OllamaDistributedError):
    """Too many requests wait already."""

    code = "queue_full"
    retryable = True

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimited(OllamaDistributedError):
    """A key or team has had what it may have in a minute or month, or runs as much as it may."""

    code = "rate_limited"
    retryable = True

    def __init__(self, message: str, *, retry_after_s: float = 1.0, left: Left | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.left = left


class BudgetSpent(OllamaDistributedError):
    """A key's or team's money for the month is spent."""

    code = "budget_spent"


class Unavailable(OllamaDistributedError):
    """Something that is needed is away or shutting down; it may be back soon."""

    code = "unavailable"
    retryable = True


class Overloaded(Unavailable):
    """The node itself is short of memory, and takes nothing new."""

    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NoCapacity(OllamaDistributedError):
    """The model does not fit this node's free memory; the message says what would."""

    code = "no_capacity"


class DiskFull(OllamaDistributedError):
    code = "disk_full"


class DeadlineExceeded(OllamaDistributedError):
    code = "deadline_exceeded"
    retryable = True


class Cancelled(OllamaDistributedError):
    """The client went away while it waited."""

    code = "cancelled"


# ── the engine ──────────────────────────────────────────────────────────────────────


class EngineError(OllamaDistributedError):
    """The engine answered with an error of its own."""

    code = "engine_error"


class RunnerDied(EngineError):
    """The model's process ended in the middle of the work."""

    code = "runner_died"
    retryable = True


class LoadFailed(EngineError):
    """The engine could not load the model; the message gives its reason."""

    code = "load_failed"


class Quarantined(EngineError):
    """The model crashed too often; the message says why, and until when."""

    code = "quarantined"


# ── the world outside ───────────────────────────────────────────────────────────────


class RegistryError(OllamaDistributedError):
    """A registry answered what it must not: wrong bytes, a redirect in circles, a refusal."""

    code = "registry_error"
