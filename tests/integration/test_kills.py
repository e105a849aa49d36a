"""`kill -9` of who sends, who receives and the registry, at random points: it goes on, no byte is wrong.

Real processes, a real registry, mutual TLS. `FAULT_KILLS=25` (make accept-swarm) for 50.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import pytest
from tests.movers import MIB, Mover, movers, noted, push
from tests.registries import debian_registry

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

KILLS = int(os.environ.get("FAULT_KILLS", "2"))
"""Of each of the two ways; both sides in turn."""
SIZE = 24 * MIB + 12_345
RATE = 40.0 * MIB
FEW = 16
"""MiB that one kill may cost: what came since the last note (4 MiB, twice at most) and what was on
its way (8 pieces of 1 MiB)."""


class Victim(Protocol):
    def kill(self) -> None: ...

    def start(self) -> None: ...


class Bringing:
    """One blob, brought again and again, while some are killed."""

    def __init__(self, receiver: Mover, source: str, content: bytes, chance: random.Random) -> None:
        self.receiver = receiver
        self.source = source
        self.content = content
        self.chance = chance
        self.brought = 0

    def run(self, victims: Sequence[Victim], kills: int) -> None:
        """Each in turn, at random points; then what is under way is brought to its end."""
        self.receiver.fetch(self.source)
        for number in range(kills):
            victim = victims[number % len(victims)]
            enough = self.written + self.chance.randrange(SIZE)
            while self.written < enough and not self._look():
                time.sleep(0.001)
            time.sleep(self.chance.random() * 0.05)  # it is somewhere then, also in its last steps
            victim.kill()
            here = self._left_behind() if victim is self.receiver else 0
            victim.start()
            if victim is self.receiver:
                assert self.receiver.fetch(self.source) >= here, "it goes on from what was noted"
        brought = self.brought
        while self.brought == brought and not self._look(again=False):
            time.sleep(0.001)

    @property
    def written(self) -> int:
        return self.receiver.counts.read()[2]

    def _left_behind(self) -> int:
        """Bytes that the killed receiver will go on from."""
        if not self.receiver.file.exists():
            return noted(self.receiver.staging, self.content)
        self._whole()
        for left in self.receiver.staging.iterdir():
            left.unlink()
        return 0

    def _look(self, *, again: bool = True) -> bool:
        """Whether it is there; then, `again`, it is brought anew."""
        said = self.receiver.heard()
        if said is None:
            return False
        if said == "done":
            self._whole()
            if again:
                self.receiver.fetch(self.source)
            return True
        assert said.startswith("failed unavailable"), said
        self.receiver.fetch(self.source)
        return False

    def _whole(self) -> None:
        assert self.receiver.file.read_bytes() == self.content
        self.receiver.file.unlink()
        self.brought += 1


def few(what: str, bytes_: int, brought: int, kills: int) -> None:
    """Prints what came twice and asserts that it is little."""
    again = (bytes_ - brought * SIZE) / MIB
    print(
        f"{what}: {kills} kills, {brought} blobs brought; again {again:.1f} MiB, {again / kills:.1f} a kill"
    )
    assert 0 <= again <= FEW * kills


@pytest.fixture
def chance() -> random.Random:
    return random.Random(int(os.environ.get("FAULT_SEED", "7")))


def test_who_gives_and_who_receives_are_killed(tmp_path: Path, chance: random.Random) -> None:
    content = chance.randbytes(SIZE)
    with movers(tmp_path, ("n0", "n1"), ("n0",), content, "127.0.0.1:1", RATE) as nodes:
        bringing = Bringing(nodes["n1"], "n0", content, chance)
        bringing.run((nodes["n1"], nodes["n0"]), KILLS)
        few("sender and receiver", nodes["n0"].counts.read()[0], bringing.brought, KILLS)


def test_the_registry_and_who_pulls_are_killed(tmp_path: Path, chance: random.Random) -> None:
    content = chance.randbytes(SIZE)
    with debian_registry(tmp_path / "registry") as registry:
        push(registry.host, content)
        with movers(tmp_path / "nodes", ("n0",), (), content, registry.host, RATE) as nodes:
            bringing = Bringing(nodes["n0"], "registry", content, chance)
            bringing.run((registry, nodes["n0"]), KILLS)
            few("registry and receiver", nodes["n0"].counts.read()[1], bringing.brought, KILLS)
