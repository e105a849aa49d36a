"""A node's identity over crashes: the old one or the new one, never half of each."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from tests.integration.identity_listener import Seat as Founder
from tests.limits import SOON_S

from ollama_distributed.adapters.discovery.mdns import Found, announced
from ollama_distributed.adapters.identity.files import IdentityFiles
from ollama_distributed.base.errors import Conflict, Unavailable
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.identity import ca
from ollama_distributed.cluster.identity.issuing import issue
from ollama_distributed.cluster.identity.roster import NodeRecord
from ollama_distributed.cluster.identity.tokens import Address, parse_token
from ollama_distributed.cluster.identity.wire import ClusterFacts
from ollama_distributed.cluster.tasks import end
from ollama_distributed.node.cluster import identity as identities
from ollama_distributed.node.cluster.keeper import join_first
from ollama_distributed.node.cluster.seat import SeatFile

pytestmark = pytest.mark.integration
NODE = NodeId("n7")


def _found(folder: Path) -> identities.Identity:
    return identities.found(folder, identities.new_cluster(), NODE, ("192.0.2.7",), time.time())


def test_a_founder_is_a_server_with_the_clusters_keys(tmp_path: Path) -> None:
    founded = _found(tmp_path)
    again = identities.restore(tmp_path)
    assert again is not None
    assert (again.cluster, again.node, again.role) == (founded.cluster, NODE, "server")
    assert again.cluster_keys is not None
    assert "192.0.2.7" in again.peer.names.addresses


def test_a_server_renews_itself_and_keeps_its_names(tmp_path: Path) -> None:
    identity = _found(tmp_path)
    before = identity.peer
    later = time.time() + 13 * 3600
    identities.renew_alone(identity, ClusterFacts(cluster=identity.cluster), ("198.51.100.1",), later)
    after = identity.peer
    assert after.expires_at > before.expires_at
    assert after.key_sha256 == before.key_sha256
    assert {"192.0.2.7", "198.51.100.1"} <= set(after.names.addresses)


def test_a_server_that_moved_is_certified_for_its_new_address_only_once(tmp_path: Path) -> None:
    identity = _found(tmp_path)
    identities.cover(identity, ("192.0.2.7",), time.time() + 60)
    assert identity.peer.issued_at < time.time() + 30
    identities.cover(identity, ("192.0.2.8", "GPU1.lan"), time.time() + 60)
    assert {"192.0.2.7", "192.0.2.8"} <= set(identity.peer.names.addresses)
    assert "gpu1.lan" in identity.peer.names.dns
    issued_at = identity.peer.issued_at
    identities.cover(identity, ("gpu1.lan",), time.time() + 3600)
    assert identity.peer.issued_at == issued_at


@pytest.mark.parametrize("failures", [[], [OSError("no room"), Unavailable("away"), KeyError("a defect")]])
async def test_a_certificate_is_renewed_at_half_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: list[Exception]
) -> None:
    """And put to use, however often that fails."""
    monkeypatch.setattr(identities, "RETRY_S", 0.001)
    identity = _found(tmp_path)
    before, renewed, left = identity.peer, anyio.Event(), list(failures)
    now = [before.renew_at + 1]

    async def on_renewed() -> None:
        if left:
            raise left.pop()
        renewed.set()

    keeping = asyncio.create_task(
        identities.keep_valid(
            identity,
            facts=lambda: ClusterFacts(cluster=identity.cluster),
            hosts=lambda: ("192.0.2.7",),
            wall=lambda: now[0],
            renewed=on_renewed,
        )
    )
    with anyio.fail_after(SOON_S):
        await renewed.wait()
    await end([keeping])
    assert identity.peer.renew_at > before.expires_at - 60


async def test_a_certificate_of_a_clock_that_was_ahead_is_replaced(tmp_path: Path) -> None:
    """Else it would keep the node out until that time has come."""
    identity, renewed = _found(tmp_path), anyio.Event()
    today = identity.peer.issued_at
    facts = ClusterFacts(cluster=identity.cluster)
    identities.renew_alone(identity, facts, (), today + 3 * ca.DAY_S)

    async def on_renewed() -> None:
        renewed.set()

    keeping = asyncio.create_task(
        identities.keep_valid(
            identity, facts=lambda: facts, hosts=lambda: (), wall=lambda: today + 60, renewed=on_renewed
        )
    )
    with anyio.fail_after(SOON_S):
        await renewed.wait()
    await end([keeping])
    assert identity.peer.begins_at < today + 60 < identity.peer.expires_at


async def test_a_node_is_renewed_by_a_server_until_it_is_removed(tmp_path: Path) -> None:
    founder, folder = Founder(tmp_path / "f"), tmp_path / "n"
    async with founder.open():
        token = parse_token(await founder.world.admission.create_token("node", creator="op"))
        await join_first(folder, NODE, token, mdns=False)
        identity = identities.restore(folder)
        assert identity is not None
        founder.world.now += 13 * 3600
        before = identity.peer.expires_at
        await identities.renew(identity, token.addresses)
        assert identity.peer.expires_at > before
        await founder.world.admission.remove(NODE, actor="op")

        async def never() -> None:
            raise AssertionError("renewed")

        with anyio.fail_after(SOON_S):  # ends by itself: it was removed
            await identities.keep_valid(
                identity,
                facts=lambda: ClusterFacts(cluster=identity.cluster, servers=token.addresses),
                hosts=lambda: (),
                wall=lambda: identity.peer.renew_at + 1,
                renewed=never,
            )


async def _prepared(folder: Path, founder: Founder) -> str:
    """A join that the cluster granted and that was not adopted: the CA's hash."""
    async with founder.open():
        token = parse_token(await founder.world.admission.create_token("node", creator="op"))
        await identities.join(folder, NODE, token, mdns=False)
        return token.ca_sha256


