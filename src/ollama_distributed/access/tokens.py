"""Short-lived JWTs: signed by a server of the cluster, checked by any node from public keys alone.

Read far more strictly than RFC 7519 allows: one algorithm (EdDSA over Ed25519, RFC 8037), exactly
the headers that we write, every claim there and of its type, no name twice. So no header can
choose how it is checked, and no parser reads it otherwise than another. Pure: keys and the time
are arguments.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from typing import Any, TypeVar

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from ollama_distributed.base.errors import Unauthenticated

ALGORITHM = "EdDSA"
TYPE = "at+jwt"
"""Of access tokens (RFC 9068 2.1): what was signed for another purpose is none."""
CODE_TYPE = "cli-code+jwt"
"""Of the code that a sign-in in the browser hands to the command line."""
AUDIENCE = "ollama-distributed"
LIFETIME_S = 900
"""What a stolen one is worth at most; who holds a session or a key gets the next one."""
CODE_LIFETIME_S = 60
LEEWAY_S = 60
"""Clocks of a cluster's machines differ by that much at most, or more breaks than this."""
MAX_CHARS = 4096
_FORM = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]{86})", re.ASCII)
_KID = re.compile(r"[a-z0-9]{16}", re.ASCII)
T = TypeVar("T")
_REFUSED = "the token is not valid; ask for a new one (POST /api/v1/auth/token)"


class Claims(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    iss: str
    aud: str
    sub: str
    """`user:<name>` or `key:<id>`."""
    iat: int
    nbf: int
    exp: int
    jti: str
    ver: int = 0
    """Of the user when it was made: a new password, role or lock ends it at once."""
    sid: str = ""
    """The session that it came from, with which it ends; empty: a key's."""
    cch: str = ""
    """Of a code: the challenge whose verifier must come with it (RFC 7636)."""


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    alg: str
    typ: str
    kid: str


def issuer_of(cluster: str) -> str:
    return f"urn:ollama-distributed:{cluster}"


def looks_like_token(credential: str) -> bool:
    """A JWT of anybody: it begins with the `{"` of its header."""
    return credential.startswith("eyJ") and credential.count(".") == 2


def sign(claims: Claims, key: Ed25519PrivateKey, kid: str, *, type_: str = TYPE) -> str:
    head = _base64(msgspec.json.encode(Header(alg=ALGORITHM, typ=type_, kid=kid)))
    body = _base64(msgspec.json.encode(claims))
    return f"{head}.{body}.{_base64(key.sign(f'{head}.{body}'.encode()))}"


def kid_of(token: str, *, type_: str = TYPE) -> str:
    """Which key it says to be signed by, its form checked.

    Raises:
        Unauthenticated: it is none of ours.
    """
    match = _FORM.fullmatch(token) if len(token) <= MAX_CHARS else None
    if match is None:
        raise Unauthenticated(_REFUSED)
    header = _decoded(match[1], Header)
    if header.alg != ALGORITHM or header.typ != type_ or not _KID.fullmatch(header.kid):
        raise Unauthenticated(_REFUSED)
    return header.kid


def verify(token: str, key: Ed25519PublicKey, *, issuer: str, now: float) -> Claims:
    """The claims of a token whose `kid_of` named this key.

    Raises:
        Unauthenticated: wrong signature, issuer or audience, or not of this time.
    """
    signed, _, signature = token.rpartition(".")
    try:
        key.verify(_unbase64(signature), signed.encode())
    except (InvalidSignature, ValueError):
        raise Unauthenticated(_REFUSED) from None
    claims = _decoded(signed.partition(".")[2], Claims)
    current = claims.nbf - LEEWAY_S <= now < claims.exp + LEEWAY_S and claims.iat - LEEWAY_S <= now
    if claims.iss != issuer or claims.aud != AUDIENCE or not current or claims.exp <= claims.nbf:
        raise Unauthenticated(_REFUSED)
    return claims


def public_jwk(key: Ed25519PublicKey, kid: str) -> dict[str, Any]:
    """As JWKS has it (RFC 8037 2)."""
    return {
        "kty": "OKP",
        "crv": "Ed25519",
        "use": "sig",
        "alg": ALGORITHM,
        "kid": kid,
        "x": _base64(key.public_bytes_raw()),
    }


def _decoded(part: str, kind: type[T]) -> T:
    try:
        text = _unbase64(part)
        json.loads(text, object_pairs_hook=_each_once)
        return msgspec.json.decode(text, type=kind)
    except (ValueError, RecursionError, msgspec.MsgspecError):
        raise Unauthenticated(_REFUSED) from None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name twice")
    return found


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _unbase64(text: str) -> bytes:
    """
    Raises:
        ValueError: no base64url, or with bits beyond its end: two texts of one token.
    """
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error as failure:
        raise ValueError("no base64url") from failure
    if _base64(data) != text:
        raise ValueError("not the one form")
    return data
