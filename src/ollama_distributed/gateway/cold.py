"""Everything but inference: the checks and the one log line around FastAPI.

FastAPI routes; this module admits the request first, shapes its errors by path, and sums it
up when it is over. Handlers get a `ColdRequest` and return a `Response`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import msgspec
import structlog
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from ollama_distributed.access.policies import allows_model
from ollama_distributed.access.roles import Resource, Right, Verb, demand, may
from ollama_distributed.base.audit import AuditEntry
from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import (
    BodyTooLarge,
    Forbidden,
    Internal,
    Invalid,
    MethodNotAllowed,
    MissingBody,
    ModelNotFound,
    NotFound,
    OllamaDistributedError,
    Unauthenticated,
)
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import RequestId
from ollama_distributed.gateway.asgi import Receive, Scope, Send, scope_head
from ollama_distributed.gateway.auditing import (
    SIGN_IN,
    Auditing,
    about,
    entry_of,
    is_privileged,
    refused_entry,
)
from ollama_distributed.gateway.connections import met
from ollama_distributed.gateway.dialects.fields import decode
from ollama_distributed.gateway.errors import as_ours
from ollama_distributed.gateway.gate import Gate, Head, check_body, request_id, too_large_text
from ollama_distributed.gateway.jsonguard import JsonGuard
from ollama_distributed.gateway.limits import Limits
from ollama_distributed.gateway.origins import check_type
from ollama_distributed.gateway.out import RawHeaders, cors_headers, id_headers
from ollama_distributed.gateway.pages import page_headers, problem_page, wants_page
from ollama_distributed.gateway.rights import PUBLIC
from ollama_distributed.gateway.shapes import for_anthropic, renderer_of
from ollama_distributed.gateway.summary import Observer, Outcome, Summary
from ollama_distributed.gateway.workers import INLINE_BYTES, Offload

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

T = TypeVar("T")
App = Callable[[Scope, Receive, Send], Awaitable[None]]
_KEY = "ollama_distributed.request"
_OF_MODELS = frozenset({"models", "transfers", "placement", "disk"})
"""Resources whose paths name a model."""


class ColdRequest:
    """A request that was admitted, and what a handler may ask of it."""

    def __init__(
        self, head: Head, request_id: RequestId, limits: Limits, guard: JsonGuard, offload: Offload
    ) -> None:
        self.head = head
        self.request_id = request_id
        self.identity: Identity | None = None
        self.error_code = ""
        self.audit: Auditing | None = None
        self._begun: AuditEntry | None = None
        self._read: bytes | None = None
        self._limits = limits
        self._guard = guard
        self._offload = offload

    @staticmethod
    def of(request: Request) -> ColdRequest:
        found: ColdRequest = request.scope[_KEY]
        return found

    def may(self, verb: Verb, resource: Resource) -> bool:
        """Whether who asks could also do this."""
        return self.identity is not None and may(self.identity, Right(verb, resource))

    def sees(self, model: str) -> bool:
        """Whether the model exists for who asks."""
        return self.identity is None or allows_model(self.identity, model)

    def check_model(self, model: str) -> None:
        """
        Raises:
            ModelNotFound: as where there is none.
        """
        if not self.sees(model):
            raise ModelNotFound(f"model '{model}' not found")

    async def body(self, request: Request, decoder: msgspec.json.Decoder[T]) -> T:
        """The JSON body, decoded; raises as `raw_body`, and `Invalid`."""
        body = await self.raw_body(request)
        return await self._apart(body, lambda: decode(body, decoder))

    async def raw_body(self, request: Request) -> bytes:
        """The JSON body, checked.

        Raises:
            MissingBody, Malformed, BodyTooLarge, UnsupportedMedia
        """
        body = await self._whole(request)
        if not body:
            raise MissingBody("missing request body")
        most = self._limits.string_bytes
        await self._apart(body, lambda: self._guard.check(body, max_string=most))
        return body

    async def _whole(self, request: Request) -> bytes:
        """The body of a request that is no upload, read once."""
        if self._read is None:
            limit = self._limits.body_bytes
            check_body(self.head.headers, limit)
            data = bytearray()
            async for chunk in request.stream():
                data += chunk
                if len(data) > limit:
                    raise BodyTooLarge(too_large_text(limit))
            self._read = bytes(data)
        return self._read

    async def record(self, request: Request, right: Right | None) -> None:
        """Write what is about to be done, if it is of that kind.

        Raises:
            DiskFull, Unavailable: it cannot be written, and so must not be done.
        """
        route = request.scope["route"].path
        if self.audit is None or not is_privileged(self.head.method, route, right):
            return
        body = await self._whole(request) if self._may_name() else b""
        named = about(request.path_params, body)
        entry = entry_of(self.head, route, self.request_id, self.identity, "begun", named)
        await self.audit.write(entry)
        self._begun = entry

    def _may_name(self) -> bool:
        """Whether the body is JSON, as far as the head says, and so may name what it is about."""
        kind, size = self.head.headers.get("content-type"), self.head.headers.get("content-length", "")
        if kind is None:
            return size.isascii() and size.isdigit() and len(size) < 6
        return kind.startswith("application/json")

    async def record_sign_in(self, request: Request) -> None:
        """As `record`, of somebody who is about to be told that they are in."""
        if self.audit is not None and self.head.path in SIGN_IN:
            named = about({}, self._read or b"")
            route = request.scope["route"].path
            await self.audit.write(entry_of(self.head, route, self.request_id, None, "ok", named))

    def record_refusal(self, right: Right | None, code: str) -> None:
        """Who may not do it, or is not who they say."""
        if self.audit is None:
            return
        if self._begun is None and is_privileged(self.head.method, self.head.path, right):
            self.audit.refused(refused_entry(self.head, self.request_id, code, self.identity))
        elif right is None and self.head.path in SIGN_IN:
            self.audit.refused(refused_entry(self.head, self.request_id, code))

    def record_end(self, status: int) -> None:
        """How that went whose begin was recorded."""
        if self.audit is not None and self._begun is not None:
            result = "ok" if 0 < status < 400 else self.error_code or f"status {status}"
            self.audit.note(msgspec.structs.replace(self._begun, result=result))

    async def _apart(self, body: bytes, work: Callable[[], T]) -> T:
        """`work` on a body, in a thread if the body is large."""
        return work() if len(body) <= INLINE_BYTES else await self._offload(work)

    async def upload(self, request: Request) -> AsyncIterator[bytes]:
        """The body as it comes, of any size."""
        check_body(self.head.headers, None)
        if self._read is not None:
            yield self._read
            return
        async for chunk in request.stream():
            if chunk:
                yield chunk


def handler(
    right: Right | None, run: Callable[[ColdRequest, Request], Awaitable[Response]], *, takes_json: bool
) -> Callable[[Request], Awaitable[Response]]:
    """A FastAPI endpoint that demands `right` (None: public) and shapes errors."""

    async def endpoint(request: Request) -> Response:
        cold = ColdRequest.of(request)
        try:
            if right is not None:
                if cold.identity is None:
                    raise Forbidden("this route needs an identity")
                demand(cold.identity, right, cold.head.path)
                named = request.path_params.get("name") or request.path_params.get("model")
                if named and right.resource in _OF_MODELS:
                    cold.check_model(named)
            if takes_json:
                check_type(cold.head.headers)
            await cold.record(request, right)
            response = await run(cold, request)
            if right is None and response.status_code < 400:
                await cold.record_sign_in(request)
        except ClientDisconnect:
            raise
        except Exception as exc:
            response = error_response(cold, exc)
            if isinstance(exc, Forbidden | Unauthenticated):
                cold.record_refusal(right, exc.code)
        return response

    endpoint.__name__ = run.__name__
    endpoint.__doc__ = run.__doc__
    return endpoint


def error_response(cold: ColdRequest, exc: Exception) -> Response:
    error = as_ours(exc)
    if error is not exc:
        log.error("gateway.request_broke", request_id=cold.request_id, path=cold.head.path, exc_info=exc)
    cold.error_code = error.code
    rendered = renderer_of(cold.head.path, cold.head.headers)(error, cold.request_id)
    headers = dict(rendered.headers)
    if isinstance(error, BodyTooLarge):
        headers["connection"] = "close"  # the rest of the body is not read
    if wants_page(cold.head):
        page = problem_page(error.message, cold.request_id)
        return Response(page, rendered.status, headers | page_headers(), "text/html")
    return Response(rendered.body, rendered.status, headers, rendered.content_type)


async def on_http_exception(request: Request, exc: Exception) -> Response:
    """FastAPI's own 404 and 405, in the shape of the path."""
    assert isinstance(exc, HTTPException)
    error: OllamaDistributedError
    if exc.status_code == 404:
        error = NotFound("there is nothing at this path; /docs lists what is")
    elif exc.status_code == 405:
        error = MethodNotAllowed(f"{request.method} is not allowed here")
    elif exc.status_code < 500:
        error = Invalid("the request cannot be served as written")
    else:
        error = Internal("internal error; the log has the details under the request id")
    response = error_response(ColdRequest.of(request), error)
    if exc.status_code == 405:
        response.headers["allow"] = _allowed(request)
    return response


