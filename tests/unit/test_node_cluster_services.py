"""What a node says of itself, whom it knows, what it applies: over coordination in memory."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from tests.limits import SOON_S

from ollama_distributed.adapters.coordination.memory import MemoryCoordination, MemoryEngine
from ollama_distributed.base.clock import SystemClock
from ollama_distributed.base.errors import Forbidden, Unavailable
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.identity.ca import Peer
from ollama_distributed.cluster.identity.roster import NODES, TOKENS, NodeRecord, removed
from ollama_distributed.cluster.identity.tokens import TokenRecord
from ollama_distributed.cluster.loops import keep_going
from ollama_distributed.cluster.mirror import Mirror
from ollama_distributed.cluster.tasks import end
from ollama_distributed.node.cluster.duties import TOKENS_KEPT_S, forget_tokens
from ollama_distributed.node.cluster.live import LiveConfig
from ollama_distributed.node.cluster.memory import recall, remember
from ollama_distributed.node.cluster.publish import Publisher
from ollama_distributed.node.cluster.records import LateRecords
from ollama_distributed.node.cluster.roster import Roster
from ollama_distributed.node.settings import Settings
from ollama_distributed.state import keys
from ollama_distributed.state.cluster import ClusterState, apply
from ollama_distributed.state.codec import decode, encode
from ollama_distributed.state.records import Advert, Config, Holdings, Lease

ME = NodeId("n1")
NOW = 1_000_000.0


async def _until(met: Callable[[], bool], what: str) -> None:
    try:
        with anyio.fail_after(SOON_S):
            while not met():
                await anyio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(what) from None


@asynccontextmanager
async def _background(step: Callable[[], Any]) -> AsyncIterator[None]:
    task = asyncio.create_task(keep_going("test", step, random.Random(0)))
    try:
        yield
    finally:
        await end([task])


def _advert(name: str) -> Advert:
    return Advert(node=ME, name=name, role="server", version="1", boot="b", started_at=0.0)


class Said:
    """What the node would say now."""

    def __init__(self) -> None:
        self.name = "first"
        self.allowed = True
        self.asked = 0

    def may(self) -> bool:
        self.asked += 1
        return self.allowed

    def advert(self) -> Advert:
        return _advert(self.name)

    def holdings(self) -> Holdings:
        return Holdings(node=ME)


@asynccontextmanager
async def _publishing(said: Said) -> AsyncIterator[tuple[MemoryCoordination, Mirror, Publisher]]:
    async with (
        MemoryCoordination(MemoryEngine(), ME) as coordination,
        Mirror(coordination, clock=SystemClock()) as mirror,
    ):
        publisher = Publisher(
            coordination,
            mirror,
            node=ME,
            advert=said.advert,
            holdings=said.holdings,
            allowed=said.may,
        )
        mirror.on_change(publisher.look)
        async with _background(publisher.step):
            yield coordination, mirror, publisher


async def test_a_node_says_who_it_is_once_and_again_when_it_changes() -> None:
    said = Said()
    async with _publishing(said) as (coordination, mirror, publisher):
        await _until(lambda: ME in mirror.state.nodes, "published")
        await _until(lambda: mirror.state.nodes[ME].holdings is not None, "models too")
        revision = mirror.state.revision_of(keys.advert(ME))
        publisher.wake()
        said.name = "second"
        publisher.wake()
        await _until(lambda: mirror.state.nodes[ME].name == "second", "published again")
        stored = await coordination.get(keys.advert(ME))
        assert stored is not None
        assert decode(stored.value, Advert).name == "second"
        assert stored.revision > revision


async def test_what_the_state_lost_is_said_again_unless_the_node_was_removed() -> None:
    said = Said()
    async with _publishing(said) as (coordination, mirror, publisher):
        await _until(lambda: ME in mirror.state.nodes, "published")

        async def lose() -> None:
            stored = await coordination.get(keys.advert(ME))
            assert stored is not None
            await coordination.delete(keys.advert(ME), revision=stored.revision)

        revision = mirror.state.revision_of(keys.advert(ME))
        await lose()
        await _until(lambda: mirror.state.revision_of(keys.advert(ME)) > revision, "said again")
        said.allowed = False
        await lose()
        await _until(lambda: mirror.state.revision_of(keys.advert(ME)) == 0, "gone")
        for _ in range(2):
            asked = said.asked
            publisher.wake()
            await _until(lambda asked=asked: said.asked > asked, "it looked again")
        assert mirror.state.revision_of(keys.advert(ME)) == 0


# ── tokens ──────────────────────────────────────────────────────────────────────────


async def test_tokens_that_expired_long_ago_are_forgotten() -> None:
    async with MemoryCoordination(MemoryEngine(), ME) as coordination:
        for name, expires_at in (("old", NOW - TOKENS_KEPT_S - 1), ("late", NOW - 1), ("open", NOW + 1)):
            record = TokenRecord(
                id=name,
                secret_sha256="",
                role="node",
                uses=1,
                created_at=0.0,
                expires_at=expires_at,
                creator="k",
            )
            await coordination.create(TOKENS + name, msgspec.json.encode(record))
        await forget_tokens(coordination, NOW)
        left = [entry.key for entry in (await coordination.scan()).entries]
    assert left == [TOKENS + "late", TOKENS + "open"]


# ── roster ──────────────────────────────────────────────────────────────────────────


def _record(node: str, **fields: Any) -> NodeRecord:
    return NodeRecord(
        node=NodeId(node), role="node", key_sha256=f"key-{node}", nats_user="U", admitted_at=0.0, **fields
    )


def _peer(node: str, key: str | None = None, cluster: str = "c1") -> Peer:
    return Peer(
        cluster=cluster,
        node=NodeId(node),
        role="node",
        key_sha256=key or f"key-{node}",
        issued_at=NOW,
        expires_at=NOW + 60,
    )


async def test_a_removed_node_is_told_once_and_stays_shut_out() -> None:
    gone: list[NodeId] = []
    roster = Roster("c1", wall=lambda: NOW, on_removed=gone.append)
    async with (
        MemoryCoordination(MemoryEngine(), ME) as coordination,
        _background(lambda: roster.follow(coordination)),
    ):
        record = _record("n2")
        revision = await coordination.create(NODES + "n2", msgspec.json.encode(record))
        await coordination.create(NODES + "n3", b"no record at all")
        await coordination.create(NODES + "n4", msgspec.json.encode(_record("n4")))
        await _until(lambda: len(roster) == 2, "two members; what cannot be read is left out")
        roster.check(_peer("n2"))
        roster.check(_peer("n9"))  # admitted a moment ago: the news is under way
        with pytest.raises(Forbidden, match="another key"):
            roster.check(_peer("n2", key="other"))
        with pytest.raises(Forbidden, match="another cluster"):
            roster.check(_peer("n2", cluster="c2"))
        revision = await coordination.put(
            NODES + "n2", msgspec.json.encode(removed(record, NOW)), revision=revision
        )
        await _until(lambda: gone == ["n2"], "told")
        await coordination.delete(NODES + "n2", revision=revision)
        await coordination.create(NODES + "n5", msgspec.json.encode(_record("n5")))
        await _until(lambda: len(roster) == 2, "n4 and n5")
        with pytest.raises(Forbidden, match="removed"):
            roster.check(_peer("n2"))
        assert roster.removed(NodeId("n2"))
        assert roster.revoked_users() == pytest.approx({"U": NOW + 2 * 86_400 + 300})
    assert gone == ["n2"]


async def test_without_coordination_nobody_is_admitted() -> None:
    with pytest.raises(Unavailable):
        await LateRecords(lambda: None).get("admission.nodes.n2")
    async with MemoryCoordination(MemoryEngine(), ME) as coordination:
        records = LateRecords(lambda: coordination)
        await records.put("admission.nodes.n2", b"x", revision=0)
        found = await records.get("admission.nodes.n2")
        assert found is not None
        assert found.value == b"x"


# ── memory ──────────────────────────────────────────────────────────────────────────


def test_what_was_known_is_known_again_in_the_same_cluster_only(tmp_path: Path) -> None:
    state = ClusterState()
    lease = Lease(node=ME, epoch=3)
    for revision, (key, record) in enumerate(
        [(keys.advert(ME), _advert("first")), (keys.LEASE, lease), (keys.CONFIG, Config(version=4))], 1
    ):
        state = apply(state, key, encode(record), revision)
    remember(tmp_path, "c1", state, (_record("n2", removed_at=5.0),))
    again, roster = recall(tmp_path, "c1")
    assert (again.nodes[ME].name, again.config.version, again.lease) == ("first", 4, None)
    assert again.revision_of(keys.advert(ME)) == 1
    assert [record.removed_at for record in roster] == [5.0]
    assert recall(tmp_path, "c2") == (ClusterState(), ())
    (tmp_path / "cluster.state").write_bytes(b"\x93 broken")
    assert recall(tmp_path, "c1") == (ClusterState(), ())
    assert (tmp_path / "cluster.state").stat().st_mode & 0o077 == 0


# ── config ──────────────────────────────────────────────────────────────────────────


def test_each_version_is_applied_over_the_nodes_own_and_a_foreign_one_is_not() -> None:
    applied: list[Settings] = []
    own = Settings.model_construct(max_queue=7, keep_alive=300.0)
    live = LiveConfig(own, applied.append)
    live(Config())
    assert applied == []
    live(Config(version=1, values={"keep_alive": "1m"}, at=time.time()))
    live(Config(version=2, values={"keep_alive": "1m"}))
    live(Config(version=3, values={"of_a_newer_program": 1}))
    live(Config(version=4, values={"max_queue": 9}))
    live(Config(version=5))
    assert [(one.max_queue, one.keep_alive) for one in applied] == [(7, 60.0), (9, 300.0), (7, 300.0)]
