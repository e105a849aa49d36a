"""The hot path: one inference request from its head to its last byte, without I/O.

An adapter (`asgi.py`, `fast.py`) owns the socket. It makes an `Exchange` from the head,
feeds it the body and tells it when the reader is slow, fast again, or gone; the exchange
answers on its `Out`. Each exchange ends exactly once: answered, failed or cancelled, and is
then summed up for the log. Until the first byte of an answer an error is a response with
its true status; after it, the error is the last event of the stream.

States: receiving -> running -> (streaming ->) ended.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import structlog

from ollama_distributed.access.roles import INFERENCE
from ollama_distributed.base.errors import (
    Cancelled,
    MissingBody,
    OllamaDistributedError,
    RateLimited,
)
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import RequestId
from ollama_distributed.base.inference import (
    Delta,
    Event,
    Failed,
    Finished,
    LiveAnswer,
    Moved,
    Opened,
    Queued,
    Usage,
)
from ollama_distributed.gateway import questions
from ollama_distributed.gateway.body import RequestBody
from ollama_distributed.gateway.dialects import sse
from ollama_distributed.gateway.dialects.contract import (
    Call,
    Encoder,
    Generate,
    HotRoute,
    RequestContext,
)
from ollama_distributed.gateway.entry import Entry
from ollama_distributed.gateway.errors import as_ours
from ollama_distributed.gateway.gate import Admission, Head, check_body, request_id
from ollama_distributed.gateway.means import Means
from ollama_distributed.gateway.metering import Ticket, limit_headers
from ollama_distributed.gateway.out import Out, RawHeaders, cors_headers, error_response_headers
from ollama_distributed.gateway.questions import Question
from ollama_distributed.gateway.queueing import USUAL, place_comment, place_headers, turn_of, with_turn
from ollama_distributed.gateway.response import Response
from ollama_distributed.gateway.resuming import RESUME_AT, requests_of
from ollama_distributed.gateway.shapes import for_anthropic
from ollama_distributed.gateway.summary import Outcome, Summary, added, together
from ollama_distributed.gateway.workers import INLINE_BYTES

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

_JSON = b"application/json; charset=utf-8"


class Exchange:
    """One request and its answer."""

    __slots__ = (
        "_body",
        "_encoder",
        "_generations",
        "_head",
        "_identity",
        "_join",
        "_left",
        "_limit",
        "_means",
        "_model",
        "_paused",
        "_place",
        "_request_body",
        "_request_id",
        "_response",
        "_route",
        "_start",
        "_stop_task",
        "_streaming",
        "_ticket",
        "_turn",
        "_usage",
        "ended",
    )

    def __init__(self, means: Means, route: HotRoute, head: Head, out: Out) -> None:
        self._means = means
        self._route = route
        self._head = head
        self._start = means.clock.monotonic()
        self._request_id: RequestId = request_id(head.headers)
        self._response = Response(
            out, means.clock, self._request_id, means.node, anthropic=for_anthropic(head.path, head.headers)
        )
        self._identity: Identity | None = None
        self._body: list[bytes] = []
        self._encoder: Encoder | None = None
        self._generations: list[LiveAnswer] = []
        self._join = together
        self._left = 0
        self._model = ""
        self._place: Queued | None = None
        """Where it stood when it began to wait."""
        self._ticket: Ticket | None = None
        self._turn = USUAL
        self._usage: Usage | None = None
        self._stop_task: Callable[[], object] | None = None
        self._streaming = False
        self._paused = False
        self.ended = False
        limits = means.gate.limits
        self._limit = limits.large_body_bytes if route.large_body else limits.body_bytes
        self._request_body = RequestBody(self._limit, means.bodies)
        self._judge()

    # ── what the adapter says ───────────────────────────────────────────────────────

    def receive(self, data: bytes) -> None:
        """A piece of the body."""
        if self.ended:
            return
        try:
            self._request_body.add(data)
        except OllamaDistributedError as exc:
            self.fail(exc, close=True)

    def body_complete(self) -> None:
        """The whole body is here: run the call."""
        if self.ended or self._identity is None:
            return
        if self._request_body.size_bytes > INLINE_BYTES:
            self._means.spawn(self._read_large(self._identity))
            return
        try:
            self._shed(self._identity)
            self._run(self._parse(self._request_body.take(), self._identity))
        except Exception as exc:
            self._fail_by(exc)

    def pause(self) -> None:
        """The reader is slow: stop reading from the engine, or do not begin."""
        self._paused = True
        for generation in self._generations:
            generation.pause()

    def resume(self) -> None:
        self._paused = False
        for generation in self._generations:
            generation.resume()

    def disconnected(self) -> None:
        """The client went away: free its slot at once."""
        if self.ended:
            return
        self._stop()
        self._close(499, "cancelled", Cancelled.code)

    # ── before the call ─────────────────────────────────────────────────────────────

    def _admission(self) -> Admission:
        return self._means.gate.admit(self._head, INFERENCE)

    def _judge(self) -> None:
        """Everything that the head alone decides."""
        try:
            admission = self._admission()
            self._identity = admission.identity
            if admission.origin is not None:
                self._response.headers += cors_headers(admission.origin)
            self._turn = turn_of(self._head.headers, admission.identity)
            check_body(self._head.headers, self._limit)
            declared = self._head.headers.get("content-length")
            if declared is None or int(declared) > INLINE_BYTES:
                self._shed(admission.identity)
        except OllamaDistributedError as exc:
            self.fail(exc, close=True)

    def _shed(self, identity: Identity) -> None:
        """What would be refused is refused before it is read: under a flood that is most of the work."""
        if self._means.shed is not None and RESUME_AT not in self._head.headers:
            self._means.shed(identity, self._turn)

    async def _read_large(self, identity: Identity) -> None:
        """The task of a large body; a task root, so it catches everything.

        It is not cancelled when the exchange ends before it: no generation runs yet, and a
        thread cannot be stopped. What it made is then dropped.
        """

        def read() -> Call | None:
            return None if self.ended else self._parse(self._request_body.take(), identity)

        try:
            call = await self._means.offload(read)
            if call is not None and not self.ended:
                self._run(call)
        except Exception as exc:
            self._fail_by(exc)

    def _parse(self, body: bytes, identity: Identity) -> Call:
        if not body:
            raise MissingBody("missing request body")
        limits = self._means.gate.limits
        large = self._route.large_body
        self._means.guard.check(body, max_string=limits.large_string_bytes if large else limits.string_bytes)
        clock = self._means.clock
        context = RequestContext(
            request_id=self._request_id,
            identity=identity,
            now=clock.time(),
            path=self._head.path,
            headers=self._head.headers,
            wall=clock.time,
        )
        return with_turn(self._route.parse(body, context), self._turn)

    # ── the call ────────────────────────────────────────────────────────────────────

    def _run(self, call: Call) -> None:
        assert self._identity is not None
        entering = self._means.entrance.enter(call, self._identity)
        if isinstance(entering, Entry):
            self._let_in(entering)
        else:
            self._stop_task = self._means.spawn(self._enter(entering))

    async def _enter(self, entering: Callable[[], Coroutine[Any, Any, Entry]]) -> None:
        """The task of a call that has to wait before it may begin; a task root, so it catches everything."""
        try:
            entry = await entering()
            self._stop_task = None  # this very task: it ends by itself
            if not self.ended:
                self._let_in(entry)
            elif entry.ticket is not None:
                entry.ticket.close(0)
        except Exception as exc:
            self._stop_task = None
            self._fail_by(exc)

    def _let_in(self, entry: Entry) -> None:
        if entry.ticket is not None:
            self._ticket = entry.ticket
            now = self._means.clock.time()
            self._response.headers += limit_headers(entry.ticket.left, self._head.path, now)
        self._start_call(entry.call)

    def _start_call(self, call: Call) -> None:
        if isinstance(call, Generate):
            self._generate(call)
            return
        self._model = call.request.model
        self._stop_task = self._means.spawn(self._ask(call))

    def _generate(self, call: Generate) -> None:
        requests = requests_of(call, self._head.headers)
        self._encoder = call.encoder
        self._streaming = call.stream
        self._model = call.requests[0].model
        self._left = len(call.requests)
        if self._left > 1 and any(one.prompt is not call.requests[0].prompt for one in call.requests):
            self._join = added
        for index, request in enumerate(requests):
            generation = self._means.inference.open(request, partial(self._on_event, index))
            if self.ended:  # it failed at once, or another did: nothing may go on
                if self._left:
                    generation.cancel()
                return
            self._generations.append(generation)
            if self._paused:
                generation.pause()

    def _on_event(self, index: int, event: Event) -> None:
        if self.ended:
            return
        encoder = self._encoder
        assert encoder is not None
        if type(event) is not Delta:
            if type(event) is Failed:
                self.fail(event.error, index=index)
                return
            if type(event) is Moved:
                self._moved(event)
                return
            if type(event) is Queued:
                self._waits(encoder, index, event)
                return
            if type(event) is Opened and self._response.first_byte_at is None:
                self._response.node, self._response.why = event.node, event.route
        try:
            data = encoder.feed(index, event)
            if data:
                self._write(encoder, data)
        except Exception as exc:
            self._fail_by(exc)
            return
        if type(event) is Delta:
            return
        if type(event) is Finished:
            spent = event.spent or event.usage
            self._usage = spent if self._usage is None else self._join(self._usage, spent)
            self._left -= 1
            if self._left == 0:
                self._finish(encoder)

    def _moved(self, event: Moved) -> None:
        """Where a header can say so no more, a comment in a stream of server-sent events does."""
        assert self._encoder is not None
        response = self._response
        response.moved(event.node)
        if response.first_byte_at is not None and self._encoder.content_type == sse.CONTENT_TYPE:
            self._write(self._encoder, sse.comment(f"goes on at {response.served_by or 'another node'}"))

    def _waits(self, encoder: Encoder, index: int, place: Queued) -> None:
        """Who asked for it hears at once, as far as the dialect has words; all others with the head."""
        if self._place is None:
            self._place = place
            self._response.headers += place_headers(place)
        if not (self._turn.progress and self._streaming):
            return
        self._response.node = place.node
        if encoder.content_type == sse.CONTENT_TYPE:
            self._write(encoder, place_comment(place))
        elif line := encoder.feed(index, place):
            self._write(encoder, line)

    def _write(self, encoder: Encoder, data: bytes) -> None:
        if self._streaming:
            self._response.write(encoder.content_type, data)
        else:
            self._body.append(data)

    def _finish(self, encoder: Encoder) -> None:
        if self._streaming and self._response.first_byte_at is not None:
            self._response.end()
        else:
            self._response.whole(200, encoder.content_type.encode("ascii"), b"".join(self._body))
        self._close(200, "ok")

    async def _ask(self, call: Question) -> None:
        """The task of a question with one answer; a task root, so it catches everything."""
        try:
            reply = await questions.answer(call, self._means.inference, self._means.offload)
        except Exception as exc:
            self._stop_task = None  # this very task: it ends by itself
            self._fail_by(exc)
            return
        self._usage, self._response.node, self._response.why = reply.usage, reply.node, reply.why
        if not self.ended:
            self._response.whole(200, _JSON, reply.body)
            self._close(200, "ok")

    # ── the end ─────────────────────────────────────────────────────────────────────

    def fail(
        self,
        error: OllamaDistributedError,
        *,
        index: int = 0,
        close: bool = False,
        extra: RawHeaders | None = None,
    ) -> None:
        """End with an error. `close`: the rest of the body will not be read."""
        if self.ended:
            return
        self._stop()
        rendered = self._route.render_error(error, self._request_id)
        response = self._response
        if response.first_byte_at is not None:
            self._fail_stream(error, index)
        else:
            response.headers += error_response_headers(rendered, close=close) + (extra or [])
            if isinstance(error, RateLimited):
                now = self._means.clock.time()
                response.headers += limit_headers(error.left, self._head.path, now)
            response.whole(rendered.status, rendered.content_type.encode("ascii"), rendered.body)
        self._close(rendered.status, "error", error.code)

    def _fail_stream(self, error: OllamaDistributedError, index: int) -> None:
        """The status is gone: the error is the stream's last event."""
        assert self._encoder is not None
        try:
            last = self._encoder.feed(index, Failed(error))
        except Exception:
            log.exception("gateway.encoder_failed", request_id=self._request_id, route=self._route.path)
            last = b""
        if last:
            self._write(self._encoder, last)
        self._response.end()

    def _fail_by(self, exc: Exception) -> None:
        error = as_ours(exc)
        if error is not exc:
            log.error(
                "gateway.request_broke", request_id=self._request_id, route=self._route.path, exc_info=exc
            )
        self.fail(error)

    def _stop(self) -> None:
        self.ended = True
        for generation in self._generations:
            generation.cancel()
        if self._left and self._generations:
            self._usage = functools.reduce(self._join, [one.used() for one in self._generations])
        if self._stop_task is not None:
            self._stop_task()

    def _close(self, status: int, outcome: Outcome, code: str = "") -> None:
        """The one place where an exchange ends."""
        self.ended = True
        self._generations = []
        self._request_body.drop()
        response = self._response
        identity, usage = self._identity, self._usage
        if self._ticket is not None:
            self._ticket.close(usage.prompt_tokens + usage.completion_tokens if usage is not None else 0)
        self._means.observe(
            Summary(
                request_id=self._request_id,
                method=self._head.method,
                route=self._route.path,
                status=status,
                outcome=outcome,
                error_code=code,
                took_s=self._means.clock.monotonic() - self._start,
                first_byte_s=None if response.first_byte_at is None else response.first_byte_at - self._start,
                bytes_out=response.bytes_out,
                model=self._model,
                node=response.node,
                moves=response.moves,
                role=identity.role if identity else "",
                key_id=(identity.key_id or "") if identity else "",
                user=identity.user if identity else "",
                team=identity.team if identity else "",
                usage=usage,
            )
        )
