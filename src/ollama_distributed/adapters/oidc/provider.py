"""An OpenID Connect provider: discovery, the authorization code flow with PKCE, the id token.

Sources: OpenID Connect Core 1.0 (3.1, the code flow) and Discovery 1.0, RFC 7636 (PKCE), RFC 9700
(OAuth security: state, nonce, exact redirect URI, issuer). Nothing is asked of any host but the
issuer's and those that the settings name beside it.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import anyio
import msgspec
import structlog
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet

from ollama_distributed.adapters.egress.client import EgressClient, Site
from ollama_distributed.adapters.egress.urls import Url, parse_url
from ollama_distributed.base.errors import (
    Forbidden,
    OllamaDistributedError,
    RegistryError,
    Unauthenticated,
    Unavailable,
)

log = structlog.get_logger("cluster.people")

ALGORITHMS = ("RS256", "PS256", "ES256", "EdDSA", "Ed25519")
"""Public keys only: `none`, and HS256 with the client's secret as key, are refused."""
KNOWN_S = 3600.0
"""Providers rotate keys over days; an unknown key is asked for at once."""
ASKED_AGAIN_S = 30.0
"""Not more often for keys, whatever comes."""
FAILED_S = 3.0
"""What did not answer is not asked for so long."""
LEEWAY_S = 60
MAX_BYTES = 1024 * 1024
MAX_TOKEN_CHARS = 64 * 1024
REFUSED = "the OIDC provider's answer does not hold; sign in again"

T = TypeVar("T")


class Client(msgspec.Struct, frozen=True, kw_only=True):
    """This cluster as the provider knows it."""

    issuer: str
    client_id: str
    client_secret: str = ""
    """Empty: a public client, which PKCE alone protects."""
    scopes: tuple[str, ...] = ("openid", "profile", "email")
    hosts: tuple[str, ...] = ()
    """More hosts, as `name` or `name:port`, on which the provider's endpoints may be."""
    private: bool = False
    """They may lie in a private network or on this machine; plain http is then allowed too."""
    ca: str | None = None

    def __repr__(self) -> str:
        return f"Client({self.issuer}, {self.client_id})"


class _Metadata(msgspec.Struct, frozen=True, kw_only=True):
    issuer: str
    authorization_endpoint: str
    token_endpoint: str
    jwks_uri: str
    token_endpoint_auth_methods_supported: tuple[str, ...] = ("client_secret_basic",)


class _TokenAnswer(msgspec.Struct, frozen=True, kw_only=True):
    id_token: str


