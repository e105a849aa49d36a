"""What an OpenID Connect provider says: only what holds is believed, and only its own hosts are asked."""

from __future__ import annotations

import base64
import hmac
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import parse_qs

import pytest
from joserfc import jwt
from joserfc.jwk import ECKey, OctKey, RSAKey

from ollama_distributed.adapters.egress.urls import Url
from ollama_distributed.adapters.oidc.provider import Client, OidcProvider
from ollama_distributed.base.errors import Forbidden, OllamaDistributedError, Unauthenticated, Unavailable
from ollama_distributed.node.oidc_settings import OidcSettings
from ollama_distributed.node.people.provider import person_of

ISSUER = "https://idp.example/realm"
NOW = 1_800_000_000
SECRET = "s3cret-of-the-client-0123456789abcdef"
RSA, OTHER, EC = RSAKey.generate_key(2048), RSAKey.generate_key(2048), ECKey.generate_key("P-256")
CLAIMS: dict[str, Any] = {
    "iss": ISSUER,
    "aud": "od",
    "sub": "42",
    "exp": NOW + 300,
    "iat": NOW,
    "nonce": "n1",
    "preferred_username": "Zoe",
    "groups": ["ml"],
}
METADATA: dict[str, Any] = {
    "issuer": ISSUER,
    "authorization_endpoint": "https://idp.example/authorize",
    "token_endpoint": "https://idp.example/token",
    "jwks_uri": "https://idp.example/jwks",
}


def public(key: Any, kid: str) -> dict[str, Any]:
    return {**key.as_dict(private=False), "kid": kid, "use": "sig"}


class World:
    """Answers as `EgressClient` would; `answers`: by path."""

    def __init__(self) -> None:
        self.keys: list[dict[str, Any]] = [public(RSA, "r1"), public(EC, "e1")]
        self.metadata = dict(METADATA)
        self.token: Any = ""
        self.status = 200
        self.asked: list[tuple[str, str, str, bytes]] = []
        self.now = float(NOW)
        self.provider = OidcProvider(
            Client(issuer=ISSUER, client_id="od", client_secret=SECRET),
            wall=lambda: NOW,
            monotonic=lambda: self.now,
            egress=self,  # type: ignore[arg-type]
        )

    @asynccontextmanager
    async def send(
        self, method: str, url: Url, *, authorization: str = "", content: bytes | None = None, **_: Any
    ) -> AsyncIterator[Any]:
        self.asked.append((method, str(url), authorization, content or b""))
        answers: dict[str, Callable[[], Any]] = {
            "/realm/.well-known/openid-configuration": lambda: self.metadata,
            "/jwks": lambda: {"keys": self.keys},
            "/token": lambda: {"id_token": self.token, "access_token": "a"},
        }
        status = self.status if url.target == "/token" else 200
        yield _Answer(status, json.dumps(answers[url.target]()).encode())

    async def redeem(self, token: str, nonce: str = "n1") -> Any:
        self.token = token
        return await self.provider.redeem(code="c", redirect_uri="https://od/cb", nonce=nonce, verifier="v")


class _Answer:
    def __init__(self, status: int, body: bytes) -> None:
        self.status, self._body = status, body

    async def read(self, limit: int) -> bytes:
        assert len(self._body) <= limit
        return self._body


@pytest.fixture
def world() -> World:
    return World()


def signed(key: Any = RSA, alg: str = "RS256", head: dict[str, Any] | None = None, **claims: Any) -> str:
    body = {name: value for name, value in {**CLAIMS, **claims}.items() if value is not ...}
    header = {"alg": alg, "kid": "r1", **(head or {})}
    return jwt.encode(header, body, key, algorithms=[alg])


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def unsigned(alg: str) -> str:
    head = json.dumps({"alg": alg, "kid": "r1"}).encode()
    return f"{base64url(head)}.{base64url(json.dumps(CLAIMS).encode())}."


def with_hmac(secret: bytes) -> str:
    text = unsigned("HS256")[:-1]
    return f"{text}.{base64url(hmac.digest(secret, text.encode(), 'sha256'))}"


ATTACKS = {
    "none": unsigned("none"),
    "None": unsigned("None"),
    "HS256 with the client's secret": with_hmac(SECRET.encode()),
    "HS256 with the public key": with_hmac(RSA.as_pem(private=False)),
    "another key": signed(OTHER),
    "another key inside": signed(OTHER, head={"jwk": OTHER.as_dict(private=False)}),
    "another kid": signed(OTHER, head={"kid": "r2"}),
    "another issuer": signed(iss="https://evil.example"),
    "issuer with a slash": signed(iss=ISSUER + "/"),
    "another audience": signed(aud="someone"),
    "audiences without azp": signed(aud=["od", "someone"]),
    "azp of another": signed(azp="someone"),
    "audience missing": signed(aud=...),
    "expired": signed(exp=NOW - 61),
    "no exp": signed(exp=...),
    "exp text": signed(exp="tomorrow"),
    "from the future": signed(iat=NOW + 120),
    "another nonce": signed(nonce="n2"),
    "no nonce": signed(nonce=...),
    "no subject": signed(sub=...),
    "subject a number": signed(sub=42),
    "empty subject": signed(sub=""),
    "long subject": signed(sub="x" * 256),
    "no token": "x.y.z",
    "empty": "",
    "large": signed(pad="x" * 70_000),
}


@pytest.mark.parametrize("name", ATTACKS)
async def test_what_does_not_hold(world: World, name: str) -> None:
    with pytest.raises(Unauthenticated):
        await world.redeem(ATTACKS[name])


