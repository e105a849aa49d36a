"""People as the gateway's routes ask for them (`gateway.people_port.People`).

Reads answer from this node's memory. Changes are made by a server: this node, or one that it asks
over the hop, sending along what the person sent to prove itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import structlog

from ollama_distributed.access import tokens
from ollama_distributed.access.people import IDLE_S, PREFIX, UserRecord, session_id
from ollama_distributed.adapters.peers.door import PeerDoor
from ollama_distributed.adapters.peers.pool import PeerPool
from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import DeadlineExceeded, NotFound, OllamaDistributedError, Unavailable
from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.users import NewUserAsk, PasswordAsk, SessionRow, UserAsk, UserRow
from ollama_distributed.cluster.identity.ca import Peer
from ollama_distributed.gateway.people_port import SignedIn, Visitor
from ollama_distributed.node.people import ops
from ollama_distributed.node.people.desk import Desk
from ollama_distributed.node.people.mirror import SESSIONS, SharedPeople
from ollama_distributed.node.people.signers import Signers

if TYPE_CHECKING:
    from ollama_distributed.node.cluster.keeper import Keeper
    from ollama_distributed.node.cluster.life import Life

log = structlog.get_logger("cluster.people")

ROUTE = "people/ask"
ASK_S = 20.0
"""A password is hashed there, behind others; or an OIDC provider is asked."""
LOOK_S, LOOKS = 5.0, 12
"""Between two steps."""
NAME_WAIT_S, NAME_AGAIN_S, NAME_HOLDS_S = 2.0, 5.0, 60.0
"""A page waits so long for the provider's name; it is asked for again so soon after it did not come, and
after it came: no flood of pages is a flood of questions."""
UNTOUCHED_S = IDLE_S / 10
"""What is known of when a session was last used may be so old in the state."""
TIDY_EVERY = 10
"""Steps."""


class PeopleService:
    """Implements `gateway.people_port.People`."""

    def __init__(
        self,
        shared: SharedPeople,
        desk: Desk,
        signers: Signers,
        keeper: Keeper,
        *,
        pool: PeerPool,
        door: PeerDoor,
        clock: Clock,
    ) -> None:
        self._shared = shared
        self._people = shared.people
        self._desk = desk
        self._signers = signers
        self._keeper = keeper
        self._pool = pool
        self._clock = clock
        self._steps = 0
        self._provider_name = ""
        self._name_until = 0.0
        door.add(ROUTE, self._asked, ops.Ask)

    @property
    def idle_s(self) -> float:
        return IDLE_S

    # ── reading ─────────────────────────────────────────────────────────────────────

    def users(self) -> list[UserRow]:
        return [self._row(user) for _, user in sorted(self._people.users.items())]

    def user(self, name: str) -> UserRow:
        user = self._people.users.get(name)
        if user is None:
            raise NotFound(f"there is no user {name[:80]!r}")
        return self._row(user)

    def _row(self, user: UserRecord) -> UserRow:
        return user.row(len(self._people.sessions_of(user.name)))

    def sessions(self, name: str) -> list[SessionRow]:
        return [
            SessionRow(
                id=one.id,
                user=one.user,
                created_at=one.created_at,
                seen_at=max(one.seen_at, self._people.seen.get(one.id, 0.0)),
                expires_at=one.expires_at,
                address=one.address,
                agent=one.agent,
            )
            for one in self._people.sessions_of(name)
        ]

    def session_of(self, credential: str) -> str:
        if credential.startswith(PREFIX):
            return session_id(credential) or ""
        if tokens.looks_like_token(credential):
            return self._people.claims_of(credential).sid
        return ""

    def jwks(self) -> Sequence[Mapping[str, Any]]:
        return self._people.jwks()

    # ── signing in ──────────────────────────────────────────────────────────────────

    async def sign_in(self, name: str, password: str, visitor: Visitor) -> SignedIn:
        op = ops.SignIn(name=name, password=password, address=visitor.address, agent=visitor.agent)
        return _signed_in(await self._do(op))

    async def redeem(self, code: str, verifier: str, visitor: Visitor) -> SignedIn:
        op = ops.Redeem(code=code, verifier=verifier, address=visitor.address, agent=visitor.agent)
        return _signed_in(await self._do(op))

    async def sign_out(self, credential: str, session: str = "") -> None:
        await self._do(ops.SignOut(credential=credential, session=session))

    async def renew(self, credential: str) -> SignedIn:
        return _signed_in(await self._do(ops.Renew(credential=credential)))

    async def exchange(self, credential: str) -> tuple[str, int]:
        done = await self._do(ops.Exchange(credential=credential))
        return done.token, tokens.LIFETIME_S

    async def change_own_password(self, credential: str, ask: PasswordAsk, visitor: Visitor) -> None:
        await self._do(ops.ChangeOwnPassword(credential=credential, ask=ask, address=visitor.address))

    async def oidc_name(self) -> str:
        if own := self._desk.oidc_name:
            return own
        now = self._clock.monotonic()
        if now >= self._name_until:
            self._name_until = now + NAME_AGAIN_S
            try:
                with anyio.move_on_after(NAME_WAIT_S):
                    self._provider_name = (await self._do(ops.OidcName())).token
                    self._name_until = now + NAME_HOLDS_S
            except OllamaDistributedError as failure:  # the page offers passwords all the same
                log.debug("people.provider_unknown", reason=failure.code)
        return self._provider_name

    async def oidc_start(self, *, redirect_uri: str, state: str, nonce: str, challenge: str) -> str:
        op = ops.OidcStart(redirect_uri=redirect_uri, state=state, nonce=nonce, challenge=challenge)
        return (await self._do(op)).token

    async def oidc_finish(
        self, *, code: str, redirect_uri: str, nonce: str, verifier: str, visitor: Visitor
    ) -> SignedIn:
        op = ops.OidcFinish(
            code=code,
            redirect_uri=redirect_uri,
            nonce=nonce,
            verifier=verifier,
            address=visitor.address,
            agent=visitor.agent,
        )
        return _signed_in(await self._do(op))

    async def oidc_finish_for_program(
        self,
        *,
        code: str,
        redirect_uri: str,
        nonce: str,
        verifier: str,
        challenge: str,
        visitor: Visitor,
    ) -> str:
        op = ops.OidcFinish(
            code=code,
            redirect_uri=redirect_uri,
            nonce=nonce,
            verifier=verifier,
            address=visitor.address,
            program_challenge=challenge,
        )
        return (await self._do(op)).token

    # ── users ───────────────────────────────────────────────────────────────────────

    async def create(self, credential: str, ask: NewUserAsk) -> UserRow:
        return self._changed(await self._do(ops.CreateUser(credential=credential, ask=ask)))

    async def change(self, credential: str, name: str, ask: UserAsk) -> UserRow:
        return self._changed(await self._do(ops.ChangeUser(credential=credential, name=name, ask=ask)))

    async def set_password(self, credential: str, name: str, ask: PasswordAsk) -> UserRow:
        return self._changed(await self._do(ops.SetPassword(credential=credential, name=name, ask=ask)))

    async def delete(self, credential: str, name: str) -> None:
        await self._do(ops.DeleteUser(credential=credential, name=name))

    async def end_sessions(self, credential: str, name: str) -> int:
        return len((await self._do(ops.EndSessions(credential=credential, name=name))).ended)

    def _changed(self, done: ops.Done) -> UserRow:
        assert done.user is not None
        return self._row(done.user)

    # ── here, or at a server ────────────────────────────────────────────────────────

    async def _do(self, op: ops.Op) -> ops.Done:
        life, _ = await self._keeper.linked()
        if life.is_server:
            return await self._desk.do(op)
        failure: OllamaDistributedError = Unavailable("no server of the cluster can be reached from here")
        for server in self._servers():
            try:
                done = await self._pool.ask(server, ROUTE, ops.Ask(op), ops.Done, deadline_s=ASK_S)
            except (Unavailable, DeadlineExceeded) as away:
                failure = away
                continue
            self._learn(done)
            return done
        raise failure

    def _servers(self) -> list[NodeId]:
        state = self._keeper.state
        living = [node for node in state.servers if (known := state.nodes.get(node)) and known.alive]
        return living or list(state.servers)

    def _learn(self, done: ops.Done) -> None:
        """What the server has just written, before the state brings it."""
        if done.user is not None:
            self._people.users[done.user.name] = done.user
        if done.session is not None:
            self._shared.learn(SESSIONS + done.session.id, msgspec.json.encode(done.session))
        for session in done.ended:
            self._shared.forget(SESSIONS + session)
        if done.deleted:
            self._people.users.pop(done.deleted, None)

    async def _asked(self, peer: Peer, ask: ops.Ask) -> ops.Done:
        life, _ = await self._keeper.linked()
        life.need_server()
        log.debug("people.asked", by=peer.node, kind=type(ask.op).__name__)
        done = await self._desk.do(ask.op)
        if done.user is not None:  # a node without a vote has no use for hashes
            done = msgspec.structs.replace(done, user=msgspec.structs.replace(done.user, password=""))
        return done

    # ── what is repeated ────────────────────────────────────────────────────────────

    async def step(self) -> None:
        """To be repeated: tell which sessions were used; on servers, have keys for tokens and forget
        sessions that are over."""
        life, link = await self._keeper.linked()
        await link.mirror.wait_ready()
        if life.is_server:
            await self._signers.step(link.coordination, cluster=life.identity.cluster, now=self._clock.time())
            if self._steps % TIDY_EVERY == 0:
                await self._desk.forget_old()
        self._steps += 1
        people = self._people
        used = {
            name: at
            for name, at in people.seen.items()
            if (known := people.sessions.get(name)) and at - known.seen_at >= UNTOUCHED_S
        }
        if used:
            await self._do(ops.Touch(seen=used))
        for name in [name for name in people.seen if name not in people.sessions]:
            del people.seen[name]
        await self._rest(life)

    async def _rest(self, life: Life) -> None:
        """Until the next step; in another cluster it comes soon, for there are other keys to be had."""
        for _ in range(LOOKS):
            if self._keeper.life is not life:
                break
            await anyio.sleep(LOOK_S)


def _signed_in(done: ops.Done) -> SignedIn:
    assert done.user is not None
    assert done.session is not None
    return SignedIn(
        user=done.user.row(),
        session=done.session.id,
        token=done.token,
        expires_at=done.session.expires_at,
        idle_s=IDLE_S,
    )
