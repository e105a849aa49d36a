"""One cluster for all scenarios, healed between them, and a table of figures in the end.

CHAOS_LONG=1 (`make accept-cluster`) makes more rounds; CHAOS_SEED repeats a run's pauses.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Protocol

import msgspec
import pytest

from tests import lab
from tests.chaos.load import Load
from tests.chaos.world import World

LONG = os.environ.get("CHAOS_LONG") == "1"
SEED = int(os.environ.get("CHAOS_SEED") or random.randrange(1_000_000))
MACHINES = 5

_HEAD = ("scenario", "answers", "failed", "excused", "slowest", "writes", "unknown", "refused", "outage")
_rows: list[tuple[str, ...]] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _rows:
        return
    widths = [max(map(len, column)) for column in zip(_HEAD, *(row[:-1] for row in _rows), strict=True)]
    terminalreporter.section(f"chaos, seed {SEED}")
    for row in ((*_HEAD, "seconds until"), *_rows):
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=True)]
        terminalreporter.write_line("  ".join([*cells, row[-1]]))


class Scenario:
    """One run of load around one kind of harm."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.took_s: dict[str, float] = {}
        """By what was waited for."""


def note(name: str, waits: str) -> None:
    """A row of the table for what runs without load."""
    _rows.append((name, *[""] * (len(_HEAD) - 1), waits))


class Scenarios(Protocol):
    def __call__(self, name: str) -> AbstractAsyncContextManager[Scenario]: ...


@pytest.fixture(scope="package")
async def lasting_world(request: pytest.FixtureRequest, anyio_backend: str) -> AsyncIterator[World]:
    if reason := lab.available():
        pytest.skip(reason)
    # Short, since a UNIX socket's path may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="od-chaos-"))
    failed_before = request.session.testsfailed
    with lab.network(folder, MACHINES) as network:
        world = World(folder, network)
        try:
            await world.found(3)
            yield world
        finally:
            await world.end()
    if request.session.testsfailed == failed_before:
        shutil.rmtree(folder)
    else:
        print(f"logs and histories: {folder}")


@pytest.fixture
async def world(lasting_world: World) -> AsyncIterator[World]:
    yield lasting_world
    await lasting_world.repair()


@pytest.fixture
def scenario(world: World) -> Scenarios:
    """`async with scenario("name") as run`: load inside; judged and written down at its end."""

    @asynccontextmanager
    async def run(name: str) -> AsyncIterator[Scenario]:
        async with Load(world, SEED + len(_rows)) as load:
            made = Scenario(load)
            load.harmed_at = time.monotonic()
            try:
                yield made
                await load.more_writes(len(world.names))
            finally:
                await load.stop()
                _rows.append(_row(name, made))
                file = world.folder / f"history-{len(_rows)}.json"
                file.write_bytes(msgspec.json.encode({"operations": load.history.slots, "asked": load.asked}))
        await load.judge()

    return run


def _row(name: str, run: Scenario) -> tuple[str, ...]:
    load = run.load
    writes = load.history.counts()
    waits = ", ".join(f"{what} {took_s:.1f}" for what, took_s in run.took_s.items())
    return (
        name,
        str(len(load.asked)),
        str(len(load.failures())),
        str(load.excused()),
        f"{load.longest_answer_s():.1f} s",
        str(writes["done"]),
        str(writes["unknown"]),
        str(writes["refused"]),
        f"{load.write_outage_s():.1f} s",
        waits,
    )