class OidcProvider:
    """One provider. `async with` is not needed; `aclose` closes its connections."""

    def __init__(
        self,
        client: Client,
        *,
        wall: Callable[[], float],
        monotonic: Callable[[], float],
        egress: EgressClient | None = None,
    ) -> None:
        """
        Raises:
            Forbidden: the issuer is no URL that may be asked.
        """
        self._client = client
        self._issuer = parse_url(client.issuer.rstrip("/") + "/.well-known/openid-configuration")
        if self._issuer.scheme == "http" and not client.private:
            raise Forbidden(f"the OIDC issuer {client.issuer} must be https, unless it is private")
        self._sites = {self._issuer.site, *client.hosts}
        self._wall, self._monotonic = wall, monotonic
        self._egress = egress or EgressClient(map(self._site, self._sites))
        self._metadata: tuple[float, _Metadata] | None = None
        self._keys: tuple[float, KeySet] | None = None
        self._asked_until = 0.0
        """Not again before: anybody may begin a sign-in, and none waits in turn for a dead provider."""
        self._turn = anyio.Lock()

    async def aclose(self) -> None:
        await self._egress.aclose()

    async def authorization_url(self, *, redirect_uri: str, state: str, nonce: str, challenge: str) -> str:
        """Where the browser is sent.

        Raises:
            Unavailable: the provider does not answer, or not as it must.
        """
        metadata = await self._discover()
        query = urlencode(
            {
                "response_type": "code",
                "client_id": self._client.client_id,
                "redirect_uri": redirect_uri,
                "scope": " ".join(self._client.scopes),
                "state": state,
                "nonce": nonce,
                "code_challenge": challenge,
                "code_challenge_method": "S256",
            }
        )
        joint = "&" if "?" in metadata.authorization_endpoint else "?"
        return f"{metadata.authorization_endpoint}{joint}{query}"

    async def redeem(self, *, code: str, redirect_uri: str, nonce: str, verifier: str) -> Mapping[str, Any]:
        """The claims of the id token that the code stands for.

        Raises:
            Unauthenticated: the code or the token does not hold.
            Unavailable: the provider does not answer.
        """
        metadata = await self._discover()
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": redirect_uri,
            "code_verifier": verifier,
        }
        authorization = ""
        client = self._client
        if client.client_secret and "client_secret_basic" in metadata.token_endpoint_auth_methods_supported:
            pair = f"{quote(client.client_id, safe='')}:{quote(client.client_secret, safe='')}"
            authorization = "Basic " + base64.b64encode(pair.encode()).decode()
        else:
            form["client_id"] = client.client_id
            if client.client_secret:
                form["client_secret"] = client.client_secret
        status, body = await self._ask(
            "POST", self._endpoint(metadata.token_endpoint), authorization, urlencode(form).encode()
        )
        if status != 200:
            log.warning("people.oidc_code_refused", issuer=client.issuer, status=status)
            raise Unauthenticated(REFUSED)
        return await self._verified(_decoded(body, _TokenAnswer).id_token, nonce, metadata)

    async def _verified(self, token: str, nonce: str, metadata: _Metadata) -> Mapping[str, Any]:
        if len(token) > MAX_TOKEN_CHARS:
            raise Unauthenticated(REFUSED)
        try:
            read = jwt.decode(token, await self._key_set(metadata), algorithms=list(ALGORITHMS))
        except (JoseError, ValueError):
            # It may be signed by a key that is new.
            try:
                fresh = await self._key_set(metadata, older_than_s=ASKED_AGAIN_S)
                read = jwt.decode(token, fresh, algorithms=list(ALGORITHMS))
            except (JoseError, ValueError) as failure:
                log.warning("people.oidc_token_refused", reason=type(failure).__name__)
                raise Unauthenticated(REFUSED) from None
        return self._checked(read.claims, nonce)

    def _checked(self, claims: Mapping[str, Any], nonce: str) -> Mapping[str, Any]:
        """OpenID Connect Core 3.1.3.7."""
        now, mine = self._wall(), self._client.client_id
        audience = claims.get("aud")
        audiences = audience if isinstance(audience, list) else [audience]
        expires, issued = claims.get("exp"), claims.get("iat")
        good = (
            claims.get("iss") == self._client.issuer
            and mine in audiences
            and (len(audiences) == 1 or claims.get("azp") == mine)
            and claims.get("azp", mine) == mine
            and isinstance(expires, int | float)
            and now < expires + LEEWAY_S
            and isinstance(issued, int | float)
            and issued - LEEWAY_S <= now
            and claims.get("nonce") == nonce
            and isinstance(claims.get("sub"), str)
            and 0 < len(claims["sub"]) <= 255
        )
        if not good:
            log.warning("people.oidc_token_refused", reason="claims")
            raise Unauthenticated(REFUSED)
        return claims

    # ── what is asked ───────────────────────────────────────────────────────────────

    async def _discover(self) -> _Metadata:
        async with self._turn:
            now = self._monotonic()
            if self._metadata is not None and now - self._metadata[0] < KNOWN_S:
                return self._metadata[1]
            if now < self._asked_until:
                raise Unavailable(f"{self._issuer.site} did not say what it is a moment ago; try again")
            self._asked_until = now + FAILED_S
            status, body = await self._ask("GET", self._issuer)
            if status != 200:
                raise Unavailable(f"{self._issuer.site} does not say what it is (status {status})")
            metadata = _decoded(body, _Metadata)
            if metadata.issuer != self._client.issuer:
                raise Unavailable(
                    f"{self._issuer.site} calls itself {metadata.issuer[:200]!r}, not as `oidc.issuer` has it"
                )
            for endpoint in (metadata.authorization_endpoint, metadata.token_endpoint, metadata.jwks_uri):
                self._endpoint(endpoint)
            self._metadata, self._asked_until = (now, metadata), 0.0
            return metadata

    async def _key_set(self, metadata: _Metadata, older_than_s: float = KNOWN_S) -> KeySet:
        async with self._turn:
            now = self._monotonic()
            if self._keys is not None and now - self._keys[0] < older_than_s:
                return self._keys[1]
            status, body = await self._ask("GET", self._endpoint(metadata.jwks_uri))
            if status != 200:
                raise Unavailable(f"{self._issuer.site} does not give its keys (status {status})")
            keys = _decoded(body, dict[str, Any]).get("keys", [])
            # Symmetric keys have no place in a published set, and must not become one that verifies.
            public = [key for key in keys if isinstance(key, dict) and key.get("kty") in ("RSA", "EC", "OKP")]
            try:
                found = KeySet.import_key_set({"keys": public})
            except (JoseError, ValueError, TypeError) as failure:
                raise Unavailable(f"the keys of {self._issuer.site} cannot be read") from failure
            self._keys = (now, found)
            return found

    async def _ask(
        self, method: str, url: Url, authorization: str = "", content: bytes | None = None
    ) -> tuple[int, bytes]:
        headers = [("accept", "application/json")]
        if content is not None:
            headers.append(("content-type", "application/x-www-form-urlencoded"))
        try:
            async with self._egress.send(
                method, url, headers=headers, authorization=authorization, content=content, redirects=0
            ) as response:
                return response.status, await response.read(MAX_BYTES)
        except RegistryError as odd:  # a redirect, a compressed answer
            raise Unavailable(odd.message) from odd

    def _endpoint(self, text: str) -> Url:
        """
        Raises:
            Unavailable: it is on a host that nobody configured.
        """
        try:
            url = parse_url(text)
        except OllamaDistributedError as odd:
            raise Unavailable(f"an endpoint of {self._issuer.site} is no plain URL") from odd
        if url.site not in self._sites or (url.scheme == "http" and not self._client.private):
            raise Unavailable(
                f"{self._issuer.site} names the endpoint {url.without_query}, which is not on its own host; "
                "add its host to `oidc.hosts` if it should be asked"
            )
        return url

    def _site(self, text: str) -> Site:
        url = parse_url(f"{self._issuer.scheme}://{text}/")
        return Site(
            host=url.host,
            port=url.port,
            insecure=url.scheme == "http",
            private=self._client.private,
            ca=self._client.ca,
        )


def _decoded(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as failure:
        raise Unavailable("the OIDC provider's answer cannot be read") from failure
