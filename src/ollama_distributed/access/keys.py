"""API keys: `odk_<id>_<secret>_<check>`.

The id may be shown, the secret (256 random bits) proves the key, the check (CRC-32) lets secret
scanners be sure. A record keeps the SHA-256 of the secret only; a random 256-bit secret needs no
slow hash.
"""

from __future__ import annotations

import functools
import hashlib
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
_KEY_CHARS = 63
_ID, _SECRET = slice(4, 12), slice(13, 56)
_REMEMBERED = 1024
"""Keys whose form and hash are not worked out again for each request. Whether a key is good is not
remembered: that is looked up each time."""


class ParsedKey(msgspec.Struct, frozen=True):
    id: KeyId
    secret_sha256: str


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


def make_admin_key(now: float, node: str = "") -> tuple[str, KeyRecord]:
    """The key of `admin.json`, made at first start. `node`: its name, as a cluster has several."""
    return make_key("admin", now=now, name=f"admin of {node}"[:64] if node else "admin")


@functools.lru_cache(maxsize=_REMEMBERED)
def parse_key(text: str) -> ParsedKey | None:
    """The parts of a text that is as long as a key, in the same steps for each; None: by its length or
    alphabet it is none."""
    if len(text) != _KEY_CHARS or not text.isascii():
        return None
    return ParsedKey(KeyId(text[_ID]), _hash(text[_SECRET]))


@functools.lru_cache(maxsize=_REMEMBERED)
def is_well_formed(text: str) -> bool:
    """Whether a text that is as long as a key has a key's form, and the check that belongs to it."""
    body = f"{PREFIX}{text[_ID]}_{text[_SECRET]}"
    return text == f"{body}_{_check(body)}"


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
