"""Who asks: a key, a person who signed in, or one at this machine without either.

Knows no HTTP: the gateway says what it saw of the caller, this room says who it is. Each key's
identity, its policy included, is made once when keys or policies change; a request looks it up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from hmac import compare_digest

import msgspec

from ollama_distributed.access.keys import PREFIX, KeyRecord, is_well_formed, parse_key
from ollama_distributed.access.people import PREFIX as SESSION_PREFIX
from ollama_distributed.access.people import People, UserRecord
from ollama_distributed.access.policies import Holding
from ollama_distributed.access.tokens import looks_like_token
from ollama_distributed.base.errors import Forbidden, Unauthenticated
from ollama_distributed.base.identity import Identity, Role
from ollama_distributed.base.ids import KeyId
from ollama_distributed.base.policies import Policy

NOT_VALID = "the API key is not valid"


class Caller(msgspec.Struct, frozen=True):
    """What the gateway saw of a caller."""

    credential: str
    """API key, session or token as sent; empty when there was none."""
    at_this_machine: bool
    """Peer and Host are loopback, and no proxy header was sent."""


class _Known(msgspec.Struct, frozen=True, gc=False):
    record: KeyRecord
    identity: Identity | None
    """None: its policy is not known here, so nothing is allowed."""

    def holds(self, policy: Policy | None) -> bool:
        return self.identity is not None and self.identity.policy is policy


NO_HASH = "0" * 64
_NOBODY = _Known(KeyRecord(id=KeyId(""), secret_sha256=NO_HASH, role="viewer"), None)
"""Compared with where a secret is not known."""


class Authenticator:
    """Turns a `Caller` into an `Identity`.

    Without `require_key`, a caller at this machine needs no key and acts as the role
    `local`. A credential that is not one of our keys (the placeholder that OpenAI clients
    insist on sending) counts as none; a key of ours that is wrong is always refused.
    """

    def __init__(self, keys: Iterable[KeyRecord], *, require_key: bool, wall: Callable[[], float]) -> None:
        self._own = {key.id: key for key in keys}
        self._shared: Mapping[KeyId, KeyRecord] = {}
        self._holding = Holding({})
        self._require_key = require_key
        self._wall = wall
        self._uses: dict[KeyId, float] = {}
        self._known: dict[KeyId, _Known] = {}
        self._by_secret: dict[str, _Known] = {}
        """SHA-256 of a secret, or of the one before it -> whose it is."""
        self._people: People | None = None
        self._bound: dict[str, tuple[UserRecord, Identity]] = {}
        """Identities of persons, each with the record that it was made of."""
        self._local = Identity(role="local")
        self._bind()

    @property
    def own(self) -> tuple[KeyRecord, ...]:
        """The keys that this node was made with."""
        return tuple(self._own.values())

    def share(self, keys: Mapping[KeyId, KeyRecord], policies: Mapping[str, Policy] | None = None) -> None:
        """Know these keys and policies of the cluster, in place of those shared before, beside this
        node's own keys. What the cluster says of a key counts more."""
        self._shared = keys
        self._holding = Holding(policies or {})
        self._bind()

    def know(self, people: People) -> None:
        """Know those who signed in, too."""
        self._people = people

    def bound(self, role: Role, team: str, *, user: str = "", policy: str = "") -> Identity:
        """The identity of somebody who was known otherwise than by a key.

        Raises:
            Forbidden: a policy is named that is not known here.
        """
        held = self._holding.of(role, team, policy)
        return Identity(role=role, team=team, user=user, policy=held)

    def one_tenant(self) -> bool:
        """Whether all who may ask share what runners keep of prompts: are of one team, or one group."""
        now = self._wall()
        keys = (one.identity for one in self._known.values() if is_good(one.record, now))
        people = self._people.users.values() if self._people is not None else ()
        asking = (self._local, *filter(None, keys), *(self.bound(one.role, one.team) for one in people))
        return len({identity.tenant for identity in asking}) == 1

    def used(self) -> Mapping[KeyId, float]:
        """When each key was last used here, seconds since the Unix epoch; only grows."""
        return self._uses

    def _bind(self) -> None:
        known = {id_: self._held(record) for id_, record in {**self._own, **self._shared}.items()}
        self._known = known
        self._by_secret = {one.record.old_sha256: one for one in known.values() if one.record.old_sha256}
        self._by_secret |= {one.record.secret_sha256: one for one in known.values()}
        self._local = self.bound("local", "default")
        self._bound.clear()
        for id_ in self._uses.keys() - known.keys():
            del self._uses[id_]

    def _held(self, record: KeyRecord) -> _Known:
        try:
            policy = self._holding.of(record.role, record.team, record.policy)
        except Forbidden:
            return _Known(record, None)
        before = self._known.get(record.id)
        if before is not None and before.record is record and before.holds(policy):
            return before  # ten thousand keys are not made anew for one that changed
        return _Known(record, Identity(role=record.role, key_id=record.id, team=record.team, policy=policy))

    def identify(self, caller: Caller) -> Identity:
        """Raises `Unauthenticated`; the message never tells which part was wrong. `Forbidden`: the key
        is good, and its policy is not known here."""
        if caller.credential.startswith(PREFIX):
            return self._by_key(caller.credential)
        if self._people is not None:
            if caller.credential.startswith(SESSION_PREFIX):
                return self._person(self._people.by_session(caller.credential))
            if looks_like_token(caller.credential):
                return self._by_token(self._people.by_token(caller.credential))
        if caller.at_this_machine and not self._require_key:
            return self._local
        raise Unauthenticated(
            "an API key or a sign-in is needed: send it as 'Authorization: Bearer odk_…' (or ods_…, or a JWT)"
        )

    def _by_token(self, held: UserRecord | KeyId) -> Identity:
        """Whom a token of ours stands for: a person, or a key that is still good."""
        if isinstance(held, UserRecord):
            return self._person(held)
        known = self._known.get(held)
        if known is None or known.identity is None or not is_good(known.record, self._wall()):
            raise Unauthenticated("the key that this token was made from is not valid any more")
        return known.identity

    def _person(self, user: UserRecord) -> Identity:
        made = self._bound.get(user.name)
        if made is not None and made[0] is user:
            return made[1]
        identity = self.bound(user.role, user.team, user=user.name)
        self._bound[user.name] = (user, identity)
        return identity

    def _by_key(self, text: str) -> Identity:
        """Found by the secret's hash, not by the id: for who has no secret of ours, an id that exists
        and one that does not are one and the same miss, in the same steps (S-12)."""
        key = parse_key(text)
        if key is None:
            raise Unauthenticated(NOT_VALID)
        sent, now = key.secret_sha256, self._wall()
        known = self._by_secret.get(sent, _NOBODY)
        record = known.record
        latest = compare_digest(sent, record.secret_sha256)
        old = compare_digest(sent, record.old_sha256 or NO_HASH) & (now < record.old_until)
        # Without `and` and `or`, which would leave off at the first that fails.
        if not ((key.id == record.id) & (latest | old) & is_good(record, now)):
            raise Unauthenticated(NOT_VALID)
        if not is_well_formed(text):  # asked last, of who has the secret: a typing error elsewhere
            raise Unauthenticated(NOT_VALID)
        if known.identity is None:
            raise Forbidden(f"the policy {record.policy!r} of this key is not known here")
        self._uses[record.id] = now
        return known.identity

    def vouch(self, identity: Identity) -> Identity:
        """The same identity as this node knows it; for one that another node tells of.

        Raises:
            Forbidden: there is no such key, it is no longer good, or it is another's.
        """
        if identity.user:
            return self._vouched_person(identity)
        if identity.key_id is None:
            return identity
        known = self._known.get(identity.key_id)
        if (
            known is None
            or known.identity is None
            or not is_good(known.record, self._wall())
            or (known.record.role, known.record.team) != (identity.role, identity.team)
        ):
            raise Forbidden("the key that this request is for is not good here")
        return known.identity

    def told(self, identity: Identity) -> Identity:
        """Whom a request of another node is for, as this node knows it. A key that only the other node
        has (in its own `admin.json`, or just made) counts as nobody's in particular, and so does a person
        of whom this node has not heard yet.

        Raises:
            Forbidden: as `vouch`, for a key or person that is known here.
        """
        if identity.user:
            if self._people is None or identity.user not in self._people.users:
                return self._stranger(identity)
            return self._vouched_person(identity)
        if identity.key_id is None:
            return self._local
        if identity.key_id in self._known:
            return self.vouch(identity)
        return self._stranger(identity)

    def _stranger(self, identity: Identity) -> Identity:
        policy = self._local.policy
        if identity.team != self._local.team:
            # It may be just made: the team is not believed, but nobody else's cache gets its prompts.
            alone = f"of {identity.key_id or identity.user}"  # with a space, as no group's name has
            policy = msgspec.structs.replace(policy or Policy(name="local"), cache_group=alone)
        return Identity(role="local", key_id=identity.key_id, user=identity.user, policy=policy)

    def _vouched_person(self, identity: Identity) -> Identity:
        user = self._people.users.get(identity.user) if self._people is not None else None
        if user is None or user.disabled:
            raise Forbidden("the person whom this request is for is not known here")
        return self._person(user)  # with the role of now, whatever it was there


def is_good(record: KeyRecord, now: float) -> bool:
    """Neither revoked nor expired."""
    return record.revoked_at is None and (record.expires_at is None or now < record.expires_at)
