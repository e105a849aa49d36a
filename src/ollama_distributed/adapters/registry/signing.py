"""The node's key for registries: an SSH key of ed25519, used as Ollama uses its own.

A registry that knows the public key (its owner registered it) gives a token for a signed
request. Source: Ollama `auth/auth.go`, `server/auth.go`.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from ollama_distributed.adapters.durable import replace_file
from ollama_distributed.base.errors import Invalid, Unavailable

_EMPTY_BODY = base64.b64encode(hashlib.sha256(b"").hexdigest().encode()).decode()


class RequestSigner:
    """Reads the key at first use, and makes one where none is. Blocking, once."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._key: Ed25519PrivateKey | None = None

    def sign(self, method: str, url: str) -> str:
        """The Authorization header of a request without a body.

        Raises:
            Invalid: the file holds no such key.
            Unavailable: it cannot be read or made.
        """
        key = self._loaded()
        signature = key.sign(f"{method},{url},{_EMPTY_BODY}".encode())
        return f"{self._public(key).split()[1]}:{base64.b64encode(signature).decode()}"

    def public_key(self) -> str:
        """As an `authorized_keys` line, for the registry's site."""
        return self._public(self._loaded())

    @staticmethod
    def _public(key: Ed25519PrivateKey) -> str:
        return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()

    def _loaded(self) -> Ed25519PrivateKey:
        if self._key is None:
            try:
                self._key = _read(self._file) if self._file.exists() else _make(self._file)
            except OSError as exc:
                raise Unavailable(
                    f"the registry key {self._file} cannot be used: {exc.strerror or exc}"
                ) from exc
        return self._key


def _read(file: Path) -> Ed25519PrivateKey:
    try:
        key = load_ssh_private_key(file.read_bytes(), password=None)
    except (ValueError, TypeError) as exc:
        raise Invalid(f"{file} holds no SSH key without a password") from exc
    if not isinstance(key, Ed25519PrivateKey):
        raise Invalid(f"{file} holds a key of another kind; ed25519 is needed")
    return key


def _make(file: Path) -> Ed25519PrivateKey:
    key = Ed25519PrivateKey.generate()
    text = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    replace_file(file, text)
    return key
