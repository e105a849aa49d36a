"""Keys and policies for those who administer them: make, list, rotate, revoke, explain.

Reads answer from this node's mirror of the state. Writes go to the leader, and return once this
node has seen them; a key's text is in the answer to its making and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec

from ollama_distributed.access.keys import make_key
from ollama_distributed.access.policies import Holding, allows_model, check_policy, policy_of
from ollama_distributed.access.roles import MAY, Right, demand
from ollama_distributed.access.service import Authenticator, is_good
from ollama_distributed.base.access import (
    ExplainAsk,
    Explanation,
    KeyAsk,
    KeyRow,
    NewKey,
    PolicyAsk,
    RotateAsk,
    WhoAmI,
)
from ollama_distributed.base.errors import Forbidden, Invalid, NotFound
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import KeyId, NodeId
from ollama_distributed.base.policies import Policy
from ollama_distributed.state.access import (
    AccessChange,
    DeletePolicy,
    KeyEntry,
    MakeKey,
    RevokeKey,
    RotateKey,
    SetPolicy,
)

MAX_NAME = 64
MAX_LIFE_S = 10 * 365 * 86_400.0
MAX_OVERLAP_S = 30 * 86_400.0


class Book(Protocol):
    """Where keys and policies are kept, for all nodes."""

    def keys(self) -> Mapping[KeyId, KeyEntry]: ...

    def policies(self) -> Mapping[str, Policy]: ...

    async def change(self, change: AccessChange, *, actor: str) -> None:
        """Made, and seen here.

        Raises:
            Unavailable: there is no majority now.
            Conflict, NotFound, Invalid
        """
        ...


class AccessDesk:
    def __init__(
        self,
        book: Book,
        authenticator: Authenticator,
        wall: Callable[[], float],
        *,
        node: NodeId,
        last_used: Callable[[KeyId], float | None],
    ) -> None:
        self._book = book
        self._authenticator = authenticator
        self._wall = wall
        self._node = node
        self._last_used = last_used

    # ── keys ────────────────────────────────────────────────────────────────────────

    def keys(self) -> list[KeyRow]:
        """Newest first; those in `admin.json` of this node too, where the cluster does not have them."""
        holding = Holding(self._book.policies())
        rows = (self._row(entry, holding) for entry in self._entries().values())
        return sorted(rows, key=lambda row: -row.created_at)

    def key(self, key_id: str) -> KeyRow:
        """
        Raises:
            NotFound: there is none of this id.
        """
        entry = self._entries().get(KeyId(key_id))
        if entry is None:
            raise NotFound(f"there is no key {key_id[:40]!r}")
        return self._row(entry)

    async def create_key(self, ask: KeyAsk, *, actor: str) -> NewKey:
        """
        Raises:
            Invalid, NotFound: as it is asked for, it cannot be.
            Conflict, Unavailable: not now.
        """
        for text, field in ((ask.name, "name"), (ask.team, "team")):
            if len(text) > MAX_NAME or not text.isprintable() or (field == "team" and not text):
                raise Invalid(f"{field} has at most {MAX_NAME} printable characters", param=field)
        if ask.ttl_s is not None and not 0 < ask.ttl_s <= MAX_LIFE_S:
            raise Invalid("ttl_s is a number of seconds, ten years at most", param="ttl_s")
        now = self._wall()
        text, record = make_key(
            ask.role,
            now=now,
            name=ask.name,
            team=ask.team,
            policy=ask.policy,
            expires_at=None if ask.ttl_s is None else now + ask.ttl_s,
        )
        await self._book.change(MakeKey(record=record), actor=actor)
        return NewKey(key=text, row=self.key(record.id))

    async def rotate_key(self, key_id: str, ask: RotateAsk, *, actor: str) -> NewKey:
        """A new secret of the same key; the old one is good for a while."""
        if not 0 <= ask.overlap_s <= MAX_OVERLAP_S:
            raise Invalid("overlap_s is a number of seconds, 30 days at most", param="overlap_s")
        row = self.key(key_id)
        text, record = make_key(row.role, now=self._wall(), key_id=KeyId(row.id))
        change = RotateKey(id=record.id, secret_sha256=record.secret_sha256, overlap_s=ask.overlap_s)
        await self._book.change(change, actor=actor)
        return NewKey(key=text, row=self.key(row.id))

    async def revoke_key(self, key_id: str, *, actor: str) -> KeyRow:
        await self._book.change(RevokeKey(id=KeyId(key_id)), actor=actor)
        return self.key(key_id)

    # ── policies ────────────────────────────────────────────────────────────────────

    def policies(self) -> list[Policy]:
        return [policy for _, policy in sorted(self._book.policies().items())]

    def policy(self, name: str) -> Policy:
        """
        Raises:
            NotFound: there is none of this name.
        """
        policy = self._book.policies().get(name)
        if policy is None:
            raise NotFound(f"there is no policy {name[:40]!r}")
        return policy

    async def set_policy(self, ask: PolicyAsk, *, new: bool, actor: str) -> Policy:
        said = {f: getattr(ask, f) for f in PolicyAsk.__struct_fields__ if f != "version"}
        policy = Policy(**said)
        check_policy(policy)
        await self._book.change(SetPolicy(policy=policy, new=new, base=ask.version), actor=actor)
        return self.policy(policy.name)

    async def delete_policy(self, name: str, *, actor: str) -> None:
        await self._book.change(DeletePolicy(name=name), actor=actor)

    # ── who may what ────────────────────────────────────────────────────────────────

    def whoami(self, identity: Identity) -> WhoAmI:
        entry = self._entries().get(identity.key_id) if identity.key_id is not None else None
        may: dict[str, tuple[str, ...]] = {}
        for right in sorted(MAY[identity.role], key=lambda right: (right.resource, right.verb)):
            may[right.resource] = (*may.get(right.resource, ()), right.verb)
        return WhoAmI(
            role=identity.role,
            team=identity.team,
            key_id=identity.key_id or "",
            key_name=entry.record.name if entry is not None else "",
            user=identity.user,
            expires_at=entry.record.expires_at if entry is not None else None,
            policy=identity.policy,
            may=may,
        )

    def explain(self, ask: ExplainAsk, right: Right | None) -> Explanation:
        """Which policy holds, and what it says of a model or a route. `right`: what the route asks
        for; None: no route is asked about."""
        entry = None
        if ask.key:
            entry = self._entries().get(KeyId(ask.key))
            if entry is None:
                raise NotFound(f"there is no key {ask.key[:40]!r}; give a key's id, not the key")
        role = entry.record.role if entry is not None else ask.role
        team = entry.record.team if entry is not None else ask.team
        named = entry.record.policy if entry is not None else ""
        reasons: list[str] = []
        allowed = True
        if entry is not None and not is_good(entry.record, self._wall()):
            allowed = False
            reasons.append(f"the key is {self._row(entry).status}")
        try:
            policy = policy_of(self._book.policies(), role, team, named)
        except Forbidden as refused:
            return Explanation(allowed=False, reasons=(*reasons, refused.message), role=role, team=team)
        identity = Identity(role=role, team=team, policy=policy)
        if right is not None:
            try:
                demand(identity, right, ask.path)
            except Forbidden as refused:
                allowed = False
                reasons.append(refused.message)
            else:
                reasons.append(f"the role {role!r} may do this ({right.verb} {right.resource})")
        if ask.model:
            seen = allows_model(identity, ask.model)
            allowed = allowed and seen
            reasons.append(
                f"the model {ask.model!r} is allowed"
                if seen
                else f"the model {ask.model!r} does not exist for it: none of the patterns fits"
            )
        by = "none"
        if policy is not None:
            by = "key" if named else "role" if role in policy.roles else "team"
        return msgspec.convert(
            {"allowed": allowed, "reasons": reasons, "role": role, "team": team, "policy": policy, "by": by},
            Explanation,
        )

    # ── rows ────────────────────────────────────────────────────────────────────────

    def _entries(self) -> dict[KeyId, KeyEntry]:
        own = {key.id: KeyEntry(node=self._node, record=key) for key in self._authenticator.own}
        return {**own, **self._book.keys()}

    def _row(self, entry: KeyEntry, holding: Holding | None = None) -> KeyRow:
        key, now = entry.record, self._wall()
        holding = holding or Holding(self._book.policies())
        try:
            policy = holding.of(key.role, key.team, key.policy)
            holds = policy.name if policy is not None else ""
        except Forbidden:
            holds = f"{key.policy} (missing: nothing is allowed)"
        return KeyRow(
            id=key.id,
            name=key.name,
            role=key.role,
            status="revoked" if key.revoked_at is not None else "valid" if is_good(key, now) else "expired",
            team=key.team,
            policy=key.policy,
            holds=holds,
            created_at=key.created_at,
            created_by=key.created_by,
            expires_at=key.expires_at,
            revoked_at=key.revoked_at,
            rotated_at=key.rotated_at,
            old_until=key.old_until if key.old_until > now else None,
            last_used_at=self._last_used(key.id),
            admin_of=entry.node,
        )
