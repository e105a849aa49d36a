"""The coordination server dies under writes: nothing acknowledged is lost, watches go on."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path

import anyio
import psutil
import pytest
import structlog
from tests.limits import SOON_S, limit_s
from tests.suspended import suspended
from tests.trust import Trust
from tests.voters import written

from ollama_distributed.adapters.coordination.nats import binary
from ollama_distributed.adapters.coordination.nats.client import NatsCoordination
from ollama_distributed.adapters.coordination.nats.server import CONFIG_NAME, NatsServer
from ollama_distributed.base.errors import Conflict, DeadlineExceeded, Unavailable
from ollama_distributed.cluster.ports import ABSENT, REFUSAL_S, Entry, Resync

pytestmark = [pytest.mark.anyio, pytest.mark.integration]

KILLS = int(os.environ.get("COORDINATION_KILLS", "3"))


async def _until(met: Callable[[], bool]) -> None:
    with anyio.fail_after(SOON_S):
        while not met():  # what is waited for happens in another process
            await anyio.sleep(0.01)


async def _grown(history: dict[int, tuple[str, bytes]], count: int) -> None:
    wanted = len(history) + count
    await _until(lambda: len(history) >= wanted)


def _restarted(server: NatsServer, times: int) -> bool:
    return server.restarts >= times


@pytest.mark.timeout(240 + 60 * KILLS)
async def test_kills_under_writes_lose_nothing(tmp_path: Path) -> None:
    acknowledged: dict[int, tuple[str, bytes]] = {}
    seen: dict[int, tuple[str, bytes]] = {}
    disorder: list[tuple[int, int]] = []
    stop = anyio.Event()

    trust = Trust(tmp_path)
    async with (
        trust.server("n1") as server,
        NatsCoordination(trust.address(server, node="writer"), name="writer", create=True) as writer,
        NatsCoordination(trust.address(server, node="watcher"), name="watcher") as watcher,
    ):

        async def write(key: str) -> None:
            count, revision = 0, ABSENT
            while not stop.is_set():
                count += 1
                value = f"{key} {count}".encode()
                try:
                    revision = await writer.put(key, value, revision=revision)
                    acknowledged[revision] = (key, value)
                except (Unavailable, DeadlineExceeded, Conflict):
                    await anyio.sleep(0.05)
                    try:
                        entry = await writer.get(key)
                    except Unavailable:
                        continue
                    revision = entry.revision if entry else ABSENT

        async def follow() -> None:
            last = 0
            async with watcher.watch("w.") as events:
                async for event in events:
                    entries = event.entries if isinstance(event, Resync) else (event,)
                    if event.revision < last or (event.revision == last and not isinstance(event, Resync)):
                        disorder.append((last, event.revision))
                    last = event.revision
                    for entry in entries:
                        assert isinstance(entry, Entry)
                        seen[entry.revision] = (entry.key, entry.value)

        async with anyio.create_task_group() as group:
            group.start_soon(follow)
            for i in range(4):
                group.start_soon(write, f"w.{i}")
            for kill in range(KILLS):
                await _grown(acknowledged, 50)
                await _grown(seen, 20)  # it connects by itself, and may come later than the writer
                os.kill(server.pid, signal.SIGKILL)
                await _until(partial(_restarted, server, kill + 1))
            await _grown(acknowledged, 50)
            stop.set()
            last = max(acknowledged)
            await _until(lambda: max(seen, default=0) >= last)
            group.cancel_scope.cancel()

        assert disorder == []
        for i in range(4):
            key = f"w.{i}"
            newest = max(r for r, (k, _) in acknowledged.items() if k == key)
            entry = await writer.get(key)
            assert entry is not None
            assert entry.revision >= newest, "an acknowledged write was lost"
            if entry.revision == newest:
                assert entry.value == acknowledged[newest][1]
        shared = acknowledged.keys() & seen.keys()
        assert len(shared) > 20
        assert all(seen[r] == acknowledged[r] for r in shared)


async def test_writes_are_refused_while_the_server_is_away(tmp_path: Path) -> None:
    trust = Trust(tmp_path)
    async with (
        trust.server("n1") as server,
        NatsCoordination(trust.address(server, node="one"), name="one", create=True) as one,
    ):
        revision = await written(one, "k", b"1")
        await one.scan()
        with suspended(server.pid):
            started = anyio.current_time()
            with pytest.raises((Unavailable, DeadlineExceeded)):
                await one.put("k", b"2", revision=revision)
            waited_s = anyio.current_time() - started
            assert waited_s < limit_s(REFUSAL_S + 2)
            started = anyio.current_time()
            with pytest.raises(Unavailable):
                await one.put("k", b"3", revision=revision)
            assert anyio.current_time() - started < waited_s / 2, "known to be away: refused at once"
            assert [e.key for e in (await one.scan()).entries] == ["k"], "the mirror answers alone"
        await _until(lambda: bool(one.writable))
        entry = await one.get("k")
        assert entry is not None
        await written(one, "k", b"4", revision=entry.revision)


async def test_a_disk_that_refuses_for_a_while_does_not_end_the_restarts(tmp_path: Path) -> None:
    trust, kept = Trust(tmp_path), tmp_path / "n1" / CONFIG_NAME
    async with trust.server("n1") as server:
        aside = kept.rename(tmp_path / "aside")
        kept.mkdir()  # it cannot be replaced by a file
        with structlog.testing.capture_logs() as logs:
            os.kill(server.pid, signal.SIGKILL)
            await _until(lambda: sum("Is a directory" in str(line.get("reason")) for line in logs) >= 2)
        kept.rmdir()
        aside.rename(kept)
        await _until(partial(_restarted, server, 1))
        async with NatsCoordination(trust.address(server, node="one"), name="one", create=True) as one:
            assert await written(one, "k", b"1")


async def test_the_server_keeps_its_secrets_and_its_store(tmp_path: Path) -> None:
    trust, folder = Trust(tmp_path), tmp_path / "n1"
    async with trust.server("n1") as server:
        assert stat.S_IMODE((folder / CONFIG_NAME).stat().st_mode) == 0o600
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        listening = {
            c.laddr.ip for c in psutil.Process(server.pid).net_connections("inet") if c.status == "LISTEN"
        }
        assert listening == {"127.0.0.1"}
        pid = server.pid
        async with NatsCoordination(trust.address(server, node="one"), name="one", create=True) as one:
            revision = await written(one, "k", b"1")
    assert not psutil.pid_exists(pid)
    async with (
        trust.server("n1") as server,
        NatsCoordination(trust.address(server, node="one"), name="one", create=True) as one,
    ):
        assert await one.get("k") == Entry("k", b"1", revision)


def test_a_program_that_is_not_nats_server_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "nats-server"
    other.write_bytes(b"#!/bin/sh\n")
    with pytest.raises(Unavailable, match="not a build of"):
        binary.find(other)
    with pytest.raises(Unavailable, match="cannot read"):
        binary.find(tmp_path / "missing")
    old = tmp_path / "old"
    old.write_bytes(
        b"path\tgithub.com/nats-io/nats-server/v2\nmod\tgithub.com/nats-io/nats-server/v2\tv2.9.10\t"
    )
    with pytest.raises(Unavailable, match=r"2\.9\.10"):
        binary.find(old)
    assert binary.find().version >= binary.MIN_VERSION
