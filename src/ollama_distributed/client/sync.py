"""`SyncClient`: the SDK without asyncio; the same calls, the same attempts, a blocking transport."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from ollama_distributed.base.events import Channel, ChannelsAnswer
from ollama_distributed.base.priority import Priority
from ollama_distributed.base.queue import QueueAnswer
from ollama_distributed.client import calls, event_calls, queue_calls, wire
from ollama_distributed.client.access import SyncKeys, SyncPolicies
from ollama_distributed.client.answers import error_of
from ollama_distributed.client.attempts import Outcome, Send, Succeeded, attempts
from ollama_distributed.client.audit import SyncAudit
from ollama_distributed.client.batches import SyncBatches, SyncFiles
from ollama_distributed.client.blobs import Upload
from ollama_distributed.client.bundles import BundleUpload, Target
from ollama_distributed.client.cluster import SyncCluster, SyncConfig, SyncNodes, SyncRoutes
from ollama_distributed.client.errors import ClientError
from ollama_distributed.client.events import reader_of
from ollama_distributed.client.following import Event, Follower
from ollama_distributed.client.people import SyncAuth, SyncUsers
from ollama_distributed.client.reattach import Held
from ollama_distributed.client.sockets import follow_sync
from ollama_distributed.client.sync_models import SyncModels
from ollama_distributed.client.transport import ERROR_BODY_BYTES, TIMEOUT_S, Settings, failure_of
from ollama_distributed.client.usage import SyncUsage

if TYPE_CHECKING:
    import ssl

    import httpx

T = TypeVar("T")


class SyncClient:
    """`Client` for code without an event loop: the same arguments, methods and errors.

    Streams are generators: leaving the loop early, or `close()` on the generator, stops the
    generation. Not for several threads at once; give each its own.
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
        self._http: dict[str, httpx.Client] = {}
        self.models = SyncModels(self)
        self.files = SyncFiles(self)
        self.batches = SyncBatches(self)
        self.audit = SyncAudit(self)
        self.cluster = SyncCluster(self)
        self.nodes = SyncNodes(self)
        self.keys = SyncKeys(self)
        self.policies = SyncPolicies(self)
        self.config = SyncConfig(self)
        self.auth = SyncAuth(self)
        self.users = SyncUsers(self)
        self.usage = SyncUsage(self)
        self.routes = SyncRoutes(self)

    def __enter__(self) -> Self:
        self.close()
        self._keep_alive = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._keep_alive = False
        self.close()

    def close(self) -> None:
        """Close all connections. The client may be used again."""
        while self._http:
            _, http = self._http.popitem()
            http.close()

    def generate(self, request: wire.GenerateRequest) -> wire.GenerateResponse:
        """Complete a prompt; the whole answer at once."""
        return self._run(calls.generate(request, stream=False))

    def generate_stream(self, request: wire.GenerateRequest) -> Generator[wire.GenerateResponse, None, None]:
        """Complete a prompt, piece by piece. Leaving the loop stops the generation."""
        return self._stream(calls.generate(request, stream=True))

    def chat(self, request: wire.ChatRequest) -> wire.ChatResponse:
        return self._run(calls.chat(request, stream=False))

    def chat_stream(self, request: wire.ChatRequest) -> Generator[wire.ChatResponse, None, None]:
        return self._stream(calls.chat(request, stream=True))

    def embeddings(self, request: wire.EmbeddingsRequest) -> wire.EmbeddingsResponse:
        return self._run(calls.embeddings(request))

    def rerank(self, request: wire.RerankRequest) -> wire.RerankResponse:
        """Score documents against a query, best first."""
        return self._run(calls.rerank(request))

    def version(self) -> wire.Version:
        return self._run(calls.version())

    def queue(self, node: str = "") -> QueueAnswer:
        """Who waits at which model: of all nodes, or of one."""
        return self._run(queue_calls.queue(node))

    def events(
        self, *channels: Channel, of: str = "", idle_s: float | None = None
    ) -> Generator[Event, None, None]:
        """Follow what happens, over a WebSocket, until the loop is left: first what there is (`what` is
        "now", then once "ready"), then what changes.

        A lost connection is opened again (`retries` above 0), and what was missed meanwhile is told.

        Args:
            channels: queue (one's own requests that wait), queues, nodes, metrics, alerts, transfers.
            of: only of that request, node or transfer.
            idle_s: also gives an event "idle" when nothing came for so long.
        """
        return follow_sync(self._settings, self._tried, Follower(channels, of), idle_s)

    def channels(self) -> ChannelsAnswer:
        """What one may follow with `events`."""
        return self._run(event_calls.channels())

    def health(self) -> wire.Health:
        return self._run(calls.health())

    # ── how a call runs ─────────────────────────────────────────────────────────────

    def _run(self, call: calls.Call[T], upload: Upload | BundleUpload | None = None) -> T:
        result: T = self._tried(call, lambda url: self._ask(url, call, upload))
        return result

    def _tried(
        self, call: calls.Call[Any], attempt: Callable[[str], Outcome], retries: int | None = None
    ) -> Any:
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
                outcome = attempt(step.url)
            else:
                time.sleep(step.seconds)
                outcome = None

    def _open(
        self, url: str, call: calls.Call[Any], upload: Upload | BundleUpload | None = None
    ) -> httpx.Response | Outcome:
        """Send a call; its response with the body not read yet, or why there is none."""
        import httpx

        http = self._http.get(url)
        if http is None:
            http = httpx.Client(**self._settings.httpx_arguments(url, keep_alive=self._keep_alive))
            self._http[url] = http
        content, headers = _body(call, upload)
        request = http.build_request(call.method, call.path, content=content, headers=headers)
        try:
            response = http.send(request, stream=True)
        except httpx.HTTPError as exc:
            return failure_of(exc, answer_began=False)
        if response.status_code < 300 or (response.status_code == 404 and call.missing_is is not None):
            return response
        return self._refusal(response)

    @staticmethod
    def _refusal(response: httpx.Response) -> ClientError:
        import httpx

        body = b""
        try:
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) >= ERROR_BODY_BYTES:
                    break
        except httpx.HTTPError:
            body = b""  # the status is known, and it is what matters
        finally:
            response.close()
        return error_of(response.status_code, response.headers, body, now=time.time())

    def _ask(self, url: str, call: calls.Call[T], upload: Upload | BundleUpload | None) -> Outcome:
        import httpx

        opened = self._open(url, call, upload)
        if not isinstance(opened, httpx.Response):
            return opened
        parts: list[bytes] = []
        try:
            for chunk in opened.iter_bytes():
                parts.append(chunk)  # noqa: PERF402 - what came before a failure must be known
        except httpx.HTTPError as exc:
            return failure_of(exc, answer_began=bool(parts))
        finally:
            opened.close()
        if opened.status_code == 404:
            return Succeeded(call.missing_is)
        return Succeeded(call.decode(b"".join(parts)))

    def _stream(self, call: calls.Call[T]) -> Generator[T, None, None]:
        held = Held(call, self._settings.retries, self._settings.servers.leave)
        once = call
        while True:
            try:
                yield from self._lines(once, held)
                return
            except ClientError as error:
                once = held.lost(error)

    def _lines(self, call: calls.Call[T], held: Held[T]) -> Generator[T, None, None]:
        """Of one connection."""
        reader = reader_of(call)
        response: httpx.Response
        chunks: Iterator[bytes]
        response, data, chunks = self._tried(call, lambda url: self._first_chunk(url, call), held.retries)
        held.began(response.headers)
        import httpx

        try:
            while True:
                for item in reader.feed(data):
                    held.got(item)
                    yield item
                try:
                    data = next(chunks)
                except StopIteration:
                    break
                except httpx.HTTPError as exc:
                    raise failure_of(exc, answer_began=True).error(str(response.url)) from exc
        finally:
            response.close()
        for item in reader.finish():
            held.got(item)
            yield item

    def _save(self, call: calls.Call[bytes], target: Target) -> int:
        """Write an answer's body as it comes; returns its bytes."""
        import httpx

        response: httpx.Response
        chunks: Iterator[bytes]
        try:
            response, data, chunks = self._tried(call, lambda url: self._first_chunk(url, call))
            try:
                target.begin(int(response.headers.get("content-length", "0")))
                target.write(data)
                for chunk in chunks:
                    target.write(chunk)
            except httpx.HTTPError as exc:
                raise failure_of(exc, answer_began=True).error(str(response.url)) from exc
            finally:
                response.close()
            return target.finish()
        except BaseException:
            target.discard()
            raise

    def _first_chunk(self, url: str, call: calls.Call[Any]) -> Outcome:
        """Until the first byte of the answer is here, another server may be asked."""
        import httpx

        opened = self._open(url, call)
        if not isinstance(opened, httpx.Response):
            return opened
        chunks = opened.iter_bytes()
        try:
            data = next(chunks, b"")
        except httpx.HTTPError as exc:
            opened.close()
            return failure_of(exc, answer_began=False)
        except BaseException:
            opened.close()
            raise
        return Succeeded((opened, data, chunks))


def _body(
    call: calls.Call[Any], upload: Upload | BundleUpload | None
) -> tuple[bytes | Iterator[bytes] | None, dict[str, str]]:
    if upload is None:
        kind = {"content-type": "application/json"} if call.body is not None else {}
        return call.body, {**kind, **call.headers}
    headers = {"content-type": "application/octet-stream", **call.headers}
    if upload.size_bytes is not None:
        headers["content-length"] = str(upload.size_bytes)
    return upload.chunks(), headers
