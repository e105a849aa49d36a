"""Users, their sessions and the keys that sign tokens: the records, and who a credential is.

Every node has all of them in memory (`node/cluster/people.py` follows the state), so whoever is
signed in is known everywhere, and a user who is locked is out as soon as the record arrives.
Nothing here waits, for a disk, for the network or for consensus.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from ollama_distributed.access import tokens
from ollama_distributed.base.errors import Invalid, Unauthenticated
from ollama_distributed.base.ids import KeyId, NodeId, random_id
from ollama_distributed.base.users import UserRole, UserRow

PREFIX = "ods_"
IDLE_S = 12 * 3600.0
"""A session that is not used for so long ends: a working day."""
ABSOLUTE_S = 7 * 86_400.0
"""Every session ends after so long."""
REPLACED_S = 60.0
"""A token that was renewed still holds so long: requests that were under way."""
SESSION_ID_CHARS = 16
_FORM = re.compile(rf"ods_([0-9a-z]{{{SESSION_ID_CHARS}}})_([0-9A-Za-z_-]{{43}})", re.ASCII)
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._@+-]{0,62}[a-z0-9])?", re.ASCII)
_TEAM = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62})", re.ASCII)
_NO_HASH = "0" * 64
_REFUSED = "the session is not valid any more; sign in again"
VERIFIED_MOST = 4096
"""Tokens whose signature was checked; a check takes 0.1 ms, which is paid once each."""


class UserRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A person. What may have changed since a session or token was made has another `version`."""

    name: str
    role: UserRole
    team: str = "default"
    password: str = ""
    """argon2id in PHC form; empty: signs in by OIDC only."""
    subject: str = ""
    """`issuer|sub` of the OIDC provider; empty: signs in by password."""
    disabled: bool = False
    version: int = 1
    """Counts what ends sessions and tokens: a password, a lock."""
    created_at: float = 0.0
    created_by: str = ""

    def row(self, sessions: int = 0) -> UserRow:
        return UserRow(
            name=self.name,
            role=self.role,
            team=self.team,
            disabled=self.disabled,
            source="oidc" if self.subject else "password",
            created_at=self.created_at,
            created_by=self.created_by,
            sessions=sessions,
        )

    def __repr__(self) -> str:
        return f"UserRecord({self.name}, {self.role})"


