"""Join tokens: `odj_<role>.<id>.<secret>.<ca sha256>.<addresses>.<check>`.

The id finds the record and may be shown; the secret (256 random bits) proves it; the CA's
hash lets the joiner know the cluster before it says anything; the addresses say where to
ask; the check (CRC-32) tells a token that was cut or mistyped from a wrong one.

Pure: makes, reads and judges tokens. The record keeps the secret's SHA-256 only. Who may
use a token is decided by `judge` from a record that was just read, and holds only once the
record that it returns has replaced that one by compare-and-set (`admission.py`).

Sources: kubeadm bootstrap tokens (public id, secret), k3s secure tokens (the CA's hash).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import zlib
from collections.abc import Iterable
from typing import Literal, TypeAlias

import msgspec

from ollama_distributed.base.errors import Invalid
from ollama_distributed.base.ids import NodeRole
from ollama_distributed.cluster.identity.ca import BACKDATE_S, DAY_S
from ollama_distributed.cluster.identity.names import canonical_host

PREFIX = "odj_"
TOKEN_LIFETIME_S = 600.0
"""Long enough to paste it into another terminal, short enough to forget about it."""
MAX_TOKEN_LIFETIME_S = DAY_S
MAX_USES = 1000
"""One per machine of a rack row; a token for more is a password."""
MAX_ADDRESSES = 8
MAX_TOKEN_CHARS = 4096
SECRET_BYTES = 32

_FORM = re.compile(
    r"odj_(?P<role>[a-z]{1,16})\.(?P<id>[0-9a-z]{8})\.(?P<secret>[0-9A-Za-z_-]{43})"
    r"\.(?P<ca>[0-9a-f]{64})\.(?P<where>[0-9A-Za-z_-]{1,3600})\.(?P<check>[0-9a-f]{8})",
    re.ASCII,
)
_NO_HASH = "0" * 64


class Address(msgspec.Struct, frozen=True, order=True):
    """Where a cluster listener answers."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class JoinToken(msgspec.Struct, frozen=True, kw_only=True):
    """A token in parts, as the joiner reads it."""

    role: NodeRole
    id: str
    secret: str
    ca_sha256: str
    """Of the signing CA's certificate, hex."""
    addresses: tuple[Address, ...]

    def __repr__(self) -> str:
        return f"JoinToken({self.role}, {self.id})"


class TokenUse(msgspec.Struct, frozen=True):
    node: str
    key_sha256: str
    """Of the public key that the use certified: the same key may ask again."""
    at: float


class TokenRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What the cluster keeps of a token."""

    id: str
    secret_sha256: str
    role: NodeRole
    uses: int
    """How many nodes it admits in all."""
    created_at: float
    expires_at: float
    creator: str
    """Key id of the operator who made it."""
    hosts: tuple[str, ...] = ()
    """Names and addresses that nodes admitted by it may have in their certificate."""
    used: tuple[TokenUse, ...] = ()
    revoked_at: float | None = None

    @property
    def uses_left(self) -> int:
        return self.uses - len(self.used)


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One try to join with a token."""

    secret: str
    role: NodeRole
    node: str
    key_sha256: str

    def __repr__(self) -> str:
        return f"Attempt({self.role}, {self.node})"


Refusal: TypeAlias = Literal[
    "unknown", "wrong_secret", "wrong_role", "revoked", "not_yet_valid", "expired", "used_up"
]


class Admitted(msgspec.Struct, frozen=True):
    record: TokenRecord
    """To be stored in place of the one that was judged."""
    again: bool
    """The same node with the same key asked before: nothing is used, nothing to store."""


class Refused(msgspec.Struct, frozen=True):
    reason: Refusal

    @property
    def guessed(self) -> bool:
        """The asker did not know the secret: counts as a wrong try and is told nothing."""
        return self.reason in ("unknown", "wrong_secret")

    @property
    def alarming(self) -> bool:
        """The secret was right where it should not be known any more, or was bent to another role."""
        return self.reason in ("used_up", "revoked", "wrong_role")


