"""API keys: `odk_<id>_<secret>_<check>`.

The id finds the record, the secret (256 random bits) proves it, the check (CRC-32) tells
a mistyped key from a wrong one without a look-up and lets secret scanners be sure. A
record keeps the SHA-256 of the secret only; a random 256-bit secret needs no slow hash.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import re
import secrets
import zlib

import msgspec

from ollama_distributed.base.identity import Role
from ollama_distributed.base.ids import KeyId, random_id
from ollama_distributed.state.access import KeyRecord as KeyRecord

PREFIX = "odk_"
_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_SECRET_CHARS = 43
"""32 random bytes in base62."""
_FORM = re.compile(r"odk_([0-9a-z]{8})_([0-9A-Za-z]{43})_([0-9A-Za-z]{6})", re.ASCII)
_NO_HASH = "0" * 64
_NOBODY = KeyRecord(id=KeyId(""), secret_sha256=_NO_HASH, role="viewer")
"""Compared with where an id is not known, in the same steps."""
_REMEMBERED = 1024
"""Keys whose form and hash are not worked out again for each request. Whether a key is good is not
remembered: that is looked up each time."""


class ParsedKey(msgspec.Struct, frozen=True):
    id: KeyId
    secret: str


def make_key(
    role: Role,
    *,
    now: float,
    name: str = "",
    team: str = "default",
    policy: str = "",
    expires_at: float | None = None,
    key_id: KeyId | None = None,
) -> tuple[str, KeyRecord]:
    """A new key: its plain text, to be shown once, and the record to keep. `key_id`: of the key that
    gets a new secret; None: a new one."""
    key_id = key_id or KeyId(random_id(8))
    secret = _base62(secrets.token_bytes(32), _SECRET_CHARS)
    body = f"{PREFIX}{key_id}_{secret}"
    record = KeyRecord(
        id=key_id,
        secret_sha256=_hash(secret),
        role=role,
        name=name,
        team=team,
        created_at=now,
        policy=policy,
        expires_at=expires_at,
    )
    return f"{body}_{_check(body)}", record


def make_admin_key(now: float) -> tuple[str, KeyRecord]:
    """The key of `admin.json`, made at first start."""
    return make_key("admin", now=now, name="admin")


@functools.lru_cache(maxsize=_REMEMBERED)
def parse_key(text: str) -> ParsedKey | None:
    """The parts of a well-formed key; None where the form or the check is wrong."""
    match = _FORM.fullmatch(text)
    if match is None:
        return None
    key_id, secret, check = match.groups()
    if not hmac.compare_digest(check, _check(f"{PREFIX}{key_id}_{secret}")):
        return None
    return ParsedKey(KeyId(key_id), secret)


def proves(key: ParsedKey, record: KeyRecord | None, now: float = 0.0) -> bool:
    """Whether the secret belongs to the record; the one before the last rotation, until its time ends.

    Takes the same time for an unknown id (`record` None): it compares with a dummy.
    """
    sent, known = _hash(key.secret), record or _NOBODY
    same = hmac.compare_digest(sent, known.secret_sha256)
    old = hmac.compare_digest(sent, known.old_sha256 or _NO_HASH)
    return (same or (old and now < known.old_until)) and record is not None


@functools.lru_cache(maxsize=_REMEMBERED)
def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("ascii")).hexdigest()


def _check(body: str) -> str:
    return _base62(zlib.crc32(body.encode("ascii")).to_bytes(4, "big"), 6)


def _base62(data: bytes, width: int) -> str:
    number = int.from_bytes(data, "big")
    digits = []
    for _ in range(width):
        number, digit = divmod(number, 62)
        digits.append(_BASE62[digit])
    return "".join(reversed(digits))