def _allowed(request: Request) -> str:
    """Every method of the path (RFC 9110 15.5.6); each is a route by itself here."""
    path = request.scope["route"].path
    same = (route for route in request.app.routes if getattr(route, "path", None) == path)
    return ", ".join(sorted({method for route in same for method in route.methods}))


class ColdPath:
    """ASGI around the FastAPI app."""

    def __init__(
        self,
        app: App,
        *,
        gate: Gate,
        clock: Clock,
        observe: Observer,
        offload: Offload,
        audit: Auditing | None = None,
    ) -> None:
        self._app = app
        self._audit = audit
        self._gate = gate
        self._guard = JsonGuard(gate.limits)
        self._clock = clock
        self._observe = observe
        self._offload = offload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = scope_head(scope)
        start = self._clock.monotonic()
        cold = ColdRequest(head, request_id(head.headers), self._gate.limits, self._guard, self._offload)
        anthropic = for_anthropic(head.path, head.headers)
        extra = id_headers(cold.request_id, anthropic=anthropic)
        cold.audit = self._audit
        seen = _Seen(send, extra)
        scope[_KEY] = cold
        try:
            refused = self._admit(cold, extra)
            if refused is not None:
                await refused(scope, receive, seen)
            else:
                if cold.identity is not None:
                    met(scope)
                await self._app(scope, receive, seen)
        except ClientDisconnect:
            pass  # nobody is left to answer
        finally:
            cold.record_end(seen.status)
            self._sum_up(cold, seen, scope, start)

    def _admit(self, cold: ColdRequest, extra: RawHeaders) -> Response | None:
        """The answer to a refused request or a preflight; None: go on."""
        head = cold.head
        try:
            _, origin = self._gate.admit_site(head)
            if origin is not None:
                extra += cors_headers(origin)
            if (
                head.method == "OPTIONS"
                and origin is not None
                and "access-control-request-method" in head.headers
            ):
                return _preflight(head)
            if head.path not in PUBLIC:
                cold.identity = self._gate.admit(head, None).identity
        except OllamaDistributedError as exc:
            response = error_response(cold, exc)
            response.headers["connection"] = "close"
            return response
        return None

    def _sum_up(self, cold: ColdRequest, seen: _Seen, scope: Scope, start: float) -> None:
        outcome: Outcome = "error" if seen.status >= 400 else "ok"
        if not seen.complete:
            outcome = "cancelled"
        route = scope.get("route")
        identity = cold.identity
        self._observe(
            Summary(
                request_id=cold.request_id,
                method=cold.head.method,
                route=getattr(route, "path", "unmatched"),
                status=seen.status or 499,
                outcome=outcome,
                error_code=cold.error_code,
                took_s=self._clock.monotonic() - start,
                bytes_out=seen.bytes_out,
                role=identity.role if identity else "",
                key_id=(identity.key_id or "") if identity else "",
                team=identity.team if identity else "",
            )
        )