def make_token(
    role: NodeRole,
    *,
    token_id: str,
    secret: bytes,
    ca_sha256: str,
    addresses: Iterable[Address],
    now: float,
    creator: str,
    uses: int = 1,
    lifetime_s: float = TOKEN_LIFETIME_S,
    hosts: Iterable[str] = (),
) -> tuple[str, TokenRecord]:
    """A new token: its text, to be shown once, and the record to keep.

    `token_id` (8 of a-z, 0-9) and `secret` (32 bytes) come from the caller, at random.

    Raises:
        Invalid: uses, lifetime, hosts or addresses out of bounds.
    """
    where = tuple(addresses)
    if not 1 <= uses <= MAX_USES:
        raise Invalid(f"a token admits 1 to {MAX_USES} nodes", param="uses")
    if not 1 <= lifetime_s <= MAX_TOKEN_LIFETIME_S:
        raise Invalid("a token lives at most 24 hours", param="ttl")
    if not 1 <= len(where) <= MAX_ADDRESSES:
        raise Invalid(f"a token carries 1 to {MAX_ADDRESSES} addresses", param="addresses")
    if len(secret) != SECRET_BYTES:
        raise Invalid(f"a token's secret has {SECRET_BYTES} bytes")
    text = _encode(
        JoinToken(role=role, id=token_id, secret=_base64(secret), ca_sha256=ca_sha256, addresses=where)
    )
    record = TokenRecord(
        id=token_id,
        secret_sha256=hash_secret(_base64(secret)),
        role=role,
        uses=uses,
        created_at=now,
        expires_at=now + lifetime_s,
        creator=creator,
        hosts=tuple(sorted({canonical_host(host) for host in hosts})),
    )
    parse_token(text)  # what was made can be read, whatever the arguments were
    return text, record


def parse_token(text: str) -> JoinToken:
    """A token's parts. Never repeats the text in a message: it holds a secret.

    Raises:
        Invalid: not a whole, unchanged token; the message says what to do.
    """
    text = text.strip()
    if not text.startswith(PREFIX):
        raise Invalid("this is no join token: one starts with 'odj_' (cluster token create makes it)")
    match = _FORM.fullmatch(text) if len(text) <= MAX_TOKEN_CHARS else None
    if match is None:
        raise Invalid("the join token is not complete; copy it as a whole, from 'odj_' to its end")
    if not hmac.compare_digest(match["check"], _check(text.rpartition(".")[0])):
        raise Invalid("the join token was changed or cut; copy it again as a whole")
    try:
        role = msgspec.convert(match["role"], NodeRole)
    except msgspec.ValidationError:
        raise Invalid("the join token is for a role that this version does not know") from None
    return JoinToken(
        role=role,
        id=match["id"],
        secret=match["secret"],
        ca_sha256=match["ca"],
        addresses=_addresses(match["where"]),
    )


def judge(record: TokenRecord | None, attempt: Attempt, now: float) -> Admitted | Refused:
    """Whether the attempt may pass, and the record after it.

    The secret is compared first and in constant time, for an unknown token with a dummy:
    who does not know it learns nothing about the token.
    """
    known = hmac.compare_digest(hash_secret(attempt.secret), record.secret_sha256 if record else _NO_HASH)
    if record is None:
        return Refused("unknown")
    if not known:
        return Refused("wrong_secret")
    if attempt.role != record.role:
        return Refused("wrong_role")
    if record.revoked_at is not None:
        return Refused("revoked")
    if now < record.created_at - BACKDATE_S:
        return Refused("not_yet_valid")  # this clock was set back: it would prolong every token
    if now >= record.expires_at:
        return Refused("expired")
    if any((use.node, use.key_sha256) == (attempt.node, attempt.key_sha256) for use in record.used):
        return Admitted(record, again=True)
    if record.uses_left <= 0:
        return Refused("used_up")
    use = TokenUse(attempt.node, attempt.key_sha256, now)
    return Admitted(msgspec.structs.replace(record, used=(*record.used, use)), again=False)


def hash_secret(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def parse_address(text: str) -> Address:
    """`HOST:PORT` or `[IPv6]:PORT`.

    Raises:
        Invalid: anything else.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or not 1 <= int(port[:6]) <= 65535:
        raise Invalid(f"'{text[:80]}' is no address; write HOST:PORT")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise Invalid(f"'{text[:80]}' is no address; write [IPv6]:PORT")
    return Address(canonical_host(host), int(port))


def _encode(token: JoinToken) -> str:
    where = _base64(",".join(map(str, token.addresses)).encode())
    body = f"{PREFIX}{token.role}.{token.id}.{token.secret}.{token.ca_sha256}.{where}"
    return f"{body}.{_check(body)}"


def _addresses(where: str) -> tuple[Address, ...]:
    try:
        texts = base64.b64decode(where + "=" * (-len(where) % 4), altchars=b"-_", validate=True).decode(
            "ascii"
        )
    except (binascii.Error, UnicodeDecodeError) as failure:
        raise Invalid("the join token's addresses cannot be read; copy it again as a whole") from failure
    addresses = tuple(map(parse_address, texts.split(",")))
    if len(addresses) > MAX_ADDRESSES:
        raise Invalid(f"a join token carries at most {MAX_ADDRESSES} addresses")
    return addresses


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _check(body: str) -> str:
    return f"{zlib.crc32(body.encode()):08x}"