async def test_what_holds(world: World) -> None:
    assert (await world.redeem(signed()))["sub"] == "42"
    assert (await world.redeem(signed(EC, "ES256", {"kid": "e1"})))["sub"] == "42"
    assert (await world.redeem(signed(aud=["od", "someone"], azp="od")))["sub"] == "42"
    method, url, authorization, content = world.asked[-1]
    assert (method, url) == ("POST", "https://idp.example/token")
    assert authorization.startswith("Basic ")
    assert parse_qs(content.decode())["code_verifier"] == ["v"]
    assert SECRET.encode() not in content
    discovered = [url for _, url, _, _ in world.asked if "well-known" in url]
    assert len(discovered) == 1


async def test_a_new_key_is_asked_for_and_not_too_often(world: World) -> None:
    await world.redeem(signed())
    world.keys.append(public(OTHER, "r2"))
    new = signed(OTHER, head={"kid": "r2"})
    with pytest.raises(Unauthenticated):
        await world.redeem(new)
    world.now += 31
    assert await world.redeem(new)
    before = len(world.asked)
    for _ in range(10):
        with pytest.raises(Unauthenticated):
            await world.redeem(ATTACKS["another kid"] + "x")
    assert sum("jwks" in url for _, url, _, _ in world.asked[before:]) == 0


async def test_a_symmetric_key_in_the_set_verifies_nothing(world: World) -> None:
    world.keys = [{**OctKey.import_key(SECRET).as_dict(), "kid": "r1"}]
    with pytest.raises((Unauthenticated, Unavailable)):
        await world.redeem(with_hmac(SECRET.encode()))


@pytest.mark.parametrize(
    "change",
    [
        {"issuer": "https://evil.example"},
        {"token_endpoint": "https://evil.example/token"},
        {"token_endpoint": "http://idp.example/token"},
        {"token_endpoint": "https://idp.example:8443/token"},
        {"token_endpoint": "https://idp.example@evil.example/token"},
        {"token_endpoint": "file:///etc/passwd"},
        {"jwks_uri": "https://169.254.169.254/latest/meta-data"},
        {"authorization_endpoint": "javascript:alert(1)"},
        {"jwks_uri": 7},
    ],
    ids=str,
)
async def test_a_provider_that_points_elsewhere(world: World, change: dict[str, Any]) -> None:
    world.metadata |= change
    with pytest.raises(OllamaDistributedError):
        await world.redeem(signed())
    assert [url for _, url, _, _ in world.asked] == [f"{ISSUER}/.well-known/openid-configuration"]


async def test_a_provider_that_fails_is_left_alone_for_a_moment(world: World) -> None:
    world.metadata["issuer"] = "https://evil.example"
    for _ in range(5):
        with pytest.raises(Unavailable):
            await world.redeem(signed())
    assert len(world.asked) == 1
    world.metadata["issuer"] = ISSUER
    world.now += 4
    assert await world.redeem(signed())


async def test_a_code_that_the_provider_refuses(world: World) -> None:
    world.status = 400
    with pytest.raises(Unauthenticated):
        await world.redeem(signed())


def test_the_way_to_a_public_provider_has_tls() -> None:
    with pytest.raises(Forbidden):
        OidcProvider(Client(issuer="http://idp.example", client_id="od"), wall=float, monotonic=float)


# ── whom the claims are about ───────────────────────────────────────────────────────


def settings(**more: Any) -> OidcSettings:
    known = {"roles": {"staff": "viewer", "ml": "operator"}, "teams": {"ml": "research", "staff": "all"}}
    return OidcSettings(issuer=ISSUER, client_id="od", **{**known, **more})


def test_the_mightiest_role_and_the_first_team() -> None:
    person = person_of({**CLAIMS, "groups": ["x", "staff", "ml"]}, settings())
    assert (person.name, person.role, person.team) == ("zoe", "operator", "research")
    assert person.subject == f"{ISSUER}|42"
    assert person_of({**CLAIMS, "groups": "staff"}, settings()).role == "viewer"


@pytest.mark.parametrize("groups", [[], None, ["guests"], {"ml": True}, 7, [["ml"]]], ids=str)
def test_who_is_in_no_group(groups: Any) -> None:
    with pytest.raises(Forbidden):
        person_of({**CLAIMS, "groups": groups}, settings())
    person = person_of({**CLAIMS, "groups": groups}, settings(default_role="viewer"))
    assert (person.role, person.team) == ("viewer", "default")


@pytest.mark.parametrize("name", ["", None, 7, "a b", "../x", "x" * 65, "zoe\n"], ids=repr)
def test_names_that_cannot_be_used(name: Any) -> None:
    with pytest.raises(Forbidden):
        person_of({**CLAIMS, "preferred_username": name}, settings())


@pytest.mark.parametrize("verified", [False, None, "true", 1])
def test_an_address_that_nobody_verified(verified: Any) -> None:
    claims = {**CLAIMS, "email": "zoe@example.com", "email_verified": verified}
    with pytest.raises(Forbidden):
        person_of(claims, settings(name_claim="email"))
    assert (
        person_of({**claims, "email_verified": True}, settings(name_claim="email")).name == "zoe@example.com"
    )


@pytest.mark.parametrize(
    "bad", ["idp.example", "ftp://idp.example", "https://u:p@idp.example", "https://i?x=1"]
)
def test_issuers_that_are_none(bad: str) -> None:
    with pytest.raises(ValueError):
        OidcSettings(issuer=bad, client_id="od")
