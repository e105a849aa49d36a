"""A gate that knows one key, one session and one token, the same in each run: corpora hold them."""

from __future__ import annotations

import base64
import hashlib

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ollama_distributed.access import keys, tokens
from ollama_distributed.access.people import People, SessionRecord, SignerRecord, UserRecord, csrf_of
from ollama_distributed.access.service import Authenticator
from ollama_distributed.base.ids import KeyId, NodeId
from ollama_distributed.gateway.gate import Gate
from ollama_distributed.gateway.limits import Limits
from ollama_distributed.gateway.origins import SitePolicy
from ollama_distributed.state.access import KeyRecord

NOW = 1_800_000_000.0
_SECRET = "S" * 43
_BODY = f"odk_fuzzfuzz_{_SECRET}"
KEY = f"{_BODY}_{keys._check(_BODY)}"  # a key is only made with a secret of its own
SESSION = f"ods_fuzzfuzzfuzzfuzz_{_SECRET}"
CSRF = csrf_of(SESSION)
_SIGNER = Ed25519PrivateKey.from_private_bytes(b"\1" * 32)
_KID = "0123456789abcdef"


def _claims(**fields: object) -> tokens.Claims:
    made: dict[str, object] = {
        "iss": tokens.issuer_of("c1"),
        "aud": tokens.AUDIENCE,
        "sub": "user:ann",
        "iat": int(NOW),
        "nbf": int(NOW),
        "exp": int(NOW) + tokens.LIFETIME_S,
        "jti": "j1",
        "ver": 1,
    }
    return tokens.Claims(**{**made, **fields})  # type: ignore[arg-type]  # of those above


TOKEN = tokens.sign(_claims(), _SIGNER, _KID)
KEY_TOKEN = tokens.sign(_claims(sub="key:fuzzfuzz", ver=0), _SIGNER, _KID)
STALE_TOKENS = (
    tokens.sign(_claims(exp=int(NOW) - 3600, nbf=int(NOW) - 7200, iat=int(NOW) - 7200), _SIGNER, _KID),
    tokens.sign(_claims(iss="urn:ollama-distributed:c2"), _SIGNER, _KID),
    tokens.sign(_claims(), _SIGNER, _KID, type_=tokens.CODE_TYPE),
    tokens.sign(_claims(), Ed25519PrivateKey.from_private_bytes(b"\2" * 32), _KID),
)
"""Expired, another cluster's, made for another purpose, signed by somebody else."""
GOOD = frozenset({KEY, SESSION, TOKEN, KEY_TOKEN})


def _gate() -> Gate:
    def wall() -> float:
        return NOW

    record = KeyRecord(
        id=KeyId("fuzzfuzz"), secret_sha256=hashlib.sha256(_SECRET.encode()).hexdigest(), role="user"
    )
    people = People(wall=wall)
    people.issuer = tokens.issuer_of("c1")
    people.replace(
        [UserRecord(name="ann", role="operator")],
        [
            SessionRecord(
                id="fuzzfuzzfuzzfuzz",
                user="ann",
                version=1,
                secret_sha256=hashlib.sha256(_SECRET.encode()).hexdigest(),
                created_at=NOW,
                seen_at=NOW,
                expires_at=NOW + 3600,
            )
        ],
        [
            SignerRecord(
                kid=_KID,
                node=NodeId("n1"),
                public=base64.b64encode(_SIGNER.public_key().public_bytes_raw()).decode(),
                signs_until=NOW + 1e6,
                trusted_until=NOW + 1e6,
            )
        ],
    )
    authenticator = Authenticator([record], require_key=False, wall=wall)
    authenticator.know(people)
    return Gate(authenticator, SitePolicy(), Limits())


GATE = _gate()
