"""Models that copy themselves: nodes of one process, real stores, real mutual TLS."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from anyio import CapacityLimiter
from structlog.testing import capture_logs
from tests.swarm_nodes import SwarmNode, swarm

from ollama_distributed.adapters.blobs import partial
from ollama_distributed.base.errors import Conflict, ModelNotFound, NotFound
from ollama_distributed.base.ids import NodeId
from ollama_distributed.distribution.pieces import make_table
from ollama_distributed.distribution.shelves import Shelf
from ollama_distributed.distribution.trust import PEER_LIED
from ollama_distributed.models.manifest import parse_manifest
from ollama_distributed.models.names import ModelName

pytestmark = pytest.mark.integration

MIB = 1 << 20


async def _zeros(_offset: int, length: int) -> bytes:
    return bytes(length)


async def manifest_of(node: SwarmNode, name: str) -> bytes:
    data = await node.hop.catalog.manifest(ModelName.parse(name))
    assert data is not None
    return data


async def test_one_holder_gives_to_three(tmp_path: Path) -> None:
    async with swarm(tmp_path) as nodes:
        a, b, c, d = [await nodes.add(name) for name in "abcd"]
        content = await a.hold("big", 24)
        transfers = await nodes.done(await a.manager.distribute("big"))
        assert [one.state for one in transfers] == ["done"] * 3, transfers
        assert [one.node for one in transfers] == ["b", "c", "d"]
        for node in (b, c, d):
            assert node.content("big") == content
            assert node.staged() == set()
        assert all(one.completed == one.total > 24 * MIB for one in transfers)
        assert all(sum(one.peers.values()) == one.total for one in transfers), "each byte once"
        given = {node.id: node.shelves.sent_bytes / len(content) for node in nodes.all}
        assert sum(given.values()) == pytest.approx(3, abs=0.01)
        assert given[NodeId("a")] < 2, f"the others passed on what they had: {given}"


async def test_who_asks_again_has_it_already(tmp_path: Path) -> None:
    async with swarm(tmp_path) as nodes:
        a, b = [await nodes.add(name) for name in "ab"]
        await a.hold("big", 2)
        await nodes.done(await a.manager.distribute("big"))
        b.tell()
        assert await a.manager.distribute("big") == [], "every node has it"
        (again,) = await nodes.done(await a.manager.distribute("big", ["b-name"]))
        assert (again.state, again.peers) == ("done", {})
        assert a.shelves.sent_bytes < 3 * MIB
        status = await b.manager.get_status("big")
        assert [place.node for place in status.nodes] == ["a", "b"]
        assert status.transfers[0].id == again.id
        with pytest.raises(ModelNotFound):
            await a.manager.distribute("nothing")
        with pytest.raises(NotFound):
            await a.manager.distribute("big", ["nobody"])
        gone = await b.manager.remove("big", ["a", "b", "a"], last_copy=True)
        assert [one.node for one in gone] == ["a", "b"]
        assert b.evicted == [("big", "a", True), ("big", "b", True)]
        with pytest.raises(Conflict, match=r"it is the last copy \(it is gone from a-name\)"):
            await b.manager.remove("big", ["a", "stays"])
        assert [one.model for one in a.manager.list()] == ["big:latest"]
        await b.manager.remove("big")
        assert not a.hop.catalog.knows("big")
        assert len(b.blobs()) == 0


async def test_a_node_that_sends_wrong_bytes_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with swarm(tmp_path) as nodes:
        a, b, c = [await nodes.add(name) for name in "abc"]
        content = await a.hold("big", 12)
        await b.hold("big", 12)
        honest = b.shelves._bytes

        a.rate = MIB  # or it has given all before the liar is asked, whose thread may be late

        async def lying(shelf: Shelf, offset: int, length: int) -> bytes:
            a.rate = 0.0
            data = await honest(shelf, offset, length)
            return bytes(data[:-1]) + bytes([data[-1] ^ 1]) if data else data

        monkeypatch.setattr(b.shelves, "_bytes", lying)
        with capture_logs() as logs:
            (done,) = await nodes.done(await a.manager.distribute("big", ["c"]))
        assert (done.state, done.dropped) == ("done", ("b",))
        assert c.content("big") == content
        assert set(done.peers) == {"a"}
        figures = c.swarm.figures()
        assert figures.lies >= 1
        assert figures.again >= 1
        assert figures.received_bytes >= len(content)
        assert figures.received_per_s > 0
        assert [line["node"] for line in logs if line["event"] == PEER_LIED] != []
        told, given = c.manager.figures(), a.manager.figures()
        assert 1 <= told.lies <= 2, "of the model, maybe of its configuration, too"
        assert done.total == told.received_bytes <= given.sent_bytes


async def test_a_wrong_table_is_found_by_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with swarm(tmp_path) as nodes:
        a, b, c = [await nodes.add(name) for name in "abc"]
        content = await a.hold("big", 6)
        await b.hold("big", 6)

        async def lying(_shelf: Shelf, offset: int, length: int) -> bytes:
            return bytes(length)

        zeros = await make_table(len(content), _zeros, CapacityLimiter(1))
        layer = next(layer for layer in parse_manifest(await manifest_of(a, "big")).layers)
        shelf = b.shelves.lay(layer.blob, zeros, _zeros)
        for piece in range(zeros.pieces):
            shelf.add(piece)
        monkeypatch.setattr(b.shelves, "_bytes", lying)
        a.rate = MIB  # the liar's table comes first, and so do its bytes
        (done,) = await nodes.done(await b.manager.distribute("big", ["c"]))
        assert done.state == "done", done
        assert "b" in done.dropped
        assert c.content("big") == content


async def test_when_all_lie_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with swarm(tmp_path) as nodes:
        a, b = [await nodes.add(name) for name in "ab"]
        await a.hold("big", 2)

        async def lying(_shelf: Shelf, _offset: int, length: int) -> bytes:
            return bytes(length)

        monkeypatch.setattr(a.shelves, "_bytes", lying)
        (done,) = await nodes.done(await a.manager.distribute("big", ["b"]))
        assert (done.state, done.code) == ("failed", "registry_error")
        assert not b.hop.catalog.knows("big")
        assert b.blobs() == set()


async def test_cancelled_and_taken_up_again(tmp_path: Path) -> None:
    """From another node, too; a piece that rotted meanwhile is fetched again."""
    async with swarm(tmp_path) as nodes:
        a, b, c = [await nodes.add(name) for name in "abc"]
        content = await a.hold("big", 16)
        a.rate = 8 * MIB
        (begun,) = await a.manager.distribute("big", ["b"])
        some = await nodes.when(begun, lambda now: now.completed >= 6 * MIB)
        assert some.rate > MIB
        assert some.eta_s is not None
        assert begun.id in {one.id for one in await c.manager.transfers()}
        await c.manager.cancel(begun.id)
        ended = await nodes.ended(begun)
        assert ended.state == "cancelled"
        assert not b.hop.catalog.knows("big")
        (half,) = (b.folder / ".ollama-distributed").glob("partial-????????????????????????????????*[!l]")
        with half.open("r+b") as file:
            file.write(b"\0" * 100)
        a.rate = 0.0
        (done,) = await nodes.done(await a.manager.distribute("big", ["b"]))
        assert done.state == "done", done
        again = sum(done.peers.values())
        assert again <= len(content) - 4 * MIB, f"{again} bytes came again"
        assert b.content("big") == content
        assert b.staged() == set()


async def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with swarm(tmp_path) as nodes:
        a, b, c = [await nodes.add(name) for name in "abc"]
        content = await a.hold("big", 8)
        monkeypatch.setattr(b.hop.store._folders, "room_bytes", lambda: 1000)
        full, fine = await nodes.done(await a.manager.distribute("big"))
        assert (full.node, full.state, full.code) == ("b", "failed", "disk_full")
        assert (b.staged(), b.blobs()) == (set(), set())
        assert fine.state == "done"
        assert c.content("big") == content


async def test_a_full_disk_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with swarm(tmp_path) as nodes:
        a, b = [await nodes.add(name) for name in "ab"]
        await a.hold("big", 8)
        written = 0

        def pwrite(file: int, data: memoryview, at: int) -> int:
            nonlocal written
            written += len(data)
            if written > 4 * MIB:
                raise OSError(errno.ENOSPC, "no space")
            return os.pwrite(file, data, at)

        monkeypatch.setattr(partial, "os", SimpleNamespace(**{**vars(os), "pwrite": pwrite}))
        (full,) = await nodes.done(await a.manager.distribute("big"))
        assert (full.state, full.code) == ("failed", "disk_full")
        assert (b.staged(), b.blobs()) == (set(), set())


async def test_the_slow_do_not_hold_up(tmp_path: Path) -> None:
    """One holder has a slow link: the other gives nearly all."""
    async with swarm(tmp_path) as nodes:
        a, b, c = [await nodes.add(name) for name in "abc"]
        content = await a.hold("big", 24)
        await b.hold("big", 24)
        b.rate = 0.5 * MIB
        a.rate = 24 * MIB
        began = time.monotonic()
        (done,) = await nodes.done(await a.manager.distribute("big", ["c"]))
        took_s = time.monotonic() - began
        assert done.state == "done"
        assert c.content("big") == content
        slow = (
            b.rate * took_s + 2 * MIB
        )  # what its link brings while the other one is at work, and a piece more
        assert done.peers.get("b", 0) <= slow, (done.peers, took_s)
        assert done.peers["a"] >= len(content) - slow


async def test_a_holder_goes_away_in_the_middle(tmp_path: Path) -> None:
    async with swarm(tmp_path) as nodes:
        a, b, c = [await nodes.add(name) for name in "abc"]
        content = await a.hold("big", 16)
        await b.hold("big", 16)
        a.rate = b.rate = 6 * MIB
        (begun,) = await c.manager.distribute("big", ["c"])
        await nodes.when(begun, lambda now: now.completed > 4 * MIB)
        await a.hop.door.close()
        b.rate = 0.0
        done = await nodes.ended(begun)
        assert done.state == "done", done
        assert c.content("big") == content


async def test_the_only_holder_goes_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with swarm(tmp_path) as nodes:
        a, b, c = [await nodes.add(name) for name in "abc"]
        await a.hold("big", 16)
        a.rate = 6 * MIB
        nodes.all.reverse()
        b.swarm.stall_s = 1.0
        (begun,) = await a.manager.distribute("big", ["b"])
        await nodes.when(begun, lambda now: now.completed > 4 * MIB)
        await a.hop.door.close()
        failed = await nodes.ended(begun)
        assert (failed.state, failed.code) == ("failed", "unavailable")
        assert failed.error.startswith("no node that can be reached has what is missing")
        assert len(b.staged()) == 2, "what came stays for the next time"
        assert not b.hop.catalog.knows("big")
        (gone,) = await c.manager.distribute("big", ["a"])
        assert (gone.state, gone.node, gone.code) == ("failed", "a", "unavailable")
        assert (await c.manager.transfer(gone.id)) == gone


async def test_a_blob_that_went_away_is_not_given(tmp_path: Path) -> None:
    async with swarm(tmp_path) as nodes:
        a, b = [await nodes.add(name) for name in "ab"]
        await a.hold("big", 2)
        await nodes.done(await a.manager.distribute("big"))
        await b.hop.catalog.delete("big")
        for blob in (a.folder / "blobs").iterdir():
            blob.unlink()
        b.swarm.stall_s = 0.5
        (failed,) = await nodes.done(await a.manager.distribute("big", ["b"]))
        assert (failed.state, failed.code) == ("failed", "unavailable")
        assert b.blobs() == set()
