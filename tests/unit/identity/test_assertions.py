"""Whom a forwarded request is for: what a node may say of it, and what is believed."""

from __future__ import annotations

import base64

import msgspec
import pytest

from ollama_distributed.access.keys import make_key
from ollama_distributed.access.service import Authenticator
from ollama_distributed.base.errors import Forbidden
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import KeyId, NodeId
from ollama_distributed.base.policies import Policy
from ollama_distributed.cluster.identity import ca
from ollama_distributed.cluster.identity.assertions import LIFE_S, SKEW_S, Asserter, Believer, Claim, Signed
from ollama_distributed.cluster.identity.ca import Peer

NOW = 1_000_000.0
USER = Identity("user", KeyId("aaaaaaaa"), "red")


class World:
    """Node `a` speaks, somebody listens; the clock stands at `now`."""

    def __init__(self) -> None:
        self.now = NOW
        self.key = ca.make_key()
        self.asserter = self.speaker("a", self.key)
        self.believer = Believer("c1", lambda: self.now, lambda identity: identity)

    def speaker(self, node: str, key: bytes, cluster: str = "c1") -> Asserter:
        return Asserter(cluster, NodeId(node), key, lambda: self.now)

    def peer(self, node: str = "a", key: bytes | None = None, cluster: str = "c1") -> Peer:
        public = ca.check_request(ca.make_request(key or self.key))
        return Peer(
            cluster=cluster,
            node=NodeId(node),
            role="node",
            key_sha256=ca.public_key_sha256(public),
            issued_at=NOW,
            expires_at=NOW + 86_400,
        )


def test_what_a_node_says_is_believed_of_that_node() -> None:
    world = World()
    said = world.asserter.say(msgspec.structs.replace(USER, policy=Policy(name="p", nodes={"a": "b"})))
    assert world.believer.believe(world.peer(), said) == USER
    assert world.asserter.say(USER) is said, "one signature serves for a while"
    world.now += LIFE_S
    assert world.asserter.say(USER) != said


def test_nobody_else_can_use_it() -> None:
    world = World()
    said = world.asserter.say(USER)
    other = ca.make_key()
    for peer in (world.peer("b", other), world.peer("a", other), world.peer("b")):
        with pytest.raises(Forbidden):
            world.believer.believe(peer, said)
    with pytest.raises(Forbidden):
        world.believer.believe(world.peer(), world.speaker("b", world.key).say(USER))
    with pytest.raises(Forbidden):
        world.believer.believe(world.peer(), world.speaker("a", world.key, "c2").say(USER))


def test_it_ends() -> None:
    world = World()
    said = world.asserter.say(USER)
    world.believer.believe(world.peer(), said)
    world.now += LIFE_S + SKEW_S + 1
    with pytest.raises(Forbidden, match="clocks"):
        world.believer.believe(world.peer(), said)


def test_what_was_changed_is_worth_nothing() -> None:
    world = World()
    signed = msgspec.msgpack.decode(base64.urlsafe_b64decode(world.asserter.say(USER)), type=Signed)
    claim = msgspec.msgpack.decode(signed.claim, type=Claim)
    forged = Signed(msgspec.msgpack.encode(msgspec.structs.replace(claim, role="admin")), signed.signature)
    text = base64.urlsafe_b64encode(msgspec.msgpack.encode(forged))
    for said in (text, b"", b"\xff", b"====", b"A" * 5_000, base64.urlsafe_b64encode(b"\xc1" * 40)):
        with pytest.raises(Forbidden):
            world.believer.believe(world.peer(), said)


def test_the_serving_node_believes_its_own_copy_of_the_state() -> None:
    _, record = make_key("user", now=0.0, team="red")
    mine = Authenticator([record], require_key=True, wall=lambda: NOW)
    user = Identity("user", record.id, "red")
    assert mine.told(user) == user
    for lie in (
        msgspec.structs.replace(user, role="admin"),
        msgspec.structs.replace(user, team="blue"),
    ):
        with pytest.raises(Forbidden):
            mine.told(lie)
    for nobody in (
        Identity("admin"),
        Identity("admin", KeyId("zzzzzzzz"), "red"),
        Identity("local", team="red"),
    ):
        assert (mine.told(nobody).role, mine.told(nobody).team) == ("local", "default")
    mine.share({record.id: msgspec.structs.replace(record, revoked_at=1.0)})
    with pytest.raises(Forbidden):
        mine.told(user)
