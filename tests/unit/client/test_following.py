"""What a caller of `events` sees, through gaps and new connections."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ollama_distributed.base.alerts import Alert
from ollama_distributed.client import errors
from ollama_distributed.client.following import Follower


def told(kind: str, **fields: Any) -> str:
    return json.dumps({"type": kind, **fields})


def busy(event: str, node: str, cpu: float) -> str:
    return told("metrics", event=event, id=node, time=1.0, data={"node": node, "cpu_usage": cpu})


def heard(follower: Follower, *messages: str) -> list[tuple[str, str]]:
    return [(event.what, event.id) for text in messages for event in follower.heard(text)[0]]


READY = told("subscribed", channel="metrics", time=1.0)


def test_what_there_is_then_ready_then_changes() -> None:
    follower = Follower(["metrics"], of="a")
    assert [json.loads(one) for one in follower.begin()] == [
        {"type": "subscribe", "channel": "metrics", "id": "a"}
    ]
    assert heard(follower, busy("now", "a", 1.0), READY) == [("now", "a"), ("ready", "")]
    assert heard(follower, busy("changed", "a", 2.0), busy("gone", "a", 2.0)) == [
        ("changed", "a"),
        ("gone", "a"),
    ]


@pytest.mark.parametrize("again", ["gap", "connection"])
def test_after_a_gap_or_a_new_connection_only_what_is_not_as_it_was(again: str) -> None:
    follower = Follower(["metrics"])
    follower.begin()
    heard(follower, *(busy("now", name, 1.0) for name in "abc"), READY)
    if again == "gap":
        events, commands = follower.heard(told("gap", data={"dropped": 3}))
        assert events == []
    else:
        commands = follower.begin()
    assert len(commands) == 1
    assert heard(follower, busy("now", "a", 1.0), busy("now", "b", 9.0), busy("now", "d", 1.0), READY) == [
        ("changed", "b"),
        ("now", "d"),
        ("gone", "c"),
        ("ready", ""),
    ]


def test_what_changes_while_it_is_told_what_there_is() -> None:
    follower = Follower(["metrics"])
    follower.begin()
    assert heard(follower, busy("now", "a", 1.0), busy("gone", "a", 1.0), READY) == [
        ("now", "a"),
        ("gone", "a"),
        ("ready", ""),
    ]


def test_what_is_left_says_nothing_more_though_it_was_on_its_way() -> None:
    follower = Follower(["metrics"], of="a")
    follower.subscribe("metrics", "b")
    follower.begin()
    heard(follower, busy("now", "a", 1.0), READY, busy("now", "b", 1.0), READY)
    assert [json.loads(one)["type"] for one in follower.unsubscribe("metrics", "b")] == [
        "unsubscribe",
        "subscribe",
    ]
    left = told("unsubscribed", channel="metrics", id="b")
    assert heard(follower, busy("changed", "b", 2.0), left, busy("now", "a", 1.0), READY) == [
        ("now", "a"),
        ("ready", ""),
    ]
    assert heard(follower, busy("changed", "a", 2.0)) == [("changed", "a")]


def test_one_may_leave_a_channel_and_come_back_before_the_server_says_so() -> None:
    follower = Follower(["metrics"], of="a")
    follower.begin()
    heard(follower, busy("now", "a", 1.0), READY)
    follower.unsubscribe("metrics", "a")
    follower.subscribe("metrics", "b")
    left = told("unsubscribed", channel="metrics", id="a")
    late = busy("changed", "a", 2.0)
    assert heard(follower, late, left, busy("now", "b", 1.0), READY) == [("now", "b"), ("ready", "")]


def test_a_channel_that_is_refused_or_taken_away() -> None:
    for kind in ("error", "unsubscribed"):
        follower = Follower(["metrics"])
        with pytest.raises(errors.Forbidden, match="not for you"):
            follower.heard(
                told(kind, channel="metrics", data={"code": "forbidden", "message": "not for you"})
            )


def test_why_a_connection_ended() -> None:
    follower = Follower(["metrics"])
    refused = follower.lost(1008, "unauthenticated")
    assert isinstance(refused, errors.Unauthenticated)
    assert not refused.retryable
    assert follower.lost(1013, "an hour is over").retryable


def test_a_newer_server_may_say_more() -> None:
    follower = Follower(["metrics"])
    assert follower.heard(told("something", data={"x": 1}, more=2)) == ([], [])


def alert(event: str, level: str = "error") -> str:
    data = {"level": level, "message": "a is offline", "code": "node_offline", "node": "a"}
    return told("alerts", event=event, id="node_offline/a", time=1.0, data=data)


def test_an_alert_that_was_over_meanwhile_says_so() -> None:
    follower = Follower(["alerts"])
    follower.begin()
    follower.heard(alert("now"))
    ready = told("subscribed", channel="alerts", time=2.0)
    follower.heard(ready)
    follower.begin()
    (gone, _), _ = follower.heard(ready)
    assert isinstance(gone.data, Alert)
    assert (gone.what, gone.data.level, gone.data.message) == ("gone", "info", "over: a is offline")


def test_of_several_things_each_is_asked_and_all_compared() -> None:
    follower = Follower()
    assert follower.begin() == []
    assert len(follower.subscribe("metrics", "a")) == 1
    both = [json.loads(one)["id"] for one in follower.subscribe("metrics", "b")]
    assert both == ["a", "b"]
    first, second = (told("subscribed", channel="metrics", id=of, time=1.0) for of in "ab")
    assert heard(follower, busy("now", "a", 1.0), first) == [("now", "a")]
    assert heard(follower, first, busy("now", "b", 1.0), second) == [("now", "b"), ("ready", "")]
    left = [json.loads(one) for one in follower.unsubscribe("metrics", "b")]
    assert [(one["type"], one["id"]) for one in left] == [("unsubscribe", "b"), ("subscribe", "a")]
    assert heard(follower, told("unsubscribed", channel="metrics", id="b", data=None)) == []
    assert heard(follower, busy("now", "a", 1.0), first) == [("now", "a"), ("ready", "")]
    assert follower.unsubscribe("metrics", "b") == []
    follower.unsubscribe("metrics", "a")
    assert not follower.follows("metrics")
    assert heard(follower, busy("changed", "a", 1.0)) == [], "it was on its way"


def test_of_refused_channels_others_go_on() -> None:
    refused: list[tuple[str, str]] = []
    follower = Follower(
        ["metrics", "nodes"], refused=lambda channel, why: refused.append((channel, why.message))
    )
    follower.begin()
    problem = {"code": "forbidden", "message": "not for you"}
    assert heard(follower, told("error", channel="nodes", data=problem)) == []
    assert refused == [("nodes", "not for you")]
    assert heard(follower, busy("now", "a", 1.0)) == [("now", "a")]
    assert [json.loads(one)["channel"] for one in follower.begin()] == ["metrics"]
    follower.subscribe("metrics", "b")
    assert heard(follower, told("error", channel="metrics", id="b", data=problem)) == []
    assert [json.loads(one)["id"] for one in follower.begin()] == [""], "what was followed already stays"


def test_channels_are_known_by_name() -> None:
    with pytest.raises(ValueError, match="queue"):
        Follower([])
    with pytest.raises(ValueError, match="queue"):
        Follower(["*"])  # type: ignore[list-item]  # that is the point
