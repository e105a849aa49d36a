"""The machine that moves the state dies at every step: it comes back with one or three servers,
all of the state, the same revisions, and writes."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from tests.integration import growth_crash
from tests.limits import SOON_S
from tests.voters import Voters, again, written

from ollama_distributed.adapters.coordination.nats.journal import COPY_NAME, JOURNAL_NAME, SET_ASIDE
from ollama_distributed.base.errors import Unavailable
from ollama_distributed.cluster.ports import Entry

pytestmark = [pytest.mark.anyio, pytest.mark.integration, pytest.mark.slow, pytest.mark.untraced]

ONWARD = ("settled", "thawed")
"""From here on the three servers hold the state; before, the one does."""
ROOT = Path(__file__).parents[2]


async def _crash(folder: Path, point: str) -> int:
    """Until it has killed itself; the revision of `held`."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.integration.growth_crash",
        str(folder),
        point,
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        with anyio.fail_after(2 * SOON_S):  # Python starts, then servers, and they may grow twice
            said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == -signal.SIGKILL, f"it did not get to {point!r}"
    return int(next(line for line in said.decode().splitlines() if line.startswith("held ")).split()[1])


async def _servers_gone(folder: Path) -> None:
    """They are told by their parent's death (SIGTERM) and close their files."""
    with anyio.fail_after(SOON_S):
        for pid in _pids(folder):
            while _alive(pid):
                await anyio.sleep(0.02)


def _pids(folder: Path) -> list[int]:
    return [int(ports.stem.rpartition("_")[2]) for ports in folder.glob("*/*.ports")]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("point", growth_crash.POINTS)
async def test_a_crash_in_the_middle_of_growth(tmp_path: Path, point: str) -> None:
    held = await _crash(tmp_path, point)
    await _servers_gone(tmp_path)
    back = Voters(tmp_path)
    back.trust.keys = pickle.loads((tmp_path / growth_crash.TRUST_NAME).read_bytes())
    try:
        await back.growth.__aenter__()
        if point in ONWARD:
            assert back.growth.formation is not None
            for name in ("n2", "n3"):
                await back[name].start()
        else:
            assert back.growth.formation is None
        with anyio.fail_after(SOON_S):
            while not back.growth.settled:
                await anyio.sleep(0.02)
        folder = back.server("n1").folder
        assert not any((folder / name).exists() for name in (JOURNAL_NAME, COPY_NAME, SET_ASIDE))
        async with back.client("one") as one:
            entry = await _eventually(one.get, "held")
            assert entry == Entry("held", b"1", held)
            state = await _eventually(one.scan)
            assert len([e for e in state.entries if e.key.startswith("k.")]) == 300
            assert await written(one, "held", b"2", revision=held) > held
            if point not in ONWARD:  # what was begun can be done now
                formation = await again(lambda: back.growth.to_three(back.hosts("n2", "n3")))
                one.update_servers(formation.urls)
                assert (await _eventually(one.get, "held")).value == b"2"
        await back.agree(["n1", "n2", "n3"])
    finally:
        await back.close()


async def _eventually(call: Callable[..., Awaitable[Any]], *arguments: str) -> Any:
    with anyio.fail_after(SOON_S):
        while True:
            try:
                return await call(*arguments)
            except Unavailable:
                await anyio.sleep(0.05)


@pytest.mark.parametrize("point", growth_crash.BACK_POINTS)
async def test_a_crash_on_the_way_back_to_one(tmp_path: Path, point: str) -> None:
    held = await _crash(tmp_path, point)
    await _servers_gone(tmp_path)
    back = Voters(tmp_path)
    back.trust.keys = pickle.loads((tmp_path / growth_crash.TRUST_NAME).read_bytes())
    others = back.hosts("n2", "n3")
    try:
        await back.growth.__aenter__()
        alone = point in ("one-settled", "one-thawed")
        assert (back.growth.formation is None) == alone
        if not alone:
            for host in others:
                await host.start()
        with anyio.fail_after(SOON_S):
            while not back.growth.settled:
                await anyio.sleep(0.02)
        async with back.client("one") as one:
            entry = await _eventually(one.get, "held")
            assert entry == Entry("held", b"1", held)
            revision = await written(one, "held", b"2", revision=held)
            if not alone:  # all three hold the state, and what was begun can be done now
                await back.agree(["n1", "n2", "n3"])
                await back.growth.to_one(others)
                one.update_servers(back.urls)
                assert await _eventually(one.get, "held") == Entry("held", b"2", revision)
            state = await _eventually(one.scan)
            assert len([e for e in state.entries if e.key.startswith("k.")]) == 300
    finally:
        await back.close()