async def test_a_crash_before_the_swap_leaves_the_old_identity(tmp_path: Path) -> None:
    old = _found(tmp_path / "n")
    await _prepared(tmp_path / "n", Founder(tmp_path / "f"))
    restored = identities.restore(tmp_path / "n")
    assert restored is not None
    assert restored.cluster == old.cluster


async def test_a_crash_inside_the_swap_leaves_the_new_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _found(tmp_path / "n")
    founder = Founder(tmp_path / "f")
    pinned = await _prepared(tmp_path / "n", founder)
    rename, calls = Path.rename, []

    def crash_at_the_second(self: Path, target: Any) -> Path:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", crash_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        identities.adopt(tmp_path / "n", pinned)
    monkeypatch.undo()
    restored = identities.restore(tmp_path / "n")
    assert restored is not None
    assert (restored.cluster, restored.role) == (founder.world.facts.cluster, "node")
    assert restored.cluster_keys is None


async def test_joining_again_is_nothing_and_another_cluster_only_alone(tmp_path: Path) -> None:
    founder, folder = Founder(tmp_path / "f"), tmp_path / "n"
    async with founder.open():
        token = parse_token(await founder.world.admission.create_token("node", creator="op", uses=2))
        await join_first(folder, NODE, token, mdns=False)
        await join_first(folder, NODE, token, mdns=False)
        joined = identities.restore(folder)
        assert joined is not None
        assert joined.cluster == founder.world.facts.cluster
        assert SeatFile(folder).read(joined.cluster).open
    other = Founder(tmp_path / "g", cluster="c2")
    async with other.open():
        token = parse_token(await other.world.admission.create_token("node", creator="op"))
        with pytest.raises(Conflict, match="cluster leave"):
            await join_first(folder, NODE, token, mdns=False)


async def test_a_cluster_that_moved_is_found_on_the_network_by_its_ca(tmp_path: Path) -> None:
    founder, folder = Founder(tmp_path / "f"), tmp_path / "n"
    async with founder.open() as address:
        token = parse_token(await founder.world.admission.create_token("node", creator="op"))
        stale = msgspec.structs.replace(token, addresses=(Address("127.0.0.1", 1),))
        own = Found(
            cluster=founder.world.facts.cluster,
            node="n0-moved",
            name="f",
            version="1",
            ca_sha256=token.ca_sha256,
            addresses=(str(address),),
        )
        with pytest.raises(Unavailable):
            await join_first(folder, NODE, stale, mdns=False)
        liar = msgspec.structs.replace(own, node="n0-liar", ca_sha256="ab" * 32, addresses=("127.0.0.1:2",))
        async with announced(own), announced(liar):
            with anyio.fail_after(SOON_S):
                while True:
                    try:
                        await join_first(folder, NODE, stale, mdns=True)
                        break
                    except Unavailable:  # who announces runs here too, and may answer too late
                        await anyio.sleep(0.05)
    joined = identities.restore(folder)
    assert joined is not None
    assert joined.cluster == founder.world.facts.cluster


async def test_a_refused_join_changes_nothing(tmp_path: Path) -> None:
    founder, folder = Founder(tmp_path / "f"), tmp_path / "n"
    old = _found(folder)
    async with founder.open():
        token = parse_token(await founder.world.admission.create_token("node", creator="op"))
    with pytest.raises(Unavailable):  # the cluster is gone
        await join_first(folder, NODE, token, mdns=False)
    restored = identities.restore(folder)
    assert restored is not None
    assert restored.cluster == old.cluster


def test_who_forgets_has_new_keys_next_time(tmp_path: Path) -> None:
    first = _found(tmp_path)
    identities.forget(first)
    assert IdentityFiles(tmp_path).credentials() is None
    second = _found(tmp_path)
    assert second.peer.key_sha256 != first.peer.key_sha256
    assert second.cluster != first.cluster


def test_the_same_key_as_the_rosters_entry(tmp_path: Path) -> None:
    identity = _found(tmp_path)
    record = identity.record(5.0, ("192.0.2.7",))
    request = ca.make_request(identity.keys.tls)
    assert record.key_sha256 == ca.public_key_sha256(ca.check_request(request))
    assert isinstance(record, NodeRecord)
    assert identity.cluster_keys is not None
    renewed = issue(
        identity.cluster_keys, ClusterFacts(cluster=identity.cluster), record, request, observed="", now=5.0
    )
    assert renewed.role == "server"
