"""Requests to the world outside: where they may go, how long they may take, what they may carry.

Each hop of a request is checked anew: the scheme, the host, and every address that the host's
name has at that moment; the connection goes to one of the addresses that were checked (a name
that changes its mind between check and use gains nothing). Credentials go to the origin for
which they were given and nowhere else. Nothing is decompressed, no proxy is taken from the
environment, and no answer may be longer or slower than its reader says.
"""

from __future__ import annotations

import ssl
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing, asynccontextmanager, contextmanager
from types import TracebackType
from typing import Self

import anyio
import certifi
import httpcore
import msgspec
import structlog

from ollama_distributed.adapters.egress.addresses import is_public, is_reachable
from ollama_distributed.adapters.egress.network import CheckedNetwork, Resolver, look_up
from ollama_distributed.adapters.egress.urls import Url, resolve
from ollama_distributed.base.errors import DeadlineExceeded, Forbidden, RegistryError, Unavailable

log = structlog.get_logger()

MAX_REDIRECTS = 3
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_CONNECTIONS = 64
"""To one site at once, over all transfers of this node."""
_IDLE_S = 20.0
"""A kept connection is closed after so long without use."""


class Site(msgspec.Struct, frozen=True, kw_only=True):
    """A host that an operator has named in the settings."""

    host: str
    port: int
    insecure: bool = False
    """Plain http is spoken there."""
    private: bool = False
    """It may have addresses of private networks or of this machine."""
    ca: str | None = None
    """File of certificate authorities to trust there instead of the public ones."""


class Patience(msgspec.Struct, frozen=True, kw_only=True):
    """How long an answer may take."""

    connect_s: float = 10.0
    head_s: float = 30.0
    """From the request (without a long body) to the end of the answer's headers."""
    stall_s: float = 30.0
    """An answer's body must bring `stall_bytes` in so long; 30 s as in Ollama."""
    stall_bytes: int = 4096


class Response:
    """An answer whose body is still to be read. Valid inside `EgressClient.send` only."""

    def __init__(self, url: Url, raw: httpcore.Response, patience: Patience) -> None:
        self.url = url
        """Where the answer came from, after redirects."""
        self.status = raw.status
        self._raw = raw
        self._patience = patience
        headers: dict[str, str] = {}
        for name, value in raw.headers:
            key, text = name.decode("latin-1").lower(), value.decode("latin-1")
            headers[key] = f"{headers[key]}, {text}" if key in headers else text
        self.headers: Mapping[str, str] = headers

    async def chunks(self) -> AsyncGenerator[bytes]:
        """The body as it comes.

        Raises:
            Unavailable: it ended before its end, or came too slowly.
            RegistryError: it is compressed, which nobody asked for.
        """
        if self.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
            raise RegistryError(f"{self.url.site} sends a compressed answer that nobody asked for")
        patience = self._patience
        raw = aiter(self._raw.aiter_stream())
        brought, since = patience.stall_bytes, anyio.current_time()
        with _translated(self.url):
            while True:
                if brought >= patience.stall_bytes:
                    brought, since = 0, anyio.current_time()
                try:
                    with anyio.fail_after(max(0.0, since + patience.stall_s - anyio.current_time())):
                        chunk = await anext(raw)
                except StopAsyncIteration:
                    return
                except TimeoutError as exc:
                    raise Unavailable(f"{self.url.site} sends too slowly") from exc
                brought += len(chunk)
                asked = anyio.current_time()
                yield chunk
                # How long the reader took (its disk, its rate limit) is not the sender's fault.
                since += anyio.current_time() - asked

    async def read(self, limit: int) -> bytes:
        """The whole body.

        Raises:
            RegistryError: it is longer than `limit` bytes.
        """
        body = bytearray()
        with _deadline(self._patience.head_s, self.url):
            async with aclosing(self.chunks()) as chunks:
                async for chunk in chunks:
                    body += chunk
                    if len(body) > limit:
                        raise RegistryError(f"{self.url.site} answers with more than {limit} bytes")
        return bytes(body)


Content = bytes | AsyncIterable[bytes]


