"""Admits nodes by token, renews them by key, removes them. Runs on servers.

Every decision is a compare-and-set on a record: a token's use is stored before anything is
signed, so of any number of parallel joiners a one-use token admits one. A joiner whose answer
was lost asks again with the same key and gets it. Knows no HTTP.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable

import msgspec

from ollama_distributed.base.errors import (
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    QueueFull,
    Unauthenticated,
    Unavailable,
)
from ollama_distributed.base.ids import NodeId, NodeRole, random_id
from ollama_distributed.cluster.identity.ca import check_request, fingerprint, public_key_sha256
from ollama_distributed.cluster.identity.issuing import issue
from ollama_distributed.cluster.identity.names import check_label, check_node
from ollama_distributed.cluster.identity.nkeys import check_public
from ollama_distributed.cluster.identity.ports import Audit, AuditEvent, Records
from ollama_distributed.cluster.identity.roster import NODES, TOKENS, NodeRecord, removed
from ollama_distributed.cluster.identity.tokens import (
    TOKEN_LIFETIME_S,
    Attempt,
    Refusal,
    Refused,
    TokenRecord,
    judge,
    make_token,
)
from ollama_distributed.cluster.identity.tries import WrongTries
from ollama_distributed.cluster.identity.wire import (
    ClusterFacts,
    ClusterKeys,
    Credentials,
    JoinRequest,
    RenewRequest,
)
from ollama_distributed.cluster.ports import ABSENT

MAX_RACES = 128
"""Compare-and-sets lost in a row before the joiner is asked to come again; each lost one is
somebody else's success."""

_NOT_VALID = "the join token is not valid; make a new one with: ollama-distributed cluster token create"
_WHY: dict[Refusal, str] = {
    "unknown": _NOT_VALID,
    "wrong_secret": _NOT_VALID,
    "wrong_role": "the join token is for another role",
    "revoked": "the join token was revoked; make a new one",
    "not_yet_valid": "the join token is from the future: the server's clock was set back",
    "expired": "the join token has expired; make a new one with: ollama-distributed cluster token create",
    "used_up": "the join token was used already; make a new one, and look into who used it if it was not you",
}


