"""How a call is tried: which URL next, after which failure, how long to wait.

Pure: a generator that says `Send` and `Wait` and is told what came of it; both clients run the
same one. One round tries every URL once, without waiting; rounds are spaced by exponential
back-off with full jitter (AWS Architecture Blog, "Exponential Backoff And Jitter"), so that
clients of a server that comes back do not all come at once. `Retry-After` is never undercut.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Literal

import msgspec

from ollama_distributed.client.calls import Call
from ollama_distributed.client.errors import ClientError, ConnectionFailed, ConnectionLost, TimedOut

BASE_WAIT_S = 0.25
"""First back-off at most; a server that restarts needs about so long to listen again."""
MAX_WAIT_S = 20.0
"""No single wait is longer. A server that asks for more gets its error passed to the caller."""

_OTHER_SERVER_MAY = frozenset({502, 503, 504})
"""Statuses by which a server says that it cannot now: another one may."""


_UNTRUSTED = "certificate verify failed: "
"""Of OpenSSL's words for it, then come the reason and ` (_ssl.c:1006)`."""


def not_reached(url: str, text: str) -> str:
    """No connection to `url`: `text` is the system's reason."""
    _, untrusted, reason = text.partition(_UNTRUSTED)
    if untrusted:
        return f"the certificate of {url} does not hold here: {reason.partition(' (_ssl')[0]}"
    return f"no server answers at {url} ({text})"


class Failure(msgspec.Struct, frozen=True):
    """What went wrong on the way, as a transport sees it."""

    stage: Literal["connect", "unanswered", "answering"]
    """`connect`: nothing was sent. `unanswered`: sent, no byte of the answer's body came.
    `answering`: it broke in the middle of the answer."""
    text: str
    timed_out: bool = False

    def error(self, url: str) -> ClientError:
        if self.stage == "connect":
            return ConnectionFailed(not_reached(url, self.text))
        if self.timed_out:
            return TimedOut(f"{url} was silent for too long ({self.text})")
        return ConnectionLost(f"the connection to {url} broke ({self.text})")


class Send(msgspec.Struct, frozen=True):
    url: str
    """Base URL to send the call to."""


class Wait(msgspec.Struct, frozen=True):
    seconds: float


class Succeeded(msgspec.Struct, frozen=True):
    answer: Any


Outcome = Succeeded | Failure | ClientError


class Servers:
    """The base URLs in the order to try them: the one that answered last comes first."""

    def __init__(self, urls: tuple[str, ...]) -> None:
        self.urls = urls
        self._good = 0

    def order(self) -> tuple[str, ...]:
        return self.urls[self._good :] + self.urls[: self._good]

    def answered(self, url: str) -> None:
        self._good = self.urls.index(url)

    def leave(self) -> None:
        """The one that answered hangs: it is asked last."""
        self._good = (self._good + 1) % len(self.urls)


def attempts(
    call: Call[Any], servers: Servers, *, retries: int, draw: Callable[[], float]
) -> Generator[Send | Wait, Outcome | None, Any]:
    """Yields what to do; a `Send` must be answered with its `Outcome`. Returns the answer.

    `retries`: rounds after the first. `draw`: uniform in [0, 1), for the jitter.

    Raises:
        ClientError: the last failure, when it may not be repeated or nothing is left to try.
    """
    for round_ in range(retries + 1):
        asked_wait_s = 0.0
        last: ClientError | None = None
        for url in servers.order():
            outcome = yield Send(url)
            if isinstance(outcome, Succeeded):
                servers.answered(url)
                return outcome.answer
            assert outcome is not None
            error = outcome if isinstance(outcome, ClientError) else outcome.error(url)
            if not _may_repeat(call, outcome):
                raise error
            last = _plainer(last, error)
            asked_wait_s = max(asked_wait_s, error.retry_after_s or 0.0)
            if isinstance(outcome, ClientError) and outcome.status not in _OTHER_SERVER_MAY:
                break
        assert last is not None
        if round_ == retries or asked_wait_s > MAX_WAIT_S:
            raise last
        jitter_s = min(MAX_WAIT_S, BASE_WAIT_S * 2**round_) * draw()
        yield Wait(asked_wait_s + jitter_s)
    raise AssertionError("retries is negative")


def _may_repeat(call: Call[Any], outcome: Failure | ClientError) -> bool:
    if isinstance(outcome, ClientError):
        # An answer: the server refused, so nothing was done but for a gateway's 502 and 504.
        if outcome.status in (502, 504):
            return outcome.retryable and call.repeat != "unsent"
        return outcome.retryable
    if outcome.stage == "connect":
        return True
    if call.repeat == "always":
        return True
    # A silent server may still be at work on it: asking again would double its load.
    return call.repeat == "unanswered" and outcome.stage == "unanswered" and not outcome.timed_out


def _plainer(first: ClientError | None, second: ClientError) -> ClientError:
    """Of several servers' errors the one that says more: an answer over no connection."""
    if first is None or (isinstance(first, ConnectionFailed) and not isinstance(second, ConnectionFailed)):
        return second
    return first
