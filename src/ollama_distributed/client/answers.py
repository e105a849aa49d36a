"""Reads what servers answer: errors in every dialect's shape, and lines of a stream.

Pure. Error bodies come as `{"error": {"code", "message", "retryable", "request_id"}}` (ours),
`{"error": "text"}` (Ollama), `{"error": {"message", "type"}}` (OpenAI), or not as JSON at all
(a proxy in between).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import msgspec

from ollama_distributed.client import errors

T = TypeVar("T")

LINE_LIMIT_BYTES = 64 * 1024 * 1024
"""Longest line of a stream: a whole answer with logprobs stays far below; a server that never
ends a line must not fill our memory."""
_QUOTE_CHARS = 300
"""So much of a foreign error page is worth showing."""

_BY_STATUS: dict[int, type[errors.ClientError]] = {
    400: errors.Invalid,
    401: errors.Unauthenticated,
    402: errors.BudgetSpent,
    403: errors.Forbidden,
    404: errors.NotFound,
    405: errors.MethodNotAllowed,
    408: errors.RequestTimeout,
    431: errors.HeadersTooLarge,
    409: errors.Conflict,
    413: errors.BodyTooLarge,
    415: errors.UnsupportedMedia,
    429: errors.QueueFull,
    499: errors.Cancelled,
    500: errors.Internal,
    501: errors.NotOffered,
    502: errors.Unavailable,
    503: errors.Unavailable,
    504: errors.DeadlineExceeded,
    507: errors.DiskFull,
}


def error_of(status: int, headers: Mapping[str, str], body: bytes, *, now: float) -> errors.ClientError:
    """The error that an answer with a status of 300 and up means. `headers`: lower-case names."""
    wait = retry_after_s(headers.get("retry-after", ""), now=now)
    request_id = headers.get("x-request-id")
    try:
        told = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        told = None
    if isinstance(told, dict) and "error" in told:
        error = _told_error(told["error"], status)
    else:
        error = _untold_error(status, headers, body)
    error.status = status
    error.retry_after_s = wait
    error.request_id = error.request_id or request_id
    return error


def _told_error(told: Any, status: int | None) -> errors.ClientError:
    if not isinstance(told, dict):
        return _text_class(str(told), status)(str(told))
    message = str(told.get("message") or "the server gave no reason")
    cls = errors.BY_CODE.get(str(told.get("code"))) or _text_class(message, status)
    retryable = told.get("retryable")
    request_id = told.get("request_id")
    return cls(
        message,
        retryable=retryable if isinstance(retryable, bool) else None,
        request_id=request_id if isinstance(request_id, str) else None,
    )


def _text_class(text: str, status: int | None) -> type[errors.ClientError]:
    """Ollama tells errors by status and wording alone."""
    if status in (429, 503) and "busy" in text:
        return errors.QueueFull
    if status in (404, None) and "not found" in text:
        return errors.ModelNotFound if "model" in text else errors.NotFound
    if status == 400 and "does not support" in text:
        return errors.Unsupported
    return _status_class(status)


def _status_class(status: int | None) -> type[errors.ClientError]:
    if status is None:
        return errors.Internal
    found = _BY_STATUS.get(status)
    if found is None:
        found = errors.Invalid if 400 <= status < 500 else errors.Internal
    return found


def _untold_error(status: int, headers: Mapping[str, str], body: bytes) -> errors.ClientError:
    if 300 <= status < 400:
        where = headers.get("location", "elsewhere")
        return errors.BadAnswer(f"the server redirects to {where}; use that address if you trust it")
    if status == 403 and not body:
        return errors.ForeignHost("the server does not know the host name that was used to reach it")
    text = " ".join(body.decode(errors="replace").split())[:_QUOTE_CHARS]
    return _status_class(status)(f"HTTP {status}: {text}" if text else f"HTTP {status}")


def retry_after_s(value: str, *, now: float) -> float | None:
    """Seconds that `Retry-After` asks to wait (RFC 9110 10.2.3: seconds or a date)."""
    value = value.strip()
    if not value:
        return None
    try:
        return max(0.0, float(value)) if value[0].isdigit() else _date_wait_s(value, now)
    except (ValueError, OverflowError):
        return None


def _date_wait_s(value: str, now: float) -> float:
    from email.utils import parsedate_to_datetime

    return max(0.0, parsedate_to_datetime(value).timestamp() - now)


def decoder_of(kind: type[T]) -> Callable[[bytes], T]:
    """Bytes of one JSON object -> struct. Raises `BadAnswer`."""
    decoder: msgspec.json.Decoder[T] | None = None  # made on first use: it costs about 1 ms

    def decode(data: bytes) -> T:
        nonlocal decoder
        if decoder is None:
            decoder = msgspec.json.Decoder(kind)
        try:
            return decoder.decode(data)
        except (msgspec.DecodeError, RecursionError) as exc:
            quoted = data[:_QUOTE_CHARS].decode(errors="replace")
            raise errors.BadAnswer(f"not the answer of this API ({exc}): {quoted}") from exc

    return decode


class Lines:
    """Cuts the bytes of an NDJSON stream into lines, however they were split on the way."""

    def __init__(self, limit_bytes: int = LINE_LIMIT_BYTES) -> None:
        self._parts: list[bytes] = []
        self._held_bytes = 0
        self._limit_bytes = limit_bytes

    def feed(self, data: bytes) -> Iterator[bytes]:
        *complete, rest = data.split(b"\n")
        for line in complete:
            self._parts.append(line)
            whole = b"".join(self._parts)
            self._parts, self._held_bytes = [], 0
            if whole.strip():
                yield whole
        if rest:
            self._parts.append(rest)
            self._held_bytes += len(rest)
        if self._held_bytes > self._limit_bytes:
            raise errors.BadAnswer(f"a line of the stream is longer than {self._limit_bytes} bytes")

    def rest(self) -> bytes:
        """What came after the last line's end: a last line without one, or a torn line."""
        return b"".join(self._parts).strip()


_ERROR_MARK = b'"error"'


def line_error(line: bytes) -> errors.ClientError | None:
    """The error that a line of a stream tells, if it is one.

    A model may write the word too: only an object whose own member is `error` counts.
    """
    if _ERROR_MARK not in line:
        return None
    try:
        told = msgspec.json.decode(line)
    except (msgspec.DecodeError, RecursionError):
        return None
    if not isinstance(told, dict) or "error" not in told:
        return None
    return _told_error(told["error"], None)


class StreamReader(Generic[T]):
    """Turns the bytes of one NDJSON answer into structs.

    `feed` raises the error that a line tells (after the items before it); `finish` raises
    `ConnectionLost` when the bytes ended before the last line: a torn answer never looks whole.
    """

    def __init__(self, decode: Callable[[bytes], T], done: Callable[[T], bool]) -> None:
        self._decode = decode
        self._done = done
        self._lines = Lines()
        self._finished = False

    def feed(self, data: bytes) -> Iterator[T]:
        for line in self._lines.feed(data):
            yield self._read(line)

    def finish(self) -> Iterator[T]:
        rest = self._lines.rest()
        if rest and not self._finished:
            try:
                item = self._read(rest)
            except errors.BadAnswer as exc:
                raise errors.ConnectionLost("the answer ended in the middle of a line") from exc
            yield item
        if not self._finished:
            raise errors.ConnectionLost("the answer ended before it was complete")

    def _read(self, line: bytes) -> T:
        error = line_error(line)
        if error is not None:
            raise error
        item = self._decode(line)
        self._finished = self._finished or self._done(item)
        return item
