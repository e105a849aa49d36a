"""`Client`: the SDK for asyncio.

asyncio and httpx are imported on first use: they cost more than all of the SDK.
"""

from __future__ import annotations

import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from ollama_distributed.base.events import Channel, ChannelsAnswer
from ollama_distributed.base.priority import Priority
from ollama_distributed.base.queue import QueueAnswer
from ollama_distributed.client import calls, event_calls, queue_calls, wire
from ollama_distributed.client.access import Keys, Policies
from ollama_distributed.client.answers import error_of
from ollama_distributed.client.attempts import Outcome, Send, Succeeded, attempts
from ollama_distributed.client.audit import Audit
from ollama_distributed.client.batches import Batches, Files
from ollama_distributed.client.blobs import Upload
from ollama_distributed.client.bundles import BundleUpload, Target
from ollama_distributed.client.cluster import Cluster, Config, Nodes, Routes
from ollama_distributed.client.errors import ClientError
from ollama_distributed.client.events import reader_of
from ollama_distributed.client.following import Event, Follower
from ollama_distributed.client.models import Models
from ollama_distributed.client.people import Auth, Users
from ollama_distributed.client.reattach import Held
from ollama_distributed.client.sockets import Following, follow
from ollama_distributed.client.transport import (
    BLOB_CHUNK_BYTES,
    ERROR_BODY_BYTES,
    TIMEOUT_S,
    Settings,
    failure_of,
)
from ollama_distributed.client.usage import Usage

if TYPE_CHECKING:
    import ssl

    import httpx

T = TypeVar("T")


