"""One blob from a registry: ranges in parallel, straight from where the registry keeps it.

The registry's own answer is a redirect as a rule; where it leads is remembered, so that the
other ranges go there at once. When that address wears out (they are signed for a while), the
registry is asked again. A server without ranges gets one request, read to its end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager

import anyio
import structlog

from ollama_distributed.adapters.egress.client import EgressClient, Response
from ollama_distributed.adapters.egress.urls import Url
from ollama_distributed.adapters.registry.parts import cut, is_answer_to, range_header
from ollama_distributed.adapters.registry.session import Session
from ollama_distributed.base.errors import (
    DeadlineExceeded,
    OllamaDistributedError,
    QueueFull,
    RegistryError,
    Unavailable,
)
from ollama_distributed.distribution.ports import Partial
from ollama_distributed.models.names import BlobId

log = structlog.get_logger()

TRIES = 6
"""Of one part, in a row, that bring next to nothing; as many as Ollama's."""
_WORTH_BYTES = 256 << 10
"""A try that brought so much was none in vain."""
_WRITE_BYTES = 1 << 20
_ANSWERS = (200, 206)


class _NoRangesError(Exception):
    """The server sends the whole blob whatever is asked."""


class Download:
    """Used once. `take` is called with each number of bytes that came, and waits as the rate
    limit says; `wait_s`: before the n-th try of a part, seconds."""

    def __init__(
        self,
        session: Session,
        egress: EgressClient,
        blob: BlobId,
        into: Partial,
        *,
        streams: int,
        take: Callable[[int], Awaitable[None]],
        wait_s: Callable[[int], float],
    ) -> None:
        self._session = session
        self._egress = egress
        self._into = into
        self._streams = streams
        self._take = take
        self._wait_s = wait_s
        self._url = session.url("blobs", blob.digest)
        self._direct: Url | None = None
        self._answered = anyio.Event()
        """The first part's answer began: it is known where the blob lies, and that it has ranges."""

    async def run(self) -> None:
        """Until nothing is missing. Raises as `distribution.ports.Registry`; what came stays."""
        parts = deque(cut(self._into.missing(), self._streams))
        if not parts:
            return
        failures: list[Exception] = []

        async def work(leads: bool) -> None:
            try:
                if not leads:
                    await self._answered.wait()
                while parts:
                    await self._part(*parts.popleft())
            except (OllamaDistributedError, _NoRangesError, OSError) as exc:
                failures.append(exc)
                group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            for index in range(min(self._streams, len(parts))):
                group.start_soon(work, index == 0)
        if not failures:
            return
        if not isinstance(failures[0], _NoRangesError):
            raise failures[0]
        log.info("registry.no_ranges", site=self._url.site)
        await self._part(0, self._into.size)

    async def _part(self, begin: int, end: int) -> None:
        """The bytes [begin, end), in as many tries as it takes."""
        at, tries = begin, 0

        async def put(data: bytes) -> None:
            nonlocal at
            await self._take(len(data))
            await self._into.write(at, data)
            at += len(data)

        while at < end:
            before = at
            try:
                await self._try(at, end, put)
            except (Unavailable, QueueFull, DeadlineExceeded) as exc:
                tries = 1 if at - before >= _WORTH_BYTES else tries + 1
                if tries >= TRIES:
                    raise
                self._direct = None
                log.info("registry.part_again", url=self._url.without_query, at=at, error=exc.message)
                await anyio.sleep(self._wait_s(tries))

    async def _try(self, begin: int, end: int, put: Callable[[bytes], Awaitable[None]]) -> None:
        """One request, whose body goes to `put` piece by piece; never more than was asked for."""
        whole = (begin, end) == (0, self._into.size)
        async with self._asked(() if whole else (("range", range_header(begin, end)),)) as response:
            if response.status == 200 and not whole:
                raise _NoRangesError
            self._check(response, begin, end)
            self._answered.set()
            pending, left = bytearray(), end - begin
            async with aclosing(response.chunks()) as chunks:
                try:
                    async for chunk in chunks:
                        left -= len(chunk)
                        if left < 0:
                            raise RegistryError(f"{response.url.site} sends more bytes than it was asked for")
                        pending += chunk
                        if len(pending) >= _WRITE_BYTES:
                            await put(bytes(pending))
                            pending.clear()
                except Unavailable:
                    if pending:
                        await put(bytes(pending))  # what came before the end is good
                    raise
            if pending:
                await put(bytes(pending))
            if left:
                raise Unavailable(f"{response.url.site} ended its answer {left} bytes early")

    def _check(self, response: Response, begin: int, end: int) -> None:
        """
        Raises:
            RegistryError: the answer is to another question.
        """
        site, size = response.url.site, self._into.size
        if response.status not in _ANSWERS:
            raise RegistryError(f"{site} answers {response.status} to a request for bytes {begin}-{end}")
        if response.status == 206 and not is_answer_to(
            begin, end, size, response.headers.get("content-range", "")
        ):
            raise RegistryError(f"{site} sends other bytes than the ones that were asked for")
        length = response.headers.get("content-length")
        if length is not None and length != str(end - begin):
            raise RegistryError(
                f"{site} has {length} bytes for a blob (or a part of it) of which the manifest says "
                f"{end - begin}"
            )

    @asynccontextmanager
    async def _asked(self, headers: tuple[tuple[str, str], ...]) -> AsyncIterator[Response]:
        """An answer from where the blob lies: at once if that is known, else by way of the registry."""
        direct = self._direct
        if direct is not None:
            async with self._egress.send("GET", direct, headers=headers) as response:
                if response.status in _ANSWERS:
                    yield response
                    return
            if self._direct is direct:
                self._direct = None
        async with self._session.send("GET", self._url, headers=headers) as response:
            if response.url.origin != self._url.origin:
                self._direct = response.url
            yield response
