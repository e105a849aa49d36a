"""How many connections there may be, and how many of them are one stranger's."""

from __future__ import annotations

import resource
from types import SimpleNamespace
from typing import Any

import pytest

from ollama_distributed.gateway.connections import SLICE, Watch, origin_of
from ollama_distributed.gateway.limits import Limits


class Connection:
    loop: Any = SimpleNamespace(call_later=lambda *_: SimpleNamespace(cancel=lambda: None))

    def check_deadlines(self, now: float) -> None:
        """It has none."""


def taken(watch: Watch, origin: str, tries: int = 10_000) -> list[Connection]:
    """Those of so many that found a place."""
    found = [Connection() for _ in range(tries)]
    return [one for one in found if watch.add(one, origin)]


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("127.0.0.1", ""),
        ("127.9.9.9", ""),
        ("::1", ""),
        ("::ffff:127.0.0.1", ""),
        ("", ""),
        ("10.0.0.9", "10.0.0.9"),
        ("::ffff:10.0.0.9", "10.0.0.9"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_who_is_behind_an_address(host: str, origin: str) -> None:
    assert origin_of(host) == origin


def test_one_stranger_does_not_take_all_places() -> None:
    watch = Watch(Limits(connections=1000, strangers=64))
    held = taken(watch, "10.0.0.9")
    assert len(held) == 500, "more than it may later, while there is room"
    assert len(taken(watch, "10.0.0.8")) == 64
    assert len(taken(watch, "")) == 436, "whoever needs not say who it is has the rest"
    for one in held[:437]:
        watch.remove(one)
    assert len(taken(watch, "10.0.0.9")) == 1, "it holds 63 still"


def test_who_has_said_who_it_is_counts_no_more() -> None:
    watch = Watch(Limits(connections=100, strangers=10))
    first = taken(watch, "10.0.0.9", 50)
    assert not taken(watch, "10.0.0.9", 1)
    for one in first:
        watch.knows(one)
        watch.knows(one)
    assert len(taken(watch, "10.0.0.9")) == 10
    for one in first:
        watch.remove(one)
    assert len(watch) == 10


@pytest.mark.parametrize(("files", "most"), [(10, 8), (1, 1), (10**6, 4096), (resource.RLIM_INFINITY, 4096)])
def test_files_are_left_for_the_rest(files: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    assert len(taken(Watch(Limits()), "")) == most


def test_who_is_late_together_is_not_cut_together() -> None:
    """Thousands at once would hold the loop for a fifth of a second."""
    soon: list[tuple[Any, ...]] = []
    timers: list[tuple[Any, ...]] = []
    loop = SimpleNamespace(
        time=lambda: 7.0,
        call_soon=lambda *call: soon.append(call),
        call_later=lambda _after_s, *call: timers.append(call) or SimpleNamespace(cancel=lambda: None),
    )
    watch, seen = Watch(Limits()), list[int]()

    class Late(Connection):
        def __init__(self, number: int) -> None:
            self.loop, self.number = loop, number

        def check_deadlines(self, now: float) -> None:
            assert now == 7.0
            seen.append(self.number)
            watch.remove(self)

    many = [Late(number) for number in range(3 * SLICE + 1)]
    assert all(watch.add(one) for one in many)
    check, *arguments = timers.pop()
    check(*arguments)
    turns = [len(seen)]
    watch.remove(many[next(number for number in range(len(many)) if number not in seen)])
    while soon:
        call, *arguments = soon.pop()
        call(*arguments)
        turns.append(len(seen) - sum(turns))
    assert max(turns) == SLICE
    assert len(seen) == len(set(seen)) == len(many) - 1, "who went meanwhile is left alone"
