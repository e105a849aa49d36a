"""JWTs: ours hold, and nothing else does (security table, S-08)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from joserfc import jwt
from joserfc.errors import SecurityWarning
from joserfc.jwk import KeySet

from ollama_distributed.access import tokens
from ollama_distributed.access.keys import make_key
from ollama_distributed.access.people import People, SignerRecord, UserRecord
from ollama_distributed.access.service import Authenticator, Caller
from ollama_distributed.base.errors import Unauthenticated
from ollama_distributed.base.ids import NodeId

NOW = 1_800_000_000
KID, OTHER_KID = "k" * 16, "o" * 16
KEY = Ed25519PrivateKey.generate()
OTHER = Ed25519PrivateKey.generate()
PUBLIC = KEY.public_key().public_bytes_raw()
HEADER: dict[str, Any] = {"alg": "EdDSA", "typ": "at+jwt", "kid": KID}
CLAIMS: dict[str, Any] = {
    "iss": tokens.issuer_of("c1"),
    "aud": tokens.AUDIENCE,
    "sub": "user:ann",
    "iat": NOW,
    "nbf": NOW,
    "exp": NOW + 900,
    "jti": "j1",
    "ver": 7,
}


class World:
    def __init__(self) -> None:
        self.now = float(NOW)
        self.people = People(wall=lambda: self.now)
        self.people.issuer = tokens.issuer_of("c1")
        self.people.users["ann"] = UserRecord(name="ann", role="user", team="red", version=7)
        self.key, record = make_key("operator", now=NOW)
        self.key_id = record.id
        self.authenticator = Authenticator([record], require_key=True, wall=lambda: self.now)
        self.authenticator.know(self.people)
        self.sign_with(KID, KEY)

    def sign_with(self, kid: str, key: Ed25519PrivateKey, trusted_until: float = NOW + 1e6) -> None:
        public = base64.b64encode(key.public_key().public_bytes_raw()).decode()
        self.people.signers[kid] = SignerRecord(
            kid=kid, node=NodeId("n1"), public=public, signs_until=trusted_until, trusted_until=trusted_until
        )

    def role(self, token: str) -> str:
        return self.authenticator.identify(Caller(token, at_this_machine=False)).role


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def raw(head: bytes, body: bytes, key: Ed25519PrivateKey = KEY) -> str:
    text = f"{b64(head)}.{b64(body)}"
    return f"{text}.{b64(key.sign(text.encode()))}"


def made(
    head: dict[str, Any] | None = None, drop: str = "", key: Ed25519PrivateKey = KEY, **claims: Any
) -> str:
    body = {name: value for name, value in {**CLAIMS, **claims}.items() if name != drop}
    return raw(json.dumps({**HEADER, **(head or {})}).encode(), json.dumps(body).encode(), key)


def with_hmac(secret: bytes, alg: str = "HS256") -> str:
    text = f"{b64(json.dumps({**HEADER, 'alg': alg}).encode())}.{b64(json.dumps(CLAIMS).encode())}"
    return f"{text}.{b64(hmac.digest(secret, text.encode(), hashlib.sha256))}"


def unsigned(alg: str, signature: str = "") -> str:
    return (
        f"{b64(json.dumps({**HEADER, 'alg': alg}).encode())}.{b64(json.dumps(CLAIMS).encode())}.{signature}"
    )


def bent_signature() -> str:
    """The same bytes in another text: the last character's unused bits."""
    token = made()
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    return token[:-1] + alphabet[alphabet.index(token[-1]) ^ 1]


