"""Places as people see them: over the SDK's form, and as text."""

from __future__ import annotations

import msgspec

from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.placement import PlacementFigures, PlaceRow, PlacesAnswer
from ollama_distributed.cli import places_view
from ollama_distributed.cli.tables import Look
from ollama_distributed.gateway.metrics import GatewayMetrics
from ollama_distributed.placement.facts import Rules
from ollama_distributed.placement.showing import look, places
from ollama_distributed.placement.wishes import Policy
from ollama_distributed.state import keys
from ollama_distributed.state.cluster import ClusterState, apply
from ollama_distributed.state.codec import encode
from ollama_distributed.state.records import (
    Advert,
    Assigned,
    AssignedModel,
    Desired,
    FailedTask,
    HeldModel,
    Holdings,
    Intent,
    LoadedPlace,
    Member,
    Placed,
    Task,
)

GIB = 1 << 30
A, B, C = NodeId("a"), NodeId("b"), NodeId("c")
HELD = HeldModel(
    name="m", display="m", digest="1", size_bytes=GIB, modified_at=2.0, layers=1, context_tokens=64
)
OLD = msgspec.structs.replace(HELD, digest="0", modified_at=1.0)


class Seen:
    def __init__(self) -> None:
        self.state = ClusterState()
        for node in (A, B, C):
            self.put(
                keys.advert(node),
                Advert(node=node, name=f"{node}-name", role="node", version="1", boot="b", started_at=1.0),
            )
            self.put(keys.member(node), Member(node=node, status="online", since=1.0))
            self.put(keys.placed(node), Placed(node=node, memory_bytes=8 * GIB, disk_free_bytes=100 * GIB))
        self.put(keys.holdings(A), Holdings(node=A, models=(HELD,)))

    def put(self, key: str, record: msgspec.Struct) -> None:
        self.state = apply(self.state, key, encode(record), self.state.revision + 1)

    def shown(self, copies: int = 2) -> PlacesAnswer:
        return places(look(self.state, Policy(copies=copies), Rules(disk_low_bytes=0), 100.0), "m")

    def rows(self, copies: int = 2) -> dict[str, PlaceRow]:
        return {row.node: row for row in self.shown(copies).rows}


def test_what_comes_next_is_told_before_it_begins() -> None:
    seen = Seen()
    answer = seen.shown()
    assert (answer.wanted, answer.by_default, answer.copies, answer.have, answer.settled) == (
        True,
        True,
        2,
        1,
        False,
    )
    rows = seen.rows()
    assert [row.doing for row in rows.values()].count("fetch") == 1
    assert rows["a"].has
    assert sum(row.copy for row in rows.values()) == 2
    assert any(row.note == "others come first" for row in rows.values())
    assert places_view.ahead(answer) == [
        f"{row.name} copies it (chosen, on disk)" for row in rows.values() if row.doing
    ]


def test_what_is_under_way_has_failed_or_is_another_version() -> None:
    seen = Seen()
    seen.put(keys.holdings(B), Holdings(node=B, models=(OLD,)))
    task = Task(kind="fetch", model="m", digest="1", size_bytes=GIB)
    seen.put(keys.assigned(B), Assigned(node=B, epoch=1, models=(AssignedModel(model="m"),), tasks=(task,)))
    failed = FailedTask(kind="fetch", model="m", reason="the disk is full", tries=2)
    seen.put(
        keys.placed(B), Placed(node=B, memory_bytes=8 * GIB, disk_free_bytes=100 * GIB, failed=(failed,))
    )
    row = seen.rows()["b"]
    assert (row.doing, row.stale, row.copy, row.has) == ("fetch", True, True, False)
    assert row.note == "fetch failed 2 times: the disk is full"
    assert places_view.step(None, row) == f"b-name: {row.note}"
    assert places_view.step(row, row) == ""


def test_what_is_in_place_lost_or_impossible() -> None:
    seen = Seen()
    seen.put(keys.desired("m"), Desired(model="m", replicas=1, preload=True))
    loaded = Placed(
        node=A,
        memory_bytes=8 * GIB,
        disk_free_bytes=GIB,
        loaded=(LoadedPlace(model="m", memory_bytes=GIB, held=True),),
    )
    seen.put(keys.placed(A), loaded)
    answer = seen.shown()
    assert (answer.settled, answer.missing, answer.running, answer.loaded) == (True, (), 1, 1)
    assert places_view.standing(answer) == "in place"
    assert places_view.ahead(answer) == ["nothing has to move"]
    seen.put(keys.desired("m"), Desired(model="m", replicas=3, labels={"gpu": "h200"}, pins=(A,)))
    answer = seen.shown()
    assert answer.missing == ("no node that takes models has gpu=h200",)
    text = places_view.places_text(answer, Look())
    assert "short: no node that takes models has gpu=h200" in text
    assert "gpu=h200 is wanted, it has none" in text
    seen.put(keys.member(A), Member(node=A, status="offline", since=90.0))
    gone = seen.shown()
    assert (gone.have, gone.running) == (0, 0)


def test_a_drained_node_gives_its_models_away() -> None:
    seen = Seen()
    seen.put(keys.intent(A), Intent(node=A, drain=True))
    answer = seen.shown(copies=1)
    assert (answer.copies, answer.max) == (1, 1)
    assert [row.doing for row in answer.rows if row.doing] == ["fetch"]
    assert next(row for row in answer.rows if row.node == "a").note == "it drains"


def test_all_models_as_a_table() -> None:
    seen = Seen()
    view = look(seen.state, Policy(copies=0), Rules(), 100.0)
    still = places(view, "m", rows=False)
    assert (still.wanted, still.rows) == (False, ())
    text = places_view.all_text([still, seen.shown()], Look())
    assert text.splitlines()[0].split() == ["MODEL", "ORDER", "WANTED", "HAVE", "LOADED", "STATE"]
    assert "stays where it was put" in text
    assert "moving" in text
    assert places_view.all_text([], Look()) == "no models\n"


def test_numbers_for_those_who_watch() -> None:
    figures = PlacementFigures(tasks={("fetch", "done"): 3, ("load", "failed"): 1}, waiting=2, short=0)
    text = GatewayMetrics().render([], places=figures)
    assert 'ollama_distributed_placement_tasks_total{kind="fetch",outcome="done"} 3' in text
    assert "ollama_distributed_placement_waiting 2" in text
    assert "ollama_distributed_placement_short 0" in text
    assert "placement_waiting" not in GatewayMetrics().render([], places=PlacementFigures())
