"""The calls of `client.keys` and `client.policies` as data.

Pure. Their answers are the structs of `base/access.py` and `base/policies.py`, which the server
writes too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from ollama_distributed.base import access as wire
from ollama_distributed.base.identity import Role
from ollama_distributed.base.policies import UNLIMITED, Limits, Policy
from ollama_distributed.base.priority import Priority
from ollama_distributed.client.answers import decoder_of
from ollama_distributed.client.calls import Call
from ollama_distributed.client.cluster_calls import named_path

_decode_keys = decoder_of(wire.KeysAnswer)
_decode_key = decoder_of(wire.KeyRow)
_decode_new = decoder_of(wire.NewKey)
_decode_who = decoder_of(wire.WhoAmI)
_decode_policies = decoder_of(wire.PoliciesAnswer)
_decode_policy = decoder_of(Policy)
_decode_explanation = decoder_of(wire.Explanation)
_encode = msgspec.json.Encoder().encode


# ── keys ────────────────────────────────────────────────────────────────────────────


def list_keys() -> Call[list[wire.KeyRow]]:
    """All keys, newest first, without their secrets."""
    return Call(
        method="GET",
        path="/api/v1/keys",
        decode=lambda body: [*_decode_keys(body).keys],
        repeat="always",
    )


def get_key(key_id: str) -> Call[wire.KeyRow]:
    """One key by its id, without its secret."""
    return Call(method="GET", path=_key(key_id), decode=_decode_key, repeat="always")


def create_key(
    *,
    name: str = "",
    role: Role = "user",
    team: str = "default",
    policy: str = "",
    ttl_s: float | None = None,
) -> Call[wire.NewKey]:
    """A new key. Only this answer has its text. `ttl_s` None: good until it is revoked."""
    ask = wire.KeyAsk(name=name, role=role, team=team, policy=policy, ttl_s=ttl_s)
    return Call(method="POST", path="/api/v1/keys", body=_encode(ask), decode=_decode_new)


def rotate_key(key_id: str, *, overlap_s: float = 86_400.0) -> Call[wire.NewKey]:
    """A new secret of the key; the old one stays good for `overlap_s` seconds."""
    ask = wire.RotateAsk(overlap_s=overlap_s)
    return Call(method="POST", path=_key(key_id) + "/rotate", body=_encode(ask), decode=_decode_new)


def revoke_key(key_id: str) -> Call[wire.KeyRow]:
    """Void on every node within seconds, for ever."""
    return Call(method="DELETE", path=_key(key_id), decode=_decode_key)


def whoami() -> Call[wire.WhoAmI]:
    """Who this client is to the server, and what that may do."""
    return Call(method="GET", path="/api/v1/auth/whoami", decode=_decode_who, repeat="always")


# ── policies ────────────────────────────────────────────────────────────────────────


def list_policies() -> Call[list[Policy]]:
    """All policies, by name."""
    return Call(
        method="GET",
        path="/api/v1/policies",
        decode=lambda body: [*_decode_policies(body).policies],
        repeat="always",
    )


def get_policy(name: str) -> Call[Policy]:
    """One policy."""
    return Call(method="GET", path=_policy(name), decode=_decode_policy, repeat="always")


def create_policy(
    name: str,
    *,
    models: Sequence[str] = ("*",),
    routes: Sequence[str] = ("*",),
    read_only: bool = False,
    max_context: int | None = None,
    max_output: int | None = None,
    priority: Priority = "interactive",
    nodes: Mapping[str, str] | None = None,
    cache_group: str = "",
    limits: Limits = UNLIMITED,
    roles: Sequence[str] = (),
    teams: Sequence[str] = (),
    comment: str = "",
) -> Call[Policy]:
    """A new policy; what is not given has no limit. See `ollama_distributed.base.policies.Policy`."""
    ask = wire.PolicyAsk(
        name=name,
        models=tuple(models),
        routes=tuple(routes),
        read_only=read_only,
        max_context=max_context,
        max_output=max_output,
        priority=priority,
        nodes=nodes or {},
        cache_group=cache_group,
        limits=limits,
        roles=tuple(roles),
        teams=tuple(teams),
        comment=comment,
    )
    return Call(method="POST", path="/api/v1/policies", body=_encode(ask), decode=_decode_policy)


def set_policy(policy: Policy) -> Call[Policy]:
    """Change a policy that was read before: `Conflict` is raised where somebody else did meanwhile."""
    same = {f: getattr(policy, f) for f in wire.PolicyAsk.__struct_fields__}
    ask = wire.PolicyAsk(**same)
    return Call(method="PUT", path=_policy(policy.name), body=_encode(ask), decode=_decode_policy)


def delete_policy(name: str) -> Call[None]:
    """Delete a policy; refused while a key names it."""
    return Call(method="DELETE", path=_policy(name), decode=_nothing)


def explain_policy(
    *,
    key: str = "",
    role: Role = "user",
    team: str = "default",
    model: str = "",
    path: str = "",
    method: str = "POST",
) -> Call[wire.Explanation]:
    """What the key of this id, or somebody of this role and team, may do, and by which policy."""
    ask = wire.ExplainAsk(key=key, role=role, team=team, model=model, path=path, method=method)
    return Call(
        method="POST",
        path="/api/v1/policies/explain",
        body=_encode(ask),
        decode=_decode_explanation,
        repeat="always",
    )


def _nothing(_: bytes) -> None:
    return None


def _key(key_id: str) -> str:
    return named_path("/api/v1/keys/", key_id, "a key's id")


def _policy(name: str) -> str:
    return named_path("/api/v1/policies/", name, "a policy's name")