class Admission:
    """The door of the cluster.

    `keys` and `facts` are asked each time: the CA rolls over and servers come and go.
    """

    def __init__(
        self,
        records: Records,
        *,
        keys: Callable[[], ClusterKeys],
        facts: Callable[[], ClusterFacts],
        audit: Audit,
        wall: Callable[[], float],
    ) -> None:
        self._records = records
        self._keys = keys
        self._facts = facts
        self._audit = audit
        self._wall = wall
        self._tries = WrongTries()

    def authorities(self) -> tuple[bytes, ...]:
        """Trusted CA certificates (PEM), public."""
        return self._keys().authorities.trusted

    async def create_token(
        self,
        role: NodeRole,
        *,
        creator: str,
        uses: int = 1,
        lifetime_s: float = TOKEN_LIFETIME_S,
        hosts: Iterable[str] = (),
    ) -> str:
        """A new token's text, to be shown once.

        Raises:
            Invalid: uses, lifetime or hosts out of bounds.
        """
        now = self._wall()
        text, record = make_token(
            role,
            token_id=random_id(8),
            secret=secrets.token_bytes(32),
            ca_sha256=fingerprint(self._keys().authorities.active.certificate),
            addresses=self._facts().servers[:8],
            now=now,
            creator=creator,
            uses=uses,
            lifetime_s=lifetime_s,
            hosts=hosts,
        )
        self._audit(AuditEvent(kind="token.created", at=now, actor=creator, token_id=record.id))
        await self._records.put(TOKENS + record.id, msgspec.json.encode(record), revision=ABSENT)
        return text

    async def revoke_token(self, token_id: str, *, actor: str) -> None:
        """Void a token at once. Idempotent.

        Raises:
            NotFound: there is none with this id.
        """
        for _ in range(MAX_RACES):
            record, revision = await self._token(check_label(token_id, "token id"))
            if record is None:
                raise NotFound(f"there is no join token {token_id}")
            if record.revoked_at is not None:
                return
            now = self._wall()
            gone = msgspec.structs.replace(record, revoked_at=now)
            if await self._replace(TOKENS + token_id, gone, revision):
                self._audit(AuditEvent(kind="token.revoked", at=now, actor=actor, token_id=token_id))
                return
        raise Unavailable("the join token is in heavy use; try again")

    async def join(self, request: JoinRequest, source: str) -> Credentials:
        """Admit a node that shows a token, from the address `source`.

        Raises:
            Invalid: the request's id, key or signing request is not fit.
            Unauthenticated: the token is not valid (unknown, or another secret).
            Forbidden: a real token that may not be used (expired, used, revoked, another role),
                or a node that was removed.
            Conflict: the node's id is taken.
            QueueFull: too many wrong tries from there.
            Unavailable, DeadlineExceeded: the cluster cannot decide now; ask again.
        """
        self._throttle(source)
        node = check_node(request.node)
        attempt = Attempt(
            secret=request.secret,
            role=request.role,
            node=node,
            key_sha256=public_key_sha256(check_request(request.csr.encode())),
        )
        check_public("user", request.nats_user)
        token, again = await self._use_token(request.token_id, attempt, source)
        record = await self._admit(attempt, request.nats_user, token)
        self._audit(
            AuditEvent(
                kind="node.admitted_again" if again else "node.admitted",
                at=self._wall(),
                source=source,
                actor=token.creator,
                token_id=token.id,
                node=node,
            )
        )
        return self._issue(record, request.csr, source, joins=True)

    async def renew(self, request: RenewRequest, source: str) -> Credentials:
        """New credentials for a node that holds the key it was admitted with.

        Raises:
            Unauthenticated: no such node, or another key.
            Forbidden: the node was removed.
            Invalid, QueueFull, Unavailable: as `join`.
        """
        self._throttle(source)
        node = check_label(request.node, "node id")
        key_sha256 = public_key_sha256(check_request(request.csr.encode()))
        record, _ = await self._node(node)
        if record is None or record.key_sha256 != key_sha256:
            self._tries.wrong(source, self._wall())
            self._refused(source, node=node, reason="unknown_node" if record is None else "wrong_key")
            raise Unauthenticated("this node is not known here by this key; join again with a token")
        if record.removed_at is not None:
            self._refused(source, node=node, reason="removed", alarm=True)
            raise Forbidden(f"node {node} was removed from the cluster; join again with a token")
        self._audit(AuditEvent(kind="node.renewed", at=self._wall(), source=source, node=node))
        return self._issue(record, request.csr, source, joins=False)

    async def remove(self, node: str, *, actor: str) -> NodeRecord:
        """Void a node's key for good; the record, for those who must cut it off. Idempotent.

        Raises:
            NotFound: no such node was admitted.
        """
        for _ in range(MAX_RACES):
            record, revision = await self._node(check_label(node, "node id"))
            if record is None:
                raise NotFound(f"there is no node {node}")
            if record.removed_at is not None:
                return record
            now = self._wall()
            gone = removed(record, now)
            if await self._replace(NODES + node, gone, revision):
                self._audit(AuditEvent(kind="node.removed", at=now, actor=actor, node=node))
                return gone
        raise Unavailable("the node's record is in heavy use; try again")

    async def register(self, record: NodeRecord) -> None:
        """Enter the founding node, which nobody admitted. Idempotent.

        Raises:
            Conflict: its id is another node's.
        """
        known, _ = await self._node(record.node)
        if known is None and await self._replace(NODES + record.node, record, ABSENT):
            return
        known, _ = await self._node(record.node)
        if known is None or known.key_sha256 != record.key_sha256:
            raise Conflict(f"a node with the id {record.node} is in the cluster already")

    # ── steps ───────────────────────────────────────────────────────────────────────

    def _throttle(self, source: str) -> None:
        wait_s = self._tries.wait_s(source, self._wall())
        if wait_s > 0:
            self._audit(AuditEvent(kind="join.throttled", at=self._wall(), source=source))
            raise QueueFull("too many wrong tries from this address", retry_after_s=wait_s)

    async def _use_token(self, token_id: str, attempt: Attempt, source: str) -> tuple[TokenRecord, bool]:
        """The token's record with this use stored in it, and whether it had been before."""
        for _ in range(MAX_RACES):
            token, revision = await self._token(token_id)
            verdict = judge(token, attempt, self._wall())
            if isinstance(verdict, Refused):
                raise self._refuse(verdict, token_id, attempt, source)
            self._check_free(attempt, (await self._node(attempt.node))[0])  # before the use is spent
            if verdict.again or await self._replace(TOKENS + verdict.record.id, verdict.record, revision):
                return verdict.record, verdict.again
        raise Unavailable("the join token is in heavy use; try again")

    def _refuse(self, verdict: Refused, token_id: str, attempt: Attempt, source: str) -> Exception:
        if verdict.guessed:
            self._tries.wrong(source, self._wall())
        known_id = "" if verdict.reason == "unknown" else token_id
        self._refused(
            source, token_id=known_id, node=attempt.node, reason=verdict.reason, alarm=verdict.alarming
        )
        return (Unauthenticated if verdict.guessed else Forbidden)(_WHY[verdict.reason])

    async def _admit(self, attempt: Attempt, nats_user: str, token: TokenRecord) -> NodeRecord:
        """The node's record, stored."""
        for _ in range(MAX_RACES):
            known, revision = await self._node(attempt.node)
            self._check_free(attempt, known)
            if known is not None and known.removed_at is None:
                if known.nats_user != nats_user:
                    raise Conflict("this node was admitted with another NATS key; remove it first")
                return known
            record = NodeRecord(
                node=NodeId(attempt.node),
                role=token.role,
                key_sha256=attempt.key_sha256,
                nats_user=nats_user,
                hosts=token.hosts,
                admitted_at=self._wall(),
                token_id=token.id,
                revoked=known.revoked if known else (),
            )
            if await self._replace(NODES + record.node, record, revision):
                return record
        raise Unavailable("the node's record is in heavy use; try again")

    def _check_free(self, attempt: Attempt, known: NodeRecord | None) -> None:
        if known is None:
            return
        same_key = known.key_sha256 == attempt.key_sha256
        if known.removed_at is not None and same_key:
            raise Forbidden(f"node {attempt.node} was removed; it needs a new key to come back")
        if known.removed_at is None and not (same_key and known.role == attempt.role):
            raise Conflict(
                f"a node with the id {attempt.node} is in the cluster already; remove it first, "
                "or join from a new data folder"
            )

    def _issue(self, record: NodeRecord, csr: str, source: str, *, joins: bool) -> Credentials:
        return issue(
            self._keys(), self._facts(), record, csr.encode(), observed=source, now=self._wall(), joins=joins
        )

    def _refused(
        self, source: str, *, reason: str, token_id: str = "", node: str = "", alarm: bool = False
    ) -> None:
        self._audit(
            AuditEvent(
                kind="join.refused",
                at=self._wall(),
                source=source,
                token_id=token_id,
                node=node,
                reason=reason,
                alarm=alarm,
            )
        )

    # ── records ─────────────────────────────────────────────────────────────────────

    async def _token(self, token_id: str) -> tuple[TokenRecord | None, int]:
        try:
            key = TOKENS + check_label(token_id, "token id")
        except Invalid:
            return None, ABSENT  # judged like any unknown token
        entry = await self._records.get(key)
        if entry is None:
            return None, ABSENT
        return msgspec.json.decode(entry.value, type=TokenRecord), entry.revision

    async def _node(self, node: str) -> tuple[NodeRecord | None, int]:
        entry = await self._records.get(NODES + node)
        if entry is None:
            return None, ABSENT
        return msgspec.json.decode(entry.value, type=NodeRecord), entry.revision

    async def _replace(self, key: str, record: msgspec.Struct, revision: int) -> bool:
        """False: somebody was faster."""
        try:
            await self._records.put(key, msgspec.json.encode(record), revision=revision)
        except Conflict:
            return False
        return True
