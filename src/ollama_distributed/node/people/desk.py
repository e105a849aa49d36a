"""Changes people, on a server of the cluster: sign-in, sessions, tokens, users.

Decides and proves; `book.py` writes.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
from collections.abc import Awaitable, Callable
from functools import partial
from typing import assert_never

import msgspec
import structlog

from ollama_distributed.access import tokens
from ollama_distributed.access.passwords import Passwords
from ollama_distributed.access.people import (
    PREFIX,
    People,
    SessionRecord,
    UserRecord,
    check_name,
    check_team,
    is_current,
    make_session,
    renew,
    session_id,
)
from ollama_distributed.access.roles import Right, demand
from ollama_distributed.access.service import Authenticator, Caller
from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import (
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    Unauthenticated,
)
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import random_id
from ollama_distributed.cluster.ports import Coordination
from ollama_distributed.node.people import ops
from ollama_distributed.node.people.book import Book, no_user
from ollama_distributed.node.people.mirror import SharedPeople
from ollama_distributed.node.people.ports import Person, Provider
from ollama_distributed.node.people.proof import Proof
from ollama_distributed.node.people.signers import Signers

log = structlog.get_logger("cluster.people")

MAX_SESSIONS = 32
"""Of one user; the one that was quiet longest makes room."""
ADMINISTRATION = Right("admin", "users")


class Desk:
    def __init__(
        self,
        shared: SharedPeople,
        signers: Signers,
        authenticator: Authenticator,
        clock: Clock,
        coordination: Callable[[], Awaitable[Coordination]],
        *,
        passwords: Passwords | None = None,
        provider: Provider | None = None,
    ) -> None:
        """`coordination`: raises `Unavailable` while there is none."""
        self._people: People = shared.people
        self._signers = signers
        self._authenticator = authenticator
        self._clock = clock
        self._book = Book(shared, clock, coordination)
        self._passwords = passwords or Passwords()
        self._proof = Proof(self._passwords, clock)
        self._provider = provider

    async def do(self, op: ops.Op) -> ops.Done:
        """
        Raises:
            Unauthenticated, Forbidden, TooManyAttempts, NotFound, Conflict, Invalid,
            Unavailable
        """
        match op:
            case ops.SignIn():
                return await self._sign_in(op)
            case ops.Redeem():
                return await self._redeem(op)
            case ops.OidcName():
                return ops.Done(token=self.oidc_name)
            case ops.OidcStart():
                return ops.Done(
                    token=await self._need_provider().start(
                        redirect_uri=op.redirect_uri, state=op.state, nonce=op.nonce, challenge=op.challenge
                    )
                )
            case ops.OidcFinish():
                return await self._oidc_finish(op)
            case ops.SignOut():
                return await self._sign_out(op)
            case ops.Renew():
                return await self._renew(op)
            case ops.Exchange():
                return self._exchange(op)
            case ops.Touch():
                return await self._touch(op)
            case ops.ChangeOwnPassword():
                return await self._change_own_password(op)
            case ops.CreateUser():
                return await self._create(op)
            case ops.ChangeUser():
                return await self._change(op)
            case ops.SetPassword():
                who = self._admin(op.credential)
                return await self._put_password(op.name, op.ask.password, by=who)
            case ops.DeleteUser():
                return await self._delete(op)
            case ops.EndSessions():
                return await self._end_all(op)
            case _:
                assert_never(op)

    # ── signing in ──────────────────────────────────────────────────────────────────

    async def _sign_in(self, op: ops.SignIn) -> ops.Done:
        await self._book.available()  # without it no session can be made, whatever the password
        known = self._people.users.get(op.name)
        usable = known if known is not None and not known.disabled and known.password else None
        await self._proof.proved(op.name[:128], op.password, usable.password if usable else "", op.address)
        assert usable is not None, "nobody has no password"
        if self._passwords.outdated(usable.password):
            hashed = await self._passwords.hash(op.password)
            usable = await self._book.change_user(
                op.name, lambda user: msgspec.structs.replace(user, password=hashed)
            )
        return await self._begin(usable, address=op.address, agent=op.agent, how="password")

    async def _begin(
        self, user: UserRecord, *, address: str, agent: str, how: str, session: str = ""
    ) -> ops.Done:
        token, record = make_session(
            user, now=self._clock.time(), address=address, agent=agent, session_id=session
        )
        await self._book.begin(record)
        held = sorted(self._people.sessions_of(user.name), key=lambda one: one.seen_at)
        for old in held[: max(len(held) - MAX_SESSIONS, 0)]:
            await self._book.end(old.id)
        log.info("people.signed_in", user=user.name, session=record.id, address=address, how=how)
        return ops.Done(user=user, session=record, token=token)

    @property
    def oidc_name(self) -> str:
        """Of the provider in this node's own settings."""
        return self._provider.name if self._provider is not None else ""

    def _need_provider(self) -> Provider:
        if self._provider is None:
            raise NotFound("no OIDC provider is configured on this server (the setting `oidc`)")
        return self._provider

    async def _oidc_finish(self, op: ops.OidcFinish) -> ops.Done:
        provider = self._need_provider()
        person = await self._proof.vouched(
            lambda: provider.finish(
                code=op.code, redirect_uri=op.redirect_uri, nonce=op.nonce, verifier=op.verifier
            ),
            op.address,
        )
        user = await self._vouched(person)
        if not op.program_challenge:
            return await self._begin(user, address=op.address, agent=op.agent, how="oidc")
        code = self._signed(
            f"user:{user.name}",
            version=user.version,
            challenge=op.program_challenge,
            lifetime_s=tokens.CODE_LIFETIME_S,
            type_=tokens.CODE_TYPE,
        )
        return ops.Done(user=user, token=code)

    async def _vouched(self, person: Person) -> UserRecord:
        """The provider's user here: made at the first sign-in, role and team as they are now."""
        known = self._people.users.get(check_name(person.name))
        if known is None:
            made = UserRecord(
                name=person.name,
                role=person.role,
                team=check_team(person.team),
                subject=person.subject,
                version=self._book.new_version(),
                created_at=self._clock.time(),
                created_by="oidc",
            )
            return await self._book.add_user(made)
        if known.subject != person.subject:
            raise Forbidden(
                f"the name {person.name} belongs to somebody else here; an administrator can delete that user"
            )
        if known.disabled:
            raise Forbidden("this user is locked; ask an administrator")
        if (known.role, known.team) == (person.role, person.team):
            return known
        return await self._book.change_user(
            person.name, lambda user: msgspec.structs.replace(user, role=person.role, team=person.team)
        )

    async def _redeem(self, op: ops.Redeem) -> ops.Done:
        claims = self._people.claims_of(op.code, type_=tokens.CODE_TYPE)
        digest = hashlib.sha256(op.verifier.encode()).digest()
        challenge = base64.urlsafe_b64encode(digest).rstrip(b"=").decode("ascii")
        user = self._people.users.get(claims.sub.removeprefix("user:"))
        if (
            not hmac.compare_digest(challenge.encode(), claims.cch.encode())
            or self._clock.time() >= claims.exp
            or user is None
            or user.disabled
            or user.version != claims.ver
        ):
            raise Unauthenticated("the code does not hold (any more); sign in again")
        try:
            # The session takes the code's own id, so the same code makes no second one.
            return await self._begin(user, address=op.address, agent=op.agent, how="oidc", session=claims.jti)
        except Conflict:
            log.warning("people.code_used_twice", user=user.name, session=claims.jti, alarm=True)
            await self._book.end(claims.jti)
            raise Unauthenticated("the code was used already; sign in again") from None

    # ── sessions and tokens ─────────────────────────────────────────────────────────

    def _who(self, credential: str) -> Identity:
        return self._authenticator.identify(Caller(credential, at_this_machine=False))

    def _admin(self, credential: str) -> str:
        """Who administrates users, for the record.

        Raises:
            Unauthenticated, Forbidden
        """
        who = self._who(credential)
        demand(who, ADMINISTRATION)
        return who.user or who.key_id or who.role

    async def _sign_out(self, op: ops.SignOut) -> ops.Done:
        own = session_id(op.credential) if op.credential.startswith(PREFIX) else None
        wanted = op.session or own
        if wanted is None:
            raise Invalid("only a session can sign out; a key is revoked, and a token ends by itself")
        known = self._people.sessions.get(wanted)
        who = self._who(op.credential)
        if known is None or known.user != who.user:
            try:
                demand(who, ADMINISTRATION)
            except Forbidden:
                known = None  # another's session is as if it did not exist
        if known is None:
            raise NotFound(f"there is no session {wanted[:40]!r}")
        await self._book.end(known.id)
        log.info("people.signed_out", user=known.user, session=known.id)
        return ops.Done(ended=(known.id,))

    async def _renew(self, op: ops.Renew) -> ops.Done:
        record, user = self._people.session_of(op.credential)
        token, renewed = renew(record, now=self._clock.time())
        kept = await self._book.change_session(record.id, lambda _: renewed)
        if kept is None:
            raise Unauthenticated("the session is over; sign in again")
        return ops.Done(user=user, session=kept, token=token)

    def _exchange(self, op: ops.Exchange) -> ops.Done:
        if tokens.looks_like_token(op.credential):
            raise Forbidden("a token cannot ask for the next one; do it with the session or key it came from")
        who = self._who(op.credential)
        if who.user:
            record, user = self._people.session_of(op.credential)
            token = self._signed(f"user:{user.name}", version=user.version, session=record.id)
        elif who.key_id is not None:
            token = self._signed(f"key:{who.key_id}")
        else:
            raise Invalid("send a key or a session: only these can be exchanged for a token")
        return ops.Done(token=token)

    def _signed(
        self,
        subject: str,
        *,
        version: int = 0,
        session: str = "",
        challenge: str = "",
        lifetime_s: int = tokens.LIFETIME_S,
        type_: str = tokens.TYPE,
    ) -> str:
        now = int(self._clock.time())
        claims = tokens.Claims(
            iss=self._people.issuer,
            aud=tokens.AUDIENCE,
            sub=subject,
            iat=now,
            nbf=now,
            exp=now + lifetime_s,
            jti=random_id(16),
            ver=version,
            sid=session,
            cch=challenge,
        )
        return self._signers.sign(claims, type_=type_)

    async def _touch(self, op: ops.Touch) -> ops.Done:
        now = self._clock.time()
        for name, at in op.seen.items():
            if name in self._people.sessions:
                with contextlib.suppress(Conflict):  # it was renewed or ended meanwhile
                    await self._book.change_session(name, partial(_seen, at=min(at, now)))
        return ops.Done()

    async def forget_old(self) -> None:
        """Delete sessions that are over."""
        now = self._clock.time()
        for record in list(self._people.sessions.values()):
            user = self._people.users.get(record.user)
            if user is None or user.version != record.version or not is_current(record, now):
                await self._book.end(record.id)

    # ── users ───────────────────────────────────────────────────────────────────────

    async def _create(self, op: ops.CreateUser) -> ops.Done:
        who, ask = self._admin(op.credential), op.ask
        user = UserRecord(
            name=check_name(ask.name),
            role=ask.role,
            team=check_team(ask.team),
            password=await self._passwords.hash(ask.password),
            version=self._book.new_version(),
            created_at=self._clock.time(),
            created_by=who,
        )
        made = await self._book.add_user(user)
        log.info("people.user_made", user=made.name, role=made.role, team=made.team, by=who)
        return ops.Done(user=made)

    async def _change(self, op: ops.ChangeUser) -> ops.Done:
        who, ask = self._admin(op.credential), op.ask
        given = {name: value for name, value in msgspec.structs.asdict(ask).items() if value is not None}
        if ask.team is not None:
            check_team(ask.team)
        if ask.disabled:
            given["version"] = self._book.new_version()
        user = await self._book.change_user(op.name, lambda user: msgspec.structs.replace(user, **given))
        ended = await self._book.end_all(op.name) if ask.disabled else ()
        log.info("people.user_changed", user=op.name, by=who, **given)
        return ops.Done(user=user, ended=ended)

    async def _change_own_password(self, op: ops.ChangeOwnPassword) -> ops.Done:
        who = self._who(op.credential)
        user = self._people.users.get(who.user)
        if user is None or not user.password:
            raise Invalid("only a user who signs in by password has one to change")
        await self._proof.proved(user.name, op.ask.current, user.password, op.address)
        return await self._put_password(user.name, op.ask.password, by=user.name)

    async def _put_password(self, name: str, password: str, *, by: str) -> ops.Done:
        known = self._people.users.get(name)
        if known is not None and known.subject:
            raise Invalid(f"{name} signs in by OIDC and has no password here")
        hashed, version = await self._passwords.hash(password), self._book.new_version()
        user = await self._book.change_user(
            name, lambda user: msgspec.structs.replace(user, password=hashed, version=version)
        )
        ended = await self._book.end_all(name)
        log.info("people.password_changed", user=name, by=by)
        return ops.Done(user=user, ended=ended)

    async def _delete(self, op: ops.DeleteUser) -> ops.Done:
        who = self._admin(op.credential)
        await self._book.delete_user(op.name)
        ended = await self._book.end_all(op.name)
        log.info("people.user_deleted", user=op.name, by=who)
        return ops.Done(deleted=op.name, ended=ended)

    async def _end_all(self, op: ops.EndSessions) -> ops.Done:
        who = self._admin(op.credential)
        if op.name not in self._people.users:
            raise no_user(op.name)
        version = self._book.new_version()  # ends the tokens too that were made for them
        user = await self._book.change_user(
            op.name, lambda user: msgspec.structs.replace(user, version=version)
        )
        ended = await self._book.end_all(op.name)
        log.info("people.sessions_ended", user=op.name, by=who, sessions=len(ended))
        return ops.Done(user=user, ended=ended)


def _seen(session: SessionRecord, at: float) -> SessionRecord:
    return msgspec.structs.replace(session, seen_at=max(session.seen_at, at))