class EgressClient:
    """One per node. `sites`: what the settings name; every other host must be public and speak
    TLS on its usual port."""

    def __init__(
        self,
        sites: Iterable[Site] = (),
        *,
        patience: Patience | None = None,
        resolver: Resolver = look_up,
        user_agent: str = "ollama-distributed",
        trust: Callable[[str | None], ssl.SSLContext] | None = None,
    ) -> None:
        self._sites = {(site.host, site.port): site for site in sites}
        self._patience = patience or Patience()
        self._resolver = resolver
        self._user_agent = user_agent
        self._trust = trust or trusted
        self._pools: dict[tuple[str, int] | None, httpcore.AsyncConnectionPool] = {}
        self._opening = anyio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        while self._pools:
            _, pool = self._pools.popitem()
            await pool.aclose()

    def site_of(self, url: Url) -> Site | None:
        return self._sites.get((url.host, url.port))

    def check(self, url: Url, came_from: Url | None = None) -> None:
        """Whether this URL may be asked at all; its addresses are checked when it is.

        Raises:
            Forbidden: says why not.
        """
        site = self.site_of(url)
        if site is None:
            if url.scheme != "https" or url.port != 443 or url.address is not None:
                raise Forbidden(
                    f"{url.site} may not be asked: only https on port 443 of a named public host, "
                    "or a registry that the settings name"
                )
            return
        if url.scheme == "http" and not site.insecure:
            raise Forbidden(f"insecure protocol http: {url.site} is not configured as insecure")
        if site.private and came_from is not None:
            sender = self.site_of(came_from)
            if sender is None or not sender.private:
                raise Forbidden(f"{came_from.site} sends us to the private {url.site}; refused")

    @asynccontextmanager
    async def send(
        self,
        method: str,
        url: Url,
        *,
        headers: Sequence[tuple[str, str]] = (),
        authorization: str = "",
        content: Content | None = None,
        length: int = 0,
        redirects: int = MAX_REDIRECTS,
        came_from: Url | None = None,
    ) -> AsyncIterator[Response]:
        """Send a request; follows redirects of GET and HEAD. `length`: of `content`, where that is
        no bytes. `authorization` goes to the origin of `url` only. `came_from`: who named `url` in an
        answer, unless the settings do.

        Raises:
            Forbidden: the URL, or one that a redirect leads to, may not be asked.
            Unavailable, DeadlineExceeded: no answer.
            RegistryError: too many redirects, or one without a place.
        """
        origin = url.origin
        while True:
            self.check(url, came_from)
            fields = [("host", url.site), ("user-agent", self._user_agent), ("accept-encoding", "identity")]
            fields += headers
            if url.origin != origin:
                authorization = ""  # for good: another host must not choose what is asked with it
            if authorization:
                fields.append(("authorization", authorization))
            if content is not None:
                size = len(content) if isinstance(content, bytes) else length
                fields.append(("content-length", str(size)))
            elif method not in ("GET", "HEAD"):
                fields.append(("content-length", "0"))
            response = await self._exchange(method, url, fields, content)
            try:
                if response.status not in _REDIRECTS or method not in ("GET", "HEAD") or redirects == 0:
                    if response.status in _REDIRECTS and method in ("GET", "HEAD"):
                        raise RegistryError(f"{Url(*origin, '/').site} redirects too often")
                    yield Response(url, response, self._patience)
                    return
                location = _location(response)
            finally:
                await _close(response)
            if not location:
                raise RegistryError(f"{url.site} redirects to nowhere")
            came_from, url = url, resolve(url, location)
            redirects -= 1

    async def _exchange(
        self, method: str, url: Url, fields: list[tuple[str, str]], content: Content | None
    ) -> httpcore.Response:
        patience = self._patience
        timeout = {
            "connect": patience.connect_s,
            "read": patience.stall_s,
            "write": patience.stall_s,
            "pool": patience.head_s,
        }
        request = httpcore.Request(
            method,
            httpcore.URL(
                scheme=url.scheme.encode(), host=url.host.encode(), port=url.port, target=url.target.encode()
            ),
            headers=[(name.encode("ascii"), value.encode("latin-1")) for name, value in fields],
            content=content,
            extensions={"timeout": timeout},
        )
        pool = await self._pool(url)
        # A long body takes its time: there, each write and the wait after it have their own limit.
        limit_s = patience.head_s if content is None or isinstance(content, bytes) else None
        with _translated(url), _deadline(limit_s, url):
            return await pool.handle_async_request(request)

    async def _pool(self, url: Url) -> httpcore.AsyncConnectionPool:
        """One for each site that is named, one for the rest of the world: what is allowed for one
        must not be had through a connection of another."""
        site = self.site_of(url)
        key = None if site is None else (site.host, site.port)
        async with self._opening:
            pool = self._pools.get(key)
            if pool is None:
                ca, private = (site.ca, site.private) if site is not None else (None, False)
                # In a thread: reading all authorities takes 50 ms.
                context = await anyio.to_thread.run_sync(self._trust, ca)
                pool = self._pools[key] = httpcore.AsyncConnectionPool(
                    ssl_context=context,
                    max_connections=_CONNECTIONS,
                    max_keepalive_connections=_CONNECTIONS // 4,
                    keepalive_expiry=_IDLE_S,
                    network_backend=CheckedNetwork(is_reachable if private else is_public, self._resolver),
                )
        return pool


def trusted(ca: str | None) -> ssl.SSLContext:
    """Public authorities and the machine's own; or only those of the file `ca`."""
    if ca is not None:
        return ssl.create_default_context(cafile=ca)
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context


def _location(response: httpcore.Response) -> str:
    found = [value for name, value in response.headers if name.lower() == b"location"]
    return found[0].decode("latin-1") if len(found) == 1 else ""


async def _close(response: httpcore.Response) -> None:
    with anyio.CancelScope(shield=True):  # the connection goes back to its pool, or is closed
        await response.aclose()


@contextmanager
def _deadline(seconds: float | None, url: Url) -> Iterator[None]:
    try:
        with anyio.fail_after(seconds):
            yield
    except TimeoutError as exc:
        raise DeadlineExceeded(f"{url.site} did not answer within {seconds:g} s") from exc


@contextmanager
def _translated(url: Url) -> Iterator[None]:
    try:
        yield
    except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError) as exc:
        log.info("egress.failed", url=url.without_query, error=repr(exc))
        raise Unavailable(f"{url.site} cannot be reached: {_reason(exc)}") from exc


def _reason(exc: Exception) -> str:
    match exc:
        case httpcore.TimeoutException():
            return "no answer in time"
        case httpcore.ProtocolError():
            return "the answer broke off, or is no HTTP"
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is not trusted ({cause.verify_message})"
        cause = cause.__cause__ or cause.__context__
    return str(exc) or "the connection broke"