TWICE = b'{"alg":"EdDSA","typ":"at+jwt","kid":"' + KID.encode() + b'","alg":"EdDSA"}'
ATTACKS = {
    "alg none": unsigned("none"),
    "alg None with a signature": unsigned("None", "A" * 86),
    "alg empty": unsigned("", "A" * 86),
    "signature missing": made().rpartition(".")[0] + ".",
    "HS256 with the public key": with_hmac(PUBLIC),
    "HS256 with its base64": with_hmac(base64.b64encode(PUBLIC)),
    "HS256 named EdDSA": with_hmac(PUBLIC, alg="EdDSA"),
    "RS256 named": made({"alg": "RS256"}),
    "ES256 named": made({"alg": "ES256"}),
    "Ed448 key named": made({"alg": "Ed448"}),
    "another key": made(key=OTHER),
    "another key, its own kid": made({"kid": OTHER_KID}, key=OTHER),
    "kid a path": made({"kid": "../../../../dev/null"}),
    "kid with SQL": made({"kid": "k' OR '1'='1"}),
    "kid missing": raw(b'{"alg":"EdDSA","typ":"at+jwt"}', json.dumps(CLAIMS).encode()),
    "kid a list": made({"kid": [KID]}),
    "jku": made({"jku": "https://evil.example/jwks.json"}),
    "x5u": made({"x5u": "https://evil.example/cert.pem"}),
    "jwk inside": made({"jwk": {"kty": "OKP", "crv": "Ed25519", "x": b64(PUBLIC)}}),
    "x5c": made({"x5c": ["AAAA"]}),
    "crit": made({"crit": ["exp"]}),
    "b64 false": made({"b64": False, "crit": ["b64"]}),
    "zip": made({"zip": "DEF"}),
    "typ JWT": made({"typ": "JWT"}),
    "typ of a code": made({"typ": tokens.CODE_TYPE}),
    "wrong aud": made(aud="another-service"),
    "aud a list": made(aud=[tokens.AUDIENCE]),
    "aud missing": made(drop="aud"),
    "wrong iss": made(iss=tokens.issuer_of("c2")),
    "iss missing": made(drop="iss"),
    "iss a prefix": made(iss=tokens.issuer_of("c1") + ".evil"),
    "no exp": made(drop="exp"),
    "exp null": made(exp=None),
    "exp text": made(exp=str(NOW + 900)),
    "exp a fraction of infinity": made(exp=1e300),
    "expired": made(iat=NOW - 2000, nbf=NOW - 2000, exp=NOW - 61),
    "nbf in the future": made(nbf=NOW + 120),
    "nbf missing": made(drop="nbf"),
    "iat in the future": made(iat=NOW + 120),
    "exp before nbf": made(exp=NOW - 10),
    "sub missing": made(drop="sub"),
    "sub of nobody": made(sub="user:bob"),
    "sub a role": made(sub="admin"),
    "sub an unknown key": made(sub="key:zzzzzzzz"),
    "an old version of the user": made(ver=6),
    "a session that is over": made(sid="s" * 16),
    "a claim of its own role": made(role="admin"),
    "header name twice": raw(TWICE, json.dumps(CLAIMS).encode()),
    "claim twice": raw(json.dumps(HEADER).encode(), json.dumps(CLAIMS)[:-1].encode() + b',"sub":"user:ann"}'),
    "claims no object": raw(json.dumps(HEADER).encode(), b'["user:ann"]'),
    "claims no JSON": raw(json.dumps(HEADER).encode(), b"{"),
    "deep claims": raw(json.dumps(HEADER).encode(), b'{"a":' * 900 + b"1" + b"}" * 900),
    "1 MB": made(jti="x" * 1_000_000),
    "padding": made() + "==",
    "another text of the same bytes": bent_signature(),
    "space inside": made().replace(".", ". ", 1),
    "two tokens": made() + "." + made(),
    "JWE's five parts": ".".join(["eyJhbGciOiJkaXIifQ"] * 5),
    "empty parts": "eyJ..",
}


@pytest.fixture
def world() -> World:
    return World()


@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_else_holds(world: World, name: str) -> None:
    with pytest.raises(Unauthenticated):
        world.role(ATTACKS[name])


def test_ours_holds_for_as_long_as_it_says(world: World) -> None:
    token = made()
    assert world.role(token) == "user"
    world.now = NOW + 900 + tokens.LEEWAY_S - 1
    assert world.role(token) == "user"  # as it stands in the memory of checked ones
    world.now += 1
    with pytest.raises(Unauthenticated):
        world.role(token)


def test_the_record_counts_not_the_token(world: World) -> None:
    token = made()
    assert world.role(token) == "user"
    world.people.users["ann"] = UserRecord(name="ann", role="admin", team="red", version=7)
    assert world.role(token) == "admin"
    world.people.users["ann"] = UserRecord(name="ann", role="admin", disabled=True, version=7)
    with pytest.raises(Unauthenticated):
        world.role(token)


def test_a_key_s_token_lasts_no_longer_than_the_key(world: World) -> None:
    token = made(sub=f"key:{world.key_id}", ver=0)
    assert world.role(token) == "operator"
    world.authenticator = Authenticator([], require_key=True, wall=lambda: world.now)
    world.authenticator.know(world.people)
    with pytest.raises(Unauthenticated):
        world.role(token)


def test_the_key_that_signed_must_be_trusted_still(world: World) -> None:
    token = made()
    assert world.role(token) == "user"
    world.people.removed = lambda node: node == "n1"
    with pytest.raises(Unauthenticated):
        world.role(token)
    world.people.removed = lambda _: False
    world.sign_with(KID, KEY, trusted_until=NOW)
    with pytest.raises(Unauthenticated):
        world.role(token)


def test_two_keys_overlap(world: World) -> None:
    world.sign_with(OTHER_KID, OTHER)
    assert world.role(made()) == world.role(made({"kid": OTHER_KID}, key=OTHER)) == "user"
    with pytest.raises(Unauthenticated):
        world.role(made(key=OTHER))  # says the first one's name


def test_others_can_check_it_by_our_jwks(world: World) -> None:
    text = tokens.sign(tokens.Claims(**CLAIMS), KEY, KID)
    keys = KeySet.import_key_set({"keys": [dict(key) for key in world.people.jwks()]})  # type: ignore[typeddict-item]
    with pytest.warns(SecurityWarning, match="RFC 9864"):  # which names the same algorithm Ed25519
        read = jwt.decode(text, keys, algorithms=["EdDSA"])
    assert read.claims["sub"] == "user:ann"
    assert world.role(text) == "user"
