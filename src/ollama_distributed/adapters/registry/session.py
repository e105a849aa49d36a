"""Requests to one registry: its URLs, its tokens, its refusals as errors of ours."""

from __future__ import annotations

import base64
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from urllib.parse import parse_qsl, urlencode

import anyio
import msgspec

from ollama_distributed.adapters.egress.client import Content, EgressClient, Response
from ollama_distributed.adapters.egress.urls import Url, parse_url, path_url
from ollama_distributed.adapters.registry.challenge import Challenge, parse_challenge
from ollama_distributed.adapters.registry.signing import RequestSigner
from ollama_distributed.adapters.registry.sites import RegistrySite, Sites
from ollama_distributed.base.clock import Clock
from ollama_distributed.base.codec import UNREADABLE
from ollama_distributed.base.errors import (
    Forbidden,
    ModelNotFound,
    QueueFull,
    RegistryError,
    Unauthenticated,
    Unavailable,
)
from ollama_distributed.models.names import ModelName

MAX_ERROR_BYTES = 64 << 10
_MAX_TOKEN_BYTES = 256 << 10
_QUOTED = 300
"""So much of a registry's own words is shown."""


class _Token(msgspec.Struct):
    """A token service's answer; `access_token` is OAuth's spelling."""

    token: str = ""
    access_token: str = ""


class _Problem(msgspec.Struct):
    code: str = ""
    message: str = ""


class _Problems(msgspec.Struct):
    """A registry's error body (distribution specification)."""

    errors: list[_Problem] = []


class Session:
    """The requests of one model name; tokens are kept as long as it lives."""

    def __init__(
        self, name: ModelName, egress: EgressClient, sites: Sites, signer: RequestSigner, clock: Clock
    ) -> None:
        """Raises `Forbidden`: the name's registry may not be asked."""
        self.name = name
        self._site, self.root = sites.of(name)
        self._egress = egress
        self._sites = sites
        self._signer = signer
        self._clock = clock
        self._authorization = ""
        self._asking = anyio.Lock()
        egress.check(self.root)

    def url(self, *parts: str) -> Url:
        """`/v2/<namespace>/<model>/…`."""
        return path_url(self.root, "v2", self.name.namespace, self.name.model, *parts)

    @asynccontextmanager
    async def send(
        self,
        method: str,
        url: Url,
        *,
        headers: Sequence[tuple[str, str]] = (),
        content: Callable[[], Content] | None = None,
        length: int = 0,
    ) -> AsyncIterator[Response]:
        """Send a request, a second time with a new token if the registry wants one. Credentials
        go to the registry's own origin only.

        Raises:
            Unauthenticated, Forbidden, ModelNotFound, Unavailable, RegistryError: it refuses.
        """
        for attempt in (1, 2):
            given = self._authorization
            async with self._egress.send(
                method,
                url,
                headers=headers,
                authorization=given if url.origin == self.root.origin else "",
                content=content() if content else None,
                length=length,
                came_from=self.root if url.origin != self.root.origin else None,
            ) as response:
                if response.status < 400:
                    yield response
                    return
                if response.status != 401 or attempt == 2 or response.url.origin != self.root.origin:
                    raise await self._refusal(response)
                header = response.headers.get("www-authenticate", "")
            await self._authenticate(header, given)

    async def _authenticate(self, header: str, failed: str) -> None:
        """Get what the registry wants, unless another request of ours has done so meanwhile."""
        async with self._asking:
            if self._authorization != failed:
                return
            challenge = parse_challenge(header)
            if challenge is None:
                raise Unauthenticated(f"{self.root.site} wants credentials in a way that is not known here")
            basic = _basic(self._site)
            if challenge.scheme == "basic":
                if not basic:
                    raise Unauthenticated(
                        f"{self.root.site} wants a user name and a password: set `username` and `password` "
                        "under `registries` in the settings"
                    )
                self._authorization = basic
            else:
                self._authorization = f"Bearer {await self._token(challenge, basic)}"
            if self._authorization == failed:
                raise Unauthenticated(f"{self.root.site}: unauthorized: access denied")

    async def _token(self, challenge: Challenge, basic: str) -> str:
        realm = parse_url(challenge.realm)
        if not self._sites.may_give_tokens(self._site, realm):
            raise Forbidden(
                f"realm host {realm.site} does not match original host {self.root.site}: no credentials go "
                "there; if it is right, add it to `auth_hosts` of this registry in the settings"
            )
        pairs = [("service", challenge.service)] if challenge.service else []
        pairs += [("scope", scope) for scope in challenge.scopes]
        authorization = basic
        if not basic and self._site.signed:
            pairs += [("ts", str(int(self._clock.time()))), ("nonce", secrets.token_urlsafe(16))]
            realm = _with_sorted_query(realm, pairs)
            signed = realm
            authorization = await anyio.to_thread.run_sync(lambda: self._signer.sign("GET", str(signed)))
        else:
            realm = realm.with_query(*pairs)
        async with self._egress.send("GET", realm, authorization=authorization, redirects=0) as response:
            if response.status != 200:
                raise await self._refusal(response)
            body = await response.read(_MAX_TOKEN_BYTES)
        try:
            told = msgspec.json.decode(body, type=_Token)
        except UNREADABLE as exc:
            raise RegistryError(f"{realm.site} answers no token") from exc
        token = told.token or told.access_token
        if not token or not token.isascii() or not token.isprintable() or " " in token:
            raise RegistryError(f"{realm.site} answers no token")
        return token

    async def _refusal(self, response: Response) -> Exception:
        site, status = response.url.site, response.status
        text = _words(await response.read(MAX_ERROR_BYTES))
        said = f"{site} answers {status}" + (f": {text}" if text else "")
        match status:
            case 401:
                return Unauthenticated(f"{site}: unauthorized: access denied{f' ({text})' if text else ''}")
            case 403:
                return Forbidden(said)
            case 404:
                return ModelNotFound("file does not exist")
            case 429:
                return QueueFull(said)
            case 408 | 425 | 500 | 502 | 503 | 504:
                return Unavailable(said)
        return RegistryError(said)


def _basic(site: RegistrySite) -> str:
    if not site.username:
        return ""
    return "Basic " + base64.b64encode(f"{site.username}:{site.password}".encode()).decode()


def _with_sorted_query(url: Url, more: list[tuple[str, str]]) -> Url:
    """As Go's `url.Values.Encode` writes it: what is signed must be what the other side rebuilds."""
    path, _, query = url.target.partition("?")
    pairs = sorted(parse_qsl(query, keep_blank_values=True) + more, key=lambda pair: pair[0])
    return msgspec.structs.replace(url, target=f"{path}?{urlencode(pairs)}")


def _words(body: bytes) -> str:
    """What a registry says is wrong, for people: one line, no control characters."""
    try:
        problems = msgspec.json.decode(body, type=_Problems).errors
        text = "; ".join(f"{problem.code} {problem.message}".strip() for problem in problems)
    except UNREADABLE:
        text = body.decode("utf-8", "replace")
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))[:_QUOTED]
