"""NATS's decentralized credentials: who may speak on the bus, and about what.

An operator signs two accounts: NATS's own system account, and one application account with a
scoped signing key per role. A user's JWT names the node and its role's key; what it may do is
in the account's template, where `{{name()}}` is the node's id. So a new node is one signed
JWT (no server changes), a changed right is one new account JWT, and a removed node one entry
in the account's revocations.

Pure: the time is an argument. Source: nats-io/jwt v2; `{{name()}}` and scopes, ADR-14 of NATS.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from ollama_distributed.base.errors import Invalid
from ollama_distributed.base.ids import NodeRole
from ollama_distributed.cluster.identity.names import check_node
from ollama_distributed.cluster.identity.nkeys import NatsKey, check_public, make_key, verifies

OWN_RECORDS = ("advert", "models", "placed")
"""What a node says of itself (`state/keys.py`: `nodes.<id>.…`). It may write no other keys:
whatever is there, every node keeps in memory."""
_UNLIMITED = -1
_encoder = msgspec.json.Encoder(order="deterministic")


class Permissions(msgspec.Struct, frozen=True):
    """Subjects that a role may use; `{{name()}}` stands for the node's id."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    replies: int = 1000
    """Answers that one request may get on its reply subject, without a permission for it."""
    reply_window_s: float = 60.0


def node_permissions(bucket: str = "cfg") -> Permissions:
    """What a node without a vote may do: beat and report under its own name, write its own two
    entries of the state, read all of it, ask others and propose as itself, hear what is meant
    for it."""
    stream = f"KV_{bucket}"
    return Permissions(
        publish=(
            "hb.{{name()}}",
            "load.{{name()}}",
            "bcast.{{name()}}.>",
            "cmd.*.propose.{{name()}}",
            "cmd.*.usage",
            "cmd.*.load",
            "cmd.*.msg.*",
            *(f"$KV.{bucket}.nodes.{{{{name()}}}}.{own}" for own in OWN_RECORDS),
            # An empty entry that means nothing: how a client learns that writes are possible again.
            f"$KV.{bucket}._probe",
            "$JS.API.INFO",
            f"$JS.API.STREAM.INFO.{stream}",
            f"$JS.API.STREAM.MSG.GET.{stream}",
            f"$JS.API.CONSUMER.CREATE.{stream}",
            f"$JS.API.CONSUMER.CREATE.{stream}.>",
            f"$JS.API.CONSUMER.INFO.{stream}.>",
            f"$JS.API.CONSUMER.DELETE.{stream}.>",
            f"$JS.FC.{stream}.>",
        ),
        subscribe=("_INBOX_{{name()}}.>", "cmd.{{name()}}.>", "bcast.>", f"ev.{bucket}.>", "hb.*", "load.*"),
    )


SERVER_PERMISSIONS = Permissions(publish=(">",), subscribe=(">",))
"""A server may be the leader: it writes all of the application's state. The system account
stays apart."""


class NatsKeys(msgspec.Struct, frozen=True, kw_only=True):
    """The private keys of the cluster's NATS hierarchy; on servers only."""

    operator: NatsKey
    system: NatsKey
    application: NatsKey
    node_signing: NatsKey
    server_signing: NatsKey

    def signing(self, role: NodeRole) -> NatsKey:
        return self.server_signing if role == "server" else self.node_signing


class Claims(msgspec.Struct, frozen=True, kw_only=True):
    """A JWT whose signature was checked."""

    issuer: str
    subject: str
    name: str
    issued_at: int
    expires_at: int | None
    nats: dict[str, Any]


def make_keys(raw: tuple[bytes, bytes, bytes, bytes, bytes]) -> NatsKeys:
    """The hierarchy's keys, each of 32 random bytes."""
    operator, system, application, node, server = raw
    return NatsKeys(
        operator=make_key("operator", operator),
        system=make_key("account", system),
        application=make_key("account", application),
        node_signing=make_key("account", node),
        server_signing=make_key("account", server),
    )


def operator_jwt(keys: NatsKeys, name: str, now: float) -> str:
    return _sign(
        keys.operator,
        keys.operator.public,
        name,
        now,
        {"type": "operator", "system_account": keys.system.public},
    )


def system_account_jwt(keys: NatsKeys, now: float) -> str:
    return _sign(
        keys.operator,
        keys.system.public,
        "SYS",
        now,
        {"type": "account", "limits": _account_limits(storage_bytes=0)},
    )


