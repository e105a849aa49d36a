"""NATS's keys: Ed25519 in base32 with a type and a CRC-16.

Public: base32(type byte, 32 bytes, CRC-16 little-endian). Seed: two bytes that hold `S` and
the type in five bits each, then the same. The prefix bytes are chosen so that the first
letters read `O`, `A`, `U`, `SO`, `SA`, `SU`. Source: nats-io/nkeys `strkey.go`, `crc16.go`.
"""

from __future__ import annotations

import base64
import binascii
from typing import Literal, TypeAlias

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from ollama_distributed.base.errors import Invalid

KeyKind: TypeAlias = Literal["operator", "account", "user"]

_PREFIX: dict[KeyKind, int] = {"operator": 14 << 3, "account": 0, "user": 20 << 3}
_SEED = 18 << 3
_KEY_BYTES = 32


class NatsKey(msgspec.Struct, frozen=True):
    """A key pair by its seed; print `public`, never this."""

    kind: KeyKind
    seed: str

    def __repr__(self) -> str:
        return f"NatsKey({self.public})"

    @property
    def public(self) -> str:
        raw = _private(self.seed, self.kind).public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        return encode_public(self.kind, raw)

    def sign(self, data: bytes) -> bytes:
        return _private(self.seed, self.kind).sign(data)


def make_key(kind: KeyKind, raw: bytes) -> NatsKey:
    """The key pair of 32 random bytes."""
    if len(raw) != _KEY_BYTES:
        raise Invalid("an nkey is made of 32 bytes")
    prefix = _PREFIX[kind]
    head = bytes([_SEED | prefix >> 5, (prefix & 31) << 3])
    return NatsKey(kind, _encode(head + raw))


def read_seed(seed: str) -> NatsKey:
    """
    Raises:
        Invalid: not the seed of an operator, account or user; the message does not repeat it.
    """
    data = _decode(seed, 2 + _KEY_BYTES)
    prefix = (data[0] & 7) << 5 | data[1] >> 3
    kinds = [kind for kind, value in _PREFIX.items() if value == prefix]
    if data[0] & 0xF8 != _SEED or data[1] & 7 or not kinds:
        raise Invalid("not an nkey seed")
    return NatsKey(kinds[0], seed)


def encode_public(kind: KeyKind, raw: bytes) -> str:
    return _encode(bytes([_PREFIX[kind]]) + raw)


def check_public(kind: KeyKind, text: str) -> str:
    """The public key as given, known to be one of `kind`.

    Raises:
        Invalid: it is not.
    """
    if _decode(text, 1 + _KEY_BYTES)[0] != _PREFIX[kind]:
        raise Invalid(f"not the public nkey of a NATS {kind}")
    return text


def verifies(public: str, signature: bytes, data: bytes) -> bool:
    """Whether `signature` over `data` was made by the key `public`."""
    try:
        Ed25519PublicKey.from_public_bytes(_decode(public, 1 + _KEY_BYTES)[1:]).verify(signature, data)
    except InvalidSignature:
        return False
    return True


def _private(seed: str, kind: KeyKind) -> Ed25519PrivateKey:
    if read_seed(seed).kind != kind:
        raise Invalid(f"not the seed of a NATS {kind}")
    return Ed25519PrivateKey.from_private_bytes(_decode(seed, 2 + _KEY_BYTES)[2:])


def _encode(data: bytes) -> str:
    whole = data + binascii.crc_hqx(data, 0).to_bytes(2, "little")  # CRC-16/XMODEM
    return base64.b32encode(whole).rstrip(b"=").decode("ascii")


def _decode(text: str, length: int) -> bytes:
    try:
        whole = base64.b32decode(text + "=" * (-len(text) % 8))
    except (binascii.Error, ValueError) as failure:
        raise Invalid("not an nkey") from failure
    data, crc = whole[:-2], whole[-2:]
    if len(data) != length or binascii.crc_hqx(data, 0).to_bytes(2, "little") != crc:
        raise Invalid("not an nkey, or one that was cut or mistyped")
    if _encode(data) != text:
        raise Invalid("not an nkey in its one spelling")
    return data
