"""Requests that come from this node itself: lines of batches, on the hot path like any other.

They pass what requests from outside pass (limits, policies, quotas, accounts, the log), but for the
socket and the key: whoever asks here vouches for the identity.
"""

from __future__ import annotations

import asyncio

from ollama_distributed.access.roles import INFERENCE, demand
from ollama_distributed.base.errors import Cancelled
from ollama_distributed.base.identity import Identity
from ollama_distributed.batches.ports import Answer
from ollama_distributed.gateway.core import Exchange
from ollama_distributed.gateway.dialects.contract import HotRoute
from ollama_distributed.gateway.gate import Admission, Head
from ollama_distributed.gateway.hot import HotPath
from ollama_distributed.gateway.means import Means
from ollama_distributed.gateway.out import RawHeaders


class Inside:
    """Implements `batches.ports.Asking`."""

    def __init__(self, path: HotPath) -> None:
        self._means = path.means
        self._routes = {(route.method, route.path): route for route in path.routes()}

    async def __call__(self, endpoint: str, body: bytes, identity: Identity, request_id: str, /) -> Answer:
        """
        Raises:
            LookupError: there is no such route; whoever made the batch checked that.
        """
        route = self._routes["POST", endpoint]
        headers = {
            "content-type": "application/json",
            "x-request-id": request_id,
            "x-ollama-priority": "batch",
        }
        out = _Answered()
        exchange = _Admitted(self._means, route, Head("POST", endpoint, headers), out, identity)
        exchange.receive(body)
        exchange.body_complete()
        try:
            return await out.answer
        finally:
            exchange.disconnected()  # of no effect once it is answered


class _Admitted(Exchange):
    """Its identity is known; there is no origin and no credential to look at."""

    __slots__ = ("_given",)

    def __init__(self, means: Means, route: HotRoute, head: Head, out: _Answered, identity: Identity) -> None:
        self._given = identity
        super().__init__(means, route, head, out)

    def _admission(self) -> Admission:
        demand(self._given, INFERENCE, self._head.path)
        return Admission(self._given, None)


class _Answered:
    """An `Out` for an answer that comes as a whole."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    def respond(self, status: int, headers: RawHeaders, body: bytes) -> None:
        if not self.answer.done():
            self.answer.set_result(Answer(status=status, body=body, retry_after_s=_retry_after_s(headers)))

    def start(self, status: int, headers: RawHeaders) -> None:
        raise AssertionError(f"a line of a batch does not stream ({status}, {len(headers)} headers)")

    def write(self, data: bytes) -> None:
        raise AssertionError(f"a line of a batch does not stream ({len(data)} bytes)")

    def end(self) -> None:
        if not self.answer.done():
            self.answer.set_exception(Cancelled("the answer ended without a word"))


def _retry_after_s(headers: RawHeaders) -> float | None:
    for name, value in headers:
        if name == b"retry-after" and value.isdigit():
            return float(value)
    return None
