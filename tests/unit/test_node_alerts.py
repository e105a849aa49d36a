"""What a node says is wrong with itself, and what a cluster makes of what its nodes say."""

from __future__ import annotations

from typing import Any

from ollama_distributed.base.alerts import MOST_TEXT, Alert
from ollama_distributed.base.ids import NodeId
from ollama_distributed.distribution.disk import Above
from ollama_distributed.gateway.overload import Overload
from ollama_distributed.gateway.ports import Preloaded
from ollama_distributed.node.alerts import OwnAlerts
from ollama_distributed.node.cluster import alerts
from ollama_distributed.serving.quarantine import Crashed
from ollama_distributed.state import keys
from ollama_distributed.state.cluster import ClusterState, apply
from ollama_distributed.state.codec import encode
from ollama_distributed.state.records import Advert, Lease, Member


class Clock:
    def monotonic(self) -> float:
        return 0.0

    def time(self) -> float:
        return 1000.0


class Disk:
    above: Above | None = None


def state(**status: Any) -> ClusterState:
    found = ClusterState()
    for number, (name, how) in enumerate(status.items()):
        node = NodeId(f"{name}-id")
        advert = Advert(node=node, name=name, role="node", version="1", boot="b", started_at=0.0)
        member = Member(node=node, status=how, since=5.0)
        found = apply(found, keys.advert(node), encode(advert), 2 * number + 1)
        found = apply(found, keys.member(node), encode(member), 2 * number + 2)
    return found


LEASE = Lease(node=NodeId("a-id"), epoch=1)


def test_a_node_tells_of_its_memory_its_disk_and_its_models() -> None:
    overload, crashed = Overload(), list[Crashed]()
    own, disk = OwnAlerts("gpu1", overload, lambda: crashed, Clock()), Disk()
    rows: dict[str, Preloaded] = {"m": Preloaded("loaded")}
    assert own.now() == []
    own.know(disk, lambda: rows)  # type: ignore[arg-type]  # what is asked of it
    assert own.now() == []
    overload.measured(85, 100)
    disk.above = Above("; of the models here stay: 1 loaded", 900.0)
    crashed.append(Crashed("m:1b", 200.0, "killed by signal 11\n" + "x" * 1000))
    rows["n"] = Preloaded("failed", "no such model")
    found = own.now()
    assert [(one.level, one.code) for one in found] == [
        ("error", "model_quarantined"),
        ("warning", "memory_short"),
        ("warning", "disk_full"),
        ("warning", "preload_failed"),
    ]
    assert found[0].message.startswith(
        "m:1b crashed too often at gpu1 and is not loaded there until 00:20 UTC"
    )
    assert found[0].message.endswith("; if it goes on then, see the log of gpu1")
    assert all(len(one.message) <= MOST_TEXT for one in found)
    assert [one.model for one in found] == ["m:1b", "", "", "n"]
    assert "1 loaded" in found[2].message
    assert "node disk gpu1" in found[2].message
    assert found[2].since == 900.0
    overload.measured(92, 100)
    assert ("error", "memory_short") in [(one.level, one.code) for one in own.now()]


def test_a_node_speaks_of_itself_only_and_while_it_lives() -> None:
    known = state(a="online", b="offline")
    lie = Alert(level="error", code="disk_full", message="it is full", node="b-id", name="b")
    told = {NodeId(name): (lie,) for name in ("a-id", "b-id", "gone-id")}
    (one,) = alerts.of_nodes(told, known)
    assert (one.node, one.name, one.code) == ("a-id", "a", "disk_full")


def test_nodes_that_are_away_are_told_with_since_when() -> None:
    found = alerts.of_state(state(a="online", b="offline", c="suspect"), LEASE)
    assert [(one.level, one.code, one.node, one.since) for one in found] == [
        ("error", "node_offline", "b-id", 5.0),
        ("warning", "node_suspect", "c-id", 5.0),
    ]
    assert alerts.of_state(state(a="online"), LEASE) == []


def test_what_several_see_is_told_once() -> None:
    lost = alerts.of_damage([NodeId("c-id")], state(c="online"))
    seen = alerts.of_nodes({NodeId("a-id"): lost, NodeId("b-id"): lost}, state(a="online", b="online"))
    assert len(seen) == 2
    assert alerts.each_once([*lost, *seen]) == lost


def test_how_a_node_stands_with_coordination() -> None:
    assert alerts.of_link("", up=True) == []
    assert [one.level for one in alerts.of_link("", up=False)] == ["info"]
    assert [one.message for one in alerts.of_link("no disk", up=False)] == ["no disk"]
    assert alerts.of_front("") == []
    assert [one.code for one in alerts.of_front("other machines cannot connect")] == ["listener_closed"]