class SessionRecord(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    user: str
    version: int
    """The user's, when it began."""
    secret_sha256: str
    replaced_sha256: str = ""
    """Of the secret before, until `replaced_until`."""
    replaced_until: float = 0.0
    created_at: float
    seen_at: float
    """To about a tenth of the idle time."""
    expires_at: float
    address: str = ""
    agent: str = ""


class SignerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The public half of a key that signs tokens; the other never leaves its server."""

    kid: str
    node: NodeId
    public: str
    """Base64."""
    signs_until: float
    trusted_until: float
    """Past the end of the last token that it may have signed."""


def check_name(name: str) -> str:
    """
    Raises:
        Invalid: it is none.
    """
    if not _NAME.fullmatch(name):
        raise Invalid(
            "a user's name has 1 to 64 of a-z, 0-9 and . _ @ + -, and begins and ends with a letter or digit",
            param="name",
        )
    return name


def check_team(team: str) -> str:
    """
    Raises:
        Invalid: it is none.
    """
    if not _TEAM.fullmatch(team):
        raise Invalid("a team's name has 1 to 63 of a-z, 0-9 and . _ -", param="team")
    return team


def user_key(name: str) -> str:
    """Part of the record's key: names hold characters that keys may not."""
    return hashlib.sha256(name.encode()).hexdigest()[:32]


# ── sessions ────────────────────────────────────────────────────────────────────────


def make_secret() -> str:
    """256 random bits, 43 characters."""
    return secrets.token_urlsafe(32)


def hash_secret(secret: str) -> str:
    """Of a random secret: no slow hash is needed."""
    return hashlib.sha256(secret.encode("ascii")).hexdigest()


def make_session(
    user: UserRecord, *, now: float, address: str, agent: str, session_id: str = ""
) -> tuple[str, SessionRecord]:
    """A new session: its token, to be shown once, and the record to keep."""
    secret = make_secret()
    record = SessionRecord(
        id=session_id or random_id(SESSION_ID_CHARS),
        user=user.name,
        version=user.version,
        secret_sha256=hash_secret(secret),
        created_at=now,
        seen_at=now,
        expires_at=now + ABSOLUTE_S,
        address=address[:64],
        agent="".join(filter(str.isprintable, agent))[:120],
    )
    return f"{PREFIX}{record.id}_{secret}", record


def renew(record: SessionRecord, *, now: float) -> tuple[str, SessionRecord]:
    """Another token for the same session; it ends when it would have ended."""
    secret = make_secret()
    renewed = msgspec.structs.replace(
        record,
        secret_sha256=hash_secret(secret),
        replaced_sha256=record.secret_sha256,
        replaced_until=now + REPLACED_S,
        seen_at=now,
    )
    return f"{PREFIX}{record.id}_{secret}", renewed


def csrf_of(token: str) -> str:
    """What a page must send beside the session's cookie to change something. It follows from the
    session, so nothing is kept, and another session's does not fit."""
    digest = hmac.digest(token.encode(), b"csrf", "sha256")
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode("ascii")


def session_id(token: str) -> str | None:
    """Of a well-formed session token."""
    match = _FORM.fullmatch(token)
    return match[1] if match else None


def is_current(record: SessionRecord, now: float) -> bool:
    return now < record.expires_at and now < record.seen_at + IDLE_S


# ── who a credential is ─────────────────────────────────────────────────────────────


class People:
    """What this node knows of users, sessions and signers now; the maps are replaced as a whole or
    changed in place by who follows the state."""

    def __init__(self, *, wall: Callable[[], float]) -> None:
        self.users: dict[str, UserRecord] = {}
        self.sessions: dict[str, SessionRecord] = {}
        self.signers: dict[str, SignerRecord] = {}
        self.seen: dict[str, float] = {}
        """Sessions that were used, since it was last emptied, and when."""
        self.issuer = ""
        """Of this cluster; empty: not known yet, and no token holds."""
        self.removed: Callable[[NodeId], bool] = lambda _: False
        self._wall = wall
        self._verified: OrderedDict[str, tuple[str, tokens.Claims]] = OrderedDict()

    def by_session(self, token: str) -> UserRecord:
        """
        Raises:
            Unauthenticated
        """
        record, user = self.session_of(token)
        self.seen[record.id] = self._wall()
        return user

    def session_of(self, token: str) -> tuple[SessionRecord, UserRecord]:
        """A session that holds, and whose it is.

        Raises:
            Unauthenticated
        """
        match = _FORM.fullmatch(token)
        record = self.sessions.get(match[1]) if match else None
        now = self._wall()
        given = hash_secret(match[2]) if match else _NO_HASH
        proved = hmac.compare_digest(given, record.secret_sha256 if record else "1" * 64)
        if record is not None and not proved and now < record.replaced_until:
            proved = hmac.compare_digest(given, record.replaced_sha256)
        if record is None or not proved:
            raise Unauthenticated(_REFUSED)
        return record, self._user_of(record, now)

    def _user_of(self, record: SessionRecord, now: float) -> UserRecord:
        user = self.users.get(record.user)
        last = max(record.seen_at, self.seen.get(record.id, 0.0))
        idle = now >= last + IDLE_S
        if user is None or user.disabled or user.version != record.version:
            raise Unauthenticated(_REFUSED)
        if idle or now >= record.expires_at:
            raise Unauthenticated("the session is over; sign in again")
        return user

    def by_token(self, token: str) -> UserRecord | KeyId:
        """Who a JWT of ours stands for; whether a key still holds is not known here.

        Raises:
            Unauthenticated
        """
        claims = self.claims_of(token)
        kind, _, name = claims.sub.partition(":")
        if kind == "key":
            return KeyId(name)
        user = self.users.get(name) if kind == "user" else None
        if user is None or user.disabled or user.version != claims.ver:
            raise Unauthenticated("the token is not valid any more; sign in again")
        if claims.sid:
            session = self.sessions.get(claims.sid)
            if session is None or session.user != user.name:
                raise Unauthenticated("the token's session is over; sign in again")
        return user

    def claims_of(self, token: str, *, type_: str = tokens.TYPE) -> tokens.Claims:
        """
        Raises:
            Unauthenticated: it is none of this cluster's, or not of this time.
        """
        now = self._wall()
        known = self._verified.get(token) if type_ == tokens.TYPE else None
        kid = known[0] if known else tokens.kid_of(token, type_=type_)
        signer = self.signers.get(kid)
        if signer is None or now >= signer.trusted_until or not self.issuer or self.removed(signer.node):
            self._verified.pop(token, None)
            raise Unauthenticated("the token was not made by this cluster, or long ago; ask for a new one")
        if known is not None and now < known[1].exp + tokens.LEEWAY_S and known[1].iss == self.issuer:
            return known[1]
        public = Ed25519PublicKey.from_public_bytes(base64.b64decode(signer.public))
        claims = tokens.verify(token, public, issuer=self.issuer, now=now)
        if type_ == tokens.TYPE:
            self._verified[token] = (kid, claims)
            if len(self._verified) > VERIFIED_MOST:
                self._verified.popitem(last=False)
        return claims

    def sessions_of(self, name: str) -> list[SessionRecord]:
        """Those that hold, newest first."""
        now = self._wall()
        user = self.users.get(name)
        found = [
            one
            for one in self.sessions.values()
            if one.user == name and user is not None and one.version == user.version and is_current(one, now)
        ]
        return sorted(found, key=lambda one: -one.created_at)

    def replace(
        self,
        users: Iterable[UserRecord],
        sessions: Iterable[SessionRecord],
        signers: Iterable[SignerRecord],
    ) -> None:
        """Know these and no others."""
        self.users = {user.name: user for user in users}
        self.sessions = {session.id: session for session in sessions}
        self.signers = {signer.kid: signer for signer in signers}

    def jwks(self) -> list[Mapping[str, object]]:
        now = self._wall()
        return [
            tokens.public_jwk(Ed25519PublicKey.from_public_bytes(base64.b64decode(signer.public)), signer.kid)
            for signer in sorted(self.signers.values(), key=lambda one: one.kid)
            if now < signer.trusted_until and not self.removed(signer.node)
        ]
