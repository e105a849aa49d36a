"""Keys and policies in the state: what each change makes of them, what is refused, and their bytes."""

from __future__ import annotations

import msgspec
import pytest

from ollama_distributed.base.errors import Conflict, Invalid, NotFound
from ollama_distributed.base.ids import KeyId, NodeId
from ollama_distributed.base.policies import Limits, Policy
from ollama_distributed.state.access import (
    REVOKED_KEPT_S,
    AccessChange,
    DeletePolicy,
    KeyEntry,
    KeyRecord,
    MakeKey,
    RevokeKey,
    RotateKey,
    SetPolicy,
)
from ollama_distributed.state.changes import Proposal, plan_change
from ollama_distributed.state.cluster import ClusterState, apply
from ollama_distributed.state.codec import decode, encode
from ollama_distributed.state.keys import access_key

K1, K2 = KeyId("aaaaaaa1"), KeyId("aaaaaaa2")
HASH, HASH2 = "1" * 64, "2" * 64

GOLDEN: list[tuple[msgspec.Struct, bytes]] = [
    (
        KeyEntry(node=NodeId("n1"), record=KeyRecord(id=K1, secret_sha256="ab", role="admin", name="admin")),
        b'{"node":"n1","record":{"id":"aaaaaaa1","secret_sha256":"ab","role":"admin","name":"admin",'
        b'"team":"default","created_at":0.0,"expires_at":null,"policy":"","created_by":"","revoked_at":null,'
        b'"rotated_at":null,"old_sha256":"","old_until":0.0}}',
    ),
    (
        Policy(name="p", models=("a*",), nodes={"zone": "eu"}, limits=Limits(tokens_per_minute=5)),
        b'{"name":"p","models":["a*"],"nodes":{"zone":"eu"},"limits":{"tokens_per_minute":5}}',
    ),
    (RevokeKey(id=K1), b'{"type":"revoke_key","id":"aaaaaaa1"}'),
    (
        RotateKey(id=K1, secret_sha256="ab", overlap_s=1.0),
        b'{"type":"rotate_key","id":"aaaaaaa1","secret_sha256":"ab","overlap_s":1.0}',
    ),
    (
        SetPolicy(policy=Policy(name="p"), new=True),
        b'{"type":"set_policy","policy":{"name":"p"},"new":true,"base":null}',
    ),
    (DeletePolicy(name="p"), b'{"type":"delete_policy","name":"p"}'),
]


@pytest.mark.parametrize(("record", "golden"), GOLDEN, ids=lambda x: type(x).__name__)
def test_the_bytes_stay(record: msgspec.Struct, golden: bytes) -> None:
    assert encode(record) == golden
    assert decode(golden, type(record)) == record


def record(id_: KeyId = K1, **fields) -> KeyRecord:
    return KeyRecord(id=id_, secret_sha256=HASH, role="user", **fields)


def done(state: ClusterState, *changes: AccessChange, at: float = 10.0) -> ClusterState:
    for number, change in enumerate(changes):
        proposal = Proposal(id=f"p{state.revision}x{number}", change=change, actor="boss", at=at)
        for write in plan_change(state, proposal):
            assert write.revision == state.revision_of(write.key)
            state = apply(state, write.key, write.value, state.revision + 1, at=at)
    return state


def test_a_key_is_made_rotated_and_revoked() -> None:
    state = done(ClusterState(), MakeKey(record=record(name="ci")))
    made = state.keys[K1].record
    assert (made.name, made.created_by, made.created_at) == ("ci", "boss", 10.0)

    state = done(state, RotateKey(id=K1, secret_sha256=HASH2, overlap_s=60.0), at=20.0)
    rotated = state.keys[K1].record
    assert (rotated.secret_sha256, rotated.old_sha256, rotated.old_until) == (HASH2, HASH, 80.0)

    state = done(state, RevokeKey(id=K1), at=30.0)
    assert state.keys[K1].record.revoked_at == 30.0
    assert state.keys[K1].record.old_sha256 == ""
    for change in (RevokeKey(id=K1), RotateKey(id=K1, secret_sha256=HASH, overlap_s=0.0)):
        with pytest.raises(Conflict):
            done(state, change)


def test_the_key_of_an_admin_json_stays() -> None:
    entry = KeyEntry(node=NodeId("n1"), record=record())
    state = apply(ClusterState(), access_key(K1), encode(entry), 1)
    with pytest.raises(Conflict, match=r"admin\.json"):
        done(state, RevokeKey(id=K1))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (MakeKey(record=record()), Conflict),
        (MakeKey(record=record(KeyId("../../../"))), Invalid),
        (MakeKey(record=record(K2, policy="none")), NotFound),
        (MakeKey(record=KeyRecord(id=K2, secret_sha256=HASH, role="node")), Invalid),
        (RevokeKey(id=K2), NotFound),
        (SetPolicy(policy=Policy(name="p"), new=True), Conflict),
        (SetPolicy(policy=Policy(name="q")), NotFound),
        (SetPolicy(policy=Policy(name="p"), base=7), Conflict),
        (SetPolicy(policy=Policy(name="a.b"), new=True), Invalid),
        (SetPolicy(policy=Policy(name="q", roles=("viewer",)), new=True), Conflict),
        (DeletePolicy(name="p"), Conflict),
        (DeletePolicy(name="q"), NotFound),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, msgspec.Struct) else value.__name__,
)
def test_what_cannot_be_is_refused(change: AccessChange, error: type[Exception]) -> None:
    state = done(
        ClusterState(),
        SetPolicy(policy=Policy(name="p", roles=("viewer",)), new=True),
        MakeKey(record=record(policy="p")),
    )
    with pytest.raises(error):
        done(state, change)


def test_each_change_of_a_policy_is_a_version() -> None:
    state = done(
        ClusterState(),
        SetPolicy(policy=Policy(name="p", version=99), new=True),
        SetPolicy(policy=Policy(name="p", max_output=5, version=99), base=1),
    )
    policy = state.policies["p"]
    assert (policy.version, policy.max_output, policy.by) == (2, 5, "boss")
    assert "p" not in done(state, DeletePolicy(name="p")).policies


def test_keys_that_were_revoked_long_ago_are_forgotten() -> None:
    state = done(ClusterState(), MakeKey(record=record()), RevokeKey(id=K1))
    later = 11.0 + REVOKED_KEPT_S
    assert K1 in done(state, MakeKey(record=record(K2)), at=later - 2).keys
    assert K1 not in done(state, MakeKey(record=record(K2)), at=later).keys
