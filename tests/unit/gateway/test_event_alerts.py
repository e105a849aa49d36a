"""The channel `alerts`: since when, until when, and for whom."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest

from ollama_distributed.base.alerts import MOST, MOST_TEXT, Alert, clipped, decode, encode
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.policies import Policy
from ollama_distributed.gateway.events.alerts import UNHEARD_S, Alerts
from ollama_distributed.gateway.events.channels import told_to
from ollama_distributed.gateway.events.rows import Row

AWAY = Alert(level="error", code="node_offline", message="b is offline", node="b-id", name="b", since=7.0)
FULL = Alert(level="warning", code="disk_full", message="the disk is full; delete", node="a-id", name="a")
CRASHED = Alert(
    level="error",
    code="model_quarantined",
    message="covert:1b crashed",
    node="a-id",
    name="a",
    model="covert",
)


class Told:
    """The channel, of a cluster whose alerts a test sets."""

    def __init__(self) -> None:
        self.found: list[Alert] = []
        self.now = 100.0
        cluster: Any = self
        self._channel = Alerts(cluster, lambda: self.now)

    async def alerts(self) -> list[Alert]:
        return self.found

    async def ask(self, *found: Alert) -> list[tuple[str, bool, dict[str, Any]]]:
        self.found = list(found)
        self.now += 2.0
        rows: Iterable[Row] = await self._channel.ask()
        return [(row.id, row.over, json.loads(row.data)) for row in rows]


async def test_it_holds_since_it_began_or_was_seen_and_says_when_it_is_over() -> None:
    told = Told()
    assert await told.ask() == []
    away, full = await told.ask(AWAY, FULL)
    assert away[2]["since"] == 7.0
    assert full[2]["since"] == told.now
    first = told.now
    _, full = await told.ask(AWAY, FULL)
    assert full[2]["since"] == first, "it is no other one"
    _, (name, over, data) = await told.ask(AWAY)
    assert (name, over) == ("disk_full/a-id", True)
    assert (data["level"], data["message"]) == ("info", "over: the disk is full")
    assert [over for _, over, _ in await told.ask(AWAY)] == [False]


async def test_what_was_known_before_nobody_listened_is_no_news() -> None:
    told = Told()
    await told.ask(AWAY)
    told.now += UNHEARD_S
    assert await told.ask() == []


async def test_a_model_is_not_named_to_whom_it_does_not_exist() -> None:
    told = Told()
    await told.ask(CRASHED)
    told.found = [CRASHED]
    (row,) = list(await told._channel.ask())
    free, bound = Identity("viewer"), Identity("viewer", policy=Policy(name="p", models=("open*",)))
    assert json.loads(told_to(free, row))["model"] == "covert"
    assert b"covert" not in told_to(bound, row)
    assert "covert" not in row.id
    assert json.loads(told_to(bound, row))["name"] == "a"


def test_alerts_travel_bounded_and_unknown_kinds_are_left_out() -> None:
    assert encode([]) == b""
    assert decode(b"") == ()
    assert decode(encode([FULL] * 20)) == (FULL,) * MOST
    assert decode(b"\xff\x00") == ()
    odd = encode([FULL]).replace(b"\xa7warning", b"\xa7unheard")
    assert decode(odd) == ()


@pytest.mark.parametrize("text", ["x" * 1000, "two\nlines" * 200])
def test_a_message_is_one_line_that_fits(text: str) -> None:
    line = clipped(text)
    assert len(line) <= MOST_TEXT
    assert "\n" not in line
    assert clipped(line) == line