def account_jwt(
    keys: NatsKeys,
    now: float,
    *,
    nodes: Permissions | None = None,
    servers: Permissions = SERVER_PERMISSIONS,
    revoked: Mapping[str, float] | None = None,
) -> str:
    """The application account. `revoked`: public user keys, each with the time up to which
    JWTs made for it are void; the servers cut such a user at once."""
    revocations = {check_public("user", user): int(at) for user, at in (revoked or {}).items()}
    return _sign(
        keys.operator,
        keys.application.public,
        "APP",
        now,
        {
            "type": "account",
            # As much as the server has: a limit above its own makes it switch JetStream off.
            "limits": _account_limits(storage_bytes=_UNLIMITED),
            "signing_keys": [
                _scope(keys.node_signing, "node", nodes or node_permissions()),
                _scope(keys.server_signing, "server", servers),
            ],
            "default_permissions": {"pub": {}, "sub": {}},
            **({"revocations": revocations} if revocations else {}),
        },
    )


def user_jwt(keys: NatsKeys, role: NodeRole, node: str, user: str, now: float, *, expires_at: float) -> str:
    """Lets the holder of the private key of `user` (public) speak as `node`, within its role.

    Raises:
        Invalid: `user` is no public user key, or `node` could widen the template.
    """
    return _sign(
        keys.signing(role),
        check_public("user", user),
        check_node(node),
        now,
        {"type": "user", "issuer_account": keys.application.public},
        expires_at=expires_at,
    )


def system_user_jwt(keys: NatsKeys, node: str, user: str, now: float, *, expires_at: float) -> str:
    """Lets a server administer NATS itself (`$SYS.REQ…`): push account JWTs, read states."""
    return _sign(
        keys.system,
        check_public("user", user),
        check_node(node),
        now,
        {"type": "user", "issuer_account": keys.system.public, "pub": {}, "sub": {}, **_user_limits()},
        expires_at=expires_at,
    )


def read_jwt(token: str) -> Claims:
    """The claims of a JWT, its signature checked against the issuer that it names. Whether
    that issuer is to be trusted is the caller's question.

    Raises:
        Invalid: not one of NATS's JWTs, or a wrong signature.
    """
    try:
        head, body, signature = token.split(".")
        header = msgspec.json.decode(_unbase64(head), type=dict[str, str])
        claims = msgspec.json.decode(_unbase64(body), type=dict[str, Any])
        issuer = claims["iss"]
        genuine = header == _HEADER and verifies(issuer, _unbase64(signature), f"{head}.{body}".encode())
        read = Claims(
            issuer=issuer,
            subject=claims["sub"],
            name=claims["name"],
            issued_at=claims["iat"],
            expires_at=claims.get("exp"),
            nats=claims["nats"],
        )
    except (ValueError, KeyError, TypeError, binascii.Error, msgspec.MsgspecError) as failure:
        raise Invalid("not a NATS JWT") from failure
    if not genuine:
        raise Invalid("the NATS JWT's signature is wrong")
    return read


_HEADER = {"typ": "JWT", "alg": "ed25519-nkey"}


def _scope(key: NatsKey, role: NodeRole, permissions: Permissions) -> dict[str, Any]:
    return {
        "kind": "user_scope",
        "key": key.public,
        "role": role,
        "template": {
            "pub": {"allow": list(permissions.publish)},
            "sub": {"allow": list(permissions.subscribe)},
            "resp": {"max": permissions.replies, "ttl": int(permissions.reply_window_s * 1e9)},
            **_user_limits(),
        },
    }


def _user_limits() -> dict[str, int]:
    return {"subs": _UNLIMITED, "data": _UNLIMITED, "payload": _UNLIMITED}


def _account_limits(*, storage_bytes: int) -> dict[str, int | bool]:
    names = ("subs", "conn", "leaf", "imports", "exports", "data", "payload", "streams", "consumer")
    return {
        **dict.fromkeys(names, _UNLIMITED),
        "wildcards": True,
        "mem_storage": storage_bytes,
        "disk_storage": storage_bytes,
    }


def _sign(
    issuer: NatsKey,
    subject: str,
    name: str,
    now: float,
    nats: dict[str, Any],
    *,
    expires_at: float | None = None,
) -> str:
    claims: dict[str, Any] = {
        "iat": int(now),
        "iss": issuer.public,
        "name": name,
        "sub": subject,
        "nats": {**nats, "version": 2},
    }
    if expires_at is not None:
        claims["exp"] = int(expires_at)
    # The id is the claims' own digest, so the same claims make the same JWT (Ed25519 signs alike).
    claims["jti"] = base64.b32encode(hashlib.sha256(_encoder.encode(claims)).digest()).rstrip(b"=").decode()
    text = f"{_base64(_encoder.encode(_HEADER))}.{_base64(_encoder.encode(claims))}"
    return f"{text}.{_base64(issuer.sign(text.encode()))}"


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _unbase64(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
