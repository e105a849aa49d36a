"""Who asks: a key, or a person at this machine without one.

Knows no HTTP: the gateway says what it saw of the caller, this room says who it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import msgspec

from ollama_distributed.access.keys import PREFIX, KeyRecord, parse_key, proves
from ollama_distributed.base.errors import Unauthenticated
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import KeyId

LOCAL = Identity(role="local")


class Caller(msgspec.Struct, frozen=True):
    """What the gateway saw of a caller."""

    credential: str
    """Bearer token or API key as sent; empty when there was none."""
    at_this_machine: bool
    """Peer and Host are loopback, and no proxy header was sent."""


class Authenticator:
    """Turns a `Caller` into an `Identity`.

    Without `require_key`, a caller at this machine needs no key and acts as the role
    `local`. A credential that is not one of our keys (the placeholder that OpenAI clients
    insist on sending) counts as none; a key of ours that is wrong is always refused.
    """

    def __init__(self, keys: Iterable[KeyRecord], *, require_key: bool, wall: Callable[[], float]) -> None:
        self._keys = {key.id: key for key in keys}
        self._shared: Mapping[KeyId, KeyRecord] = {}
        self._require_key = require_key
        self._wall = wall

    @property
    def own(self) -> tuple[KeyRecord, ...]:
        """The keys that this node was made with."""
        return tuple(self._keys.values())

    def share(self, keys: Mapping[KeyId, KeyRecord]) -> None:
        """Know these keys of the cluster, in place of those shared before, beside this node's own."""
        self._shared = keys

    def identify(self, caller: Caller) -> Identity:
        """Raises `Unauthenticated`; the message never tells which part was wrong."""
        if caller.credential.startswith(PREFIX):
            return self._by_key(caller.credential)
        if caller.at_this_machine and not self._require_key:
            return LOCAL
        raise Unauthenticated("an API key is needed: send it as 'Authorization: Bearer odk_…'")

    def _by_key(self, text: str) -> Identity:
        key = parse_key(text)
        if key is None:
            raise Unauthenticated("the API key is not valid")
        record = self._keys.get(key.id) or self._shared.get(key.id)
        if not proves(key, record) or record is None:
            raise Unauthenticated("the API key is not valid")
        if record.expires_at is not None and record.expires_at <= self._wall():
            raise Unauthenticated("the API key is not valid")
        return Identity(role=record.role, key_id=record.id, team=record.team)