_SAFE_TO_SHOW = (
    ("x-content-type-options", "nosniff"),
    ("content-security-policy", "default-src 'none'; frame-ancestors 'none'"),
    ("cross-origin-resource-policy", "same-origin"),
)
"""What a browser may do with an answer that is no page of ours: nothing, whatever text is in it. Scripts of
allowed origins read it all the same (CORS)."""


class _Seen:
    """Adds headers to the answer and notes what left."""

    def __init__(self, send: Send, extra: RawHeaders) -> None:
        self._send = send
        self._extra = extra
        self.status = 0
        self.bytes_out = 0
        self.complete = False

    async def __call__(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(raw=list(message["headers"]))
            for name, value in self._extra:
                headers[name.decode("ascii")] = value.decode("latin-1")
            for field, text in _SAFE_TO_SHOW:
                headers.setdefault(field, text)
            message = {**message, "headers": headers.raw}
        elif message["type"] == "http.response.body":
            self.bytes_out += len(message.get("body", b""))
            self.complete = not message.get("more_body", False)
        await self._send(message)


_HEADER_LIST = "authorization, content-type, x-api-key, x-request-id"
_MOST_PREFLIGHT = 1024


def _preflight(head: Head) -> Response:
    """An allowed origin may use any method and the headers it names."""
    wanted = head.headers.get("access-control-request-headers", "")
    named = wanted if wanted.isprintable() and len(wanted) <= _MOST_PREFLIGHT else ""
    return Response(
        status_code=204,
        headers={
            "access-control-allow-methods": "GET, POST, PUT, PATCH, DELETE, HEAD, OPTIONS",
            "access-control-allow-headers": named or _HEADER_LIST,
            "access-control-max-age": "600",
        },
    )