class Client:
    """Talks to one Ollama Distributed server, or to the first of several that answers.

    Used as `async with Client() as client`, it keeps connections open between calls; without
    `async with`, each call opens and closes its own, so that nothing is left to be closed.

    Args:
        base_url: one URL or a list. Default: `OLLAMA_HOST`, else http://127.0.0.1:8080. With a
            list, the next is tried when one cannot be reached or says 502, 503 or 504 before the
            first byte of an answer; the one that answered is asked first from then on.
        api_key: default: `OLLAMA_DISTRIBUTED_API_KEY`, else `OLLAMA_API_KEY`.
        timeout: longest silence of the server in seconds (loading a model counts as silence).
        retries: how often a call is tried again where that is safe, with growing waits.
        verify: TLS: False, a file of certificate authorities, or an SSL context.
        priority: the class in which requests wait for a slot (interactive, normal, batch), up to that of
            the key.

    Leaving a stream's loop early hangs up as soon as the loop runs on; in a program that ends
    there, wrap the stream in `contextlib.aclosing`. Every method raises `ClientError` or one of
    its kin.
    """

    def __init__(
        self,
        base_url: str | Sequence[str] | None = None,
        api_key: str | None = None,
        *,
        timeout: float = TIMEOUT_S,
        retries: int = 2,
        verify: bool | str | Path | ssl.SSLContext = True,
        priority: Priority | None = None,
    ) -> None:
        self._settings = Settings(base_url, api_key, timeout, retries, verify, priority)
        self._keep_alive = False
        self._http: dict[str, httpx.AsyncClient] = {}
        self.models = Models(self)
        self.files = Files(self)
        self.batches = Batches(self)
        self.audit = Audit(self)
        self.cluster = Cluster(self)
        self.nodes = Nodes(self)
        self.keys = Keys(self)
        self.policies = Policies(self)
        self.config = Config(self)
        self.auth = Auth(self)
        self.users = Users(self)
        self.usage = Usage(self)
        self.routes = Routes(self)

    async def __aenter__(self) -> Self:
        await self.aclose()
        self._keep_alive = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._keep_alive = False
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections. The client may be used again."""
        while self._http:
            _, http = self._http.popitem()
            await http.aclose()

    async def generate(self, request: wire.GenerateRequest) -> wire.GenerateResponse:
        """Complete a prompt; the whole answer at once."""
        return await self._run(calls.generate(request, stream=False))

    def generate_stream(self, request: wire.GenerateRequest) -> AsyncGenerator[wire.GenerateResponse]:
        """Complete a prompt, piece by piece. Leaving the loop stops the generation."""
        return self._stream(calls.generate(request, stream=True))

    async def chat(self, request: wire.ChatRequest) -> wire.ChatResponse:
        return await self._run(calls.chat(request, stream=False))

    def chat_stream(self, request: wire.ChatRequest) -> AsyncGenerator[wire.ChatResponse]:
        return self._stream(calls.chat(request, stream=True))

    async def embeddings(self, request: wire.EmbeddingsRequest) -> wire.EmbeddingsResponse:
        return await self._run(calls.embeddings(request))

    async def rerank(self, request: wire.RerankRequest) -> wire.RerankResponse:
        """Score documents against a query, best first."""
        return await self._run(calls.rerank(request))

    async def version(self) -> wire.Version:
        return await self._run(calls.version())

    async def queue(self, node: str = "") -> QueueAnswer:
        """Who waits at which model: of all nodes, or of one."""
        return await self._run(queue_calls.queue(node))

    def events(self, *channels: Channel, of: str = "", idle_s: float | None = None) -> AsyncGenerator[Event]:
        """Follow what happens, over a WebSocket, until the loop is left: first what there is (`what` is
        "now", then once "ready"), then what changes.

        A lost connection is opened again (`retries` above 0), and what was missed meanwhile is told.

        Args:
            channels: queue (one's own requests that wait), queues, nodes, metrics, alerts, transfers.
            of: only of that request, node or transfer.
            idle_s: also gives an event "idle" when nothing came for so long.
        """
        return follow(self._following(Follower(channels, of)), idle_s)

    def _following(self, follower: Follower) -> Following:
        return Following(self._settings, self._tried, follower)

    async def channels(self) -> ChannelsAnswer:
        """What one may follow with `events`."""
        return await self._run(event_calls.channels())

    async def health(self) -> wire.Health:
        return await self._run(calls.health())

    # ── how a call runs ─────────────────────────────────────────────────────────────

    async def _run(self, call: calls.Call[T], upload: Upload | BundleUpload | None = None) -> T:
        async def attempt(url: str) -> Outcome:
            return await self._ask(url, call, upload)

        result: T = await self._tried(call, attempt)
        return result

    async def _tried(
        self, call: calls.Call[Any], attempt: Callable[[str], Awaitable[Outcome]], retries: int | None = None
    ) -> Any:
        import asyncio

        settings = self._settings
        rounds = settings.retries if retries is None else retries
        steps = attempts(call, settings.servers, retries=rounds, draw=random.random)
        outcome: Outcome | None = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as finished:
                return finished.value
            if isinstance(step, Send):
                outcome = await attempt(step.url)
            else:
                await asyncio.sleep(step.seconds)
                outcome = None

    async def _open(
        self, url: str, call: calls.Call[Any], upload: Upload | BundleUpload | None = None
    ) -> httpx.Response | Outcome:
        """Send a call; its response with the body not read yet, or why there is none."""
        import httpx

        http = self._http.get(url)
        if http is None:
            http = httpx.AsyncClient(**self._settings.httpx_arguments(url, keep_alive=self._keep_alive))
            self._http[url] = http
        content, headers = _body(call, upload)
        request = http.build_request(call.method, call.path, content=content, headers=headers)
        try:
            response = await http.send(request, stream=True)
        except httpx.HTTPError as exc:
            return failure_of(exc, answer_began=False)
        if response.status_code < 300 or (response.status_code == 404 and call.missing_is is not None):
            return response
        return await self._refusal(response)

    @staticmethod
    async def _refusal(response: httpx.Response) -> ClientError:
        import httpx

        body = b""
        try:
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) >= ERROR_BODY_BYTES:
                    break
        except httpx.HTTPError:
            body = b""  # the status is known, and it is what matters
        finally:
            await response.aclose()
        return error_of(response.status_code, response.headers, body, now=time.time())

    async def _ask(self, url: str, call: calls.Call[T], upload: Upload | BundleUpload | None) -> Outcome:
        import httpx

        opened = await self._open(url, call, upload)
        if not isinstance(opened, httpx.Response):
            return opened
        parts: list[bytes] = []
        try:
            async for chunk in opened.aiter_bytes():
                parts.append(chunk)  # noqa: PERF401 - what came before a failure must be known
        except httpx.HTTPError as exc:
            return failure_of(exc, answer_began=bool(parts))
        finally:
            await opened.aclose()
        if opened.status_code == 404:
            return Succeeded(call.missing_is)
        return Succeeded(call.decode(b"".join(parts)))

    async def _stream(self, call: calls.Call[T]) -> AsyncGenerator[T]:
        held = Held(call, self._settings.retries, self._settings.servers.leave)
        once = call
        while True:
            try:
                async with aclosing(self._lines(once, held)) as lines:
                    async for item in lines:
                        yield item
                return
            except ClientError as error:
                once = held.lost(error)

    async def _lines(self, call: calls.Call[T], held: Held[T]) -> AsyncGenerator[T]:
        """Of one connection."""
        reader = reader_of(call)
        response: httpx.Response
        chunks: AsyncIterator[bytes]

        async def attempt(url: str) -> Outcome:
            return await self._first_chunk(url, call)

        response, data, chunks = await self._tried(call, attempt, held.retries)
        held.began(response.headers)
        import httpx

        try:
            while True:
                for item in reader.feed(data):
                    held.got(item)
                    yield item
                try:
                    data = await anext(chunks)
                except StopAsyncIteration:
                    break
                except httpx.HTTPError as exc:
                    raise failure_of(exc, answer_began=True).error(str(response.url)) from exc
        finally:
            await response.aclose()
        for item in reader.finish():
            held.got(item)
            yield item

    async def _save(self, call: calls.Call[bytes], target: Target) -> int:
        """Write an answer's body as it comes, in threads; returns its bytes."""
        import asyncio

        import httpx

        response: httpx.Response
        chunks: AsyncIterator[bytes]

        async def attempt(url: str) -> Outcome:
            return await self._first_chunk(url, call)

        try:
            response, first, chunks = await self._tried(call, attempt)
            try:
                target.begin(int(response.headers.get("content-length", "0")))
                pending = bytearray(first)
                async for chunk in chunks:
                    pending += chunk
                    if len(pending) >= BLOB_CHUNK_BYTES:
                        data, pending = bytes(pending), bytearray()
                        await asyncio.to_thread(target.write, data)
                await asyncio.to_thread(target.write, bytes(pending))
            except httpx.HTTPError as exc:
                raise failure_of(exc, answer_began=True).error(str(response.url)) from exc
            finally:
                await response.aclose()
            return await asyncio.to_thread(target.finish)
        except BaseException:
            target.discard()
            raise

    async def _first_chunk(self, url: str, call: calls.Call[Any]) -> Outcome:
        """Until the first byte of the answer is here, another server may be asked."""
        import httpx

        opened = await self._open(url, call)
        if not isinstance(opened, httpx.Response):
            return opened
        chunks = opened.aiter_bytes()
        try:
            data = await anext(chunks, b"")
        except httpx.HTTPError as exc:
            await opened.aclose()
            return failure_of(exc, answer_began=False)
        except BaseException:
            await opened.aclose()
            raise
        return Succeeded((opened, data, chunks))


def _body(
    call: calls.Call[Any], upload: Upload | BundleUpload | None
) -> tuple[bytes | AsyncIterator[bytes] | None, dict[str, str]]:
    if upload is None:
        kind = {"content-type": "application/json"} if call.body is not None else {}
        return call.body, {**kind, **call.headers}
    headers = {"content-type": "application/octet-stream", **call.headers}
    if upload.size_bytes is not None:
        headers["content-length"] = str(upload.size_bytes)
    return _in_threads(upload), headers


async def _in_threads(upload: Upload | BundleUpload) -> AsyncIterator[bytes]:
    import asyncio

    chunks = upload.chunks()
    while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
        yield chunk
