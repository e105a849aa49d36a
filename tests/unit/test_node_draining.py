"""What a node that drains does with its answers and its models."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import pytest

from ollama_distributed.base.errors import Unavailable
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.membership.utilization import Utilization
from ollama_distributed.models.held import held_model
from ollama_distributed.node.cluster.rows import node_row
from ollama_distributed.node.draining import Draining
from ollama_distributed.node.polite.plan import Policy
from ollama_distributed.node.polite.service import Politeness
from ollama_distributed.serving.loaded import LoadedModel
from ollama_distributed.serving.ports import EngineInfo
from ollama_distributed.state import keys
from ollama_distributed.state.changes import Proposal, SetDrain, SetLabels, plan_change
from ollama_distributed.state.cluster import ClusterState, apply
from ollama_distributed.state.codec import encode
from ollama_distributed.state.records import Advert, Holdings, Member, Rest
from ollama_distributed.testing.echo import echo_model

A, B = NodeId("a"), NodeId("b")
MODEL = echo_model("m")


class Cluster:
    """Nodes a and b, which hold the model."""

    def __init__(self) -> None:
        self.state = ClusterState()
        for node in (A, B):
            self.advert(node)
            self.put(keys.holdings(node), Holdings(node=node, models=(held_model(MODEL),)))
            self.member(node, "online")

    def put(self, key: str, record: msgspec.Struct) -> None:
        self.state = apply(self.state, key, encode(record), self.state.revision + 1)

    def member(self, node: NodeId, status: str) -> None:
        self.put(keys.member(node), Member(node=node, status=status, since=1.0))  # type: ignore[arg-type]

    def advert(self, node: NodeId, rest: Rest | None = None) -> None:
        said = Advert(node=node, name=node, role="node", version="1", boot="b", started_at=1.0)
        self.put(keys.advert(node), said if rest is None else msgspec.structs.replace(said, rest=rest))

    def change(self, change: SetDrain | SetLabels) -> None:
        proposal = Proposal(id=f"p{self.state.revision}", change=change, actor="ann", at=9.0)
        for write in plan_change(self.state, proposal):
            self.state = apply(self.state, write.key, write.value, self.state.revision + 1)

    def row(self, node: NodeId) -> tuple[str, str, float]:
        row = node_row(self.state.nodes[node], self.state, me=node, leader=None, usage=Utilization())
        return row.status, row.reason, row.since


# ── what the state says ─────────────────────────────────────────────────────────────


def test_a_node_that_rests_takes_no_work_and_says_why() -> None:
    cluster = Cluster()
    cluster.advert(A, Rest(reason="its owner is at work", since=5.0))
    assert cluster.row(A) == ("draining", "its owner is at work", 5.0)
    assert cluster.state.nodes[A].draining
    assert not cluster.state.nodes[A].drained
    cluster.advert(A)
    assert cluster.row(A) == ("online", "", 1.0)


def test_what_is_said_by_hand_stands_above_it() -> None:
    cluster, rest = Cluster(), Rest(reason="it runs on battery", since=5.0)
    cluster.advert(A, rest)
    cluster.change(SetDrain(node=A, drain=False))
    assert cluster.row(A)[0] == "online", "woken"
    cluster.change(SetLabels(node=A, labels={"x": "1"}))
    assert cluster.row(A)[0] == "online"
    cluster.advert(A)
    cluster.advert(A, msgspec.structs.replace(rest, since=50.0))
    assert cluster.row(A)[0] == "draining", "the next rest is another one"
    cluster.advert(A)
    cluster.change(SetDrain(node=A, drain=True))
    cluster.advert(A, rest)
    assert cluster.row(A) == ("draining", "an operator drains it", 9.0)
    cluster.advert(A)
    assert cluster.row(A)[0] == "draining", "its policy does not undo it"


# ── what the node does ──────────────────────────────────────────────────────────────


class Clock:
    """That is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


class Runs:
    def __init__(self, *, held: bool = False) -> None:
        self.held = ("m",) if held else ()
        self.unloaded: list[str] = []
        self.breaks = False

    def loaded(self) -> list[LoadedModel]:
        if self.unloaded:
            return []
        return [
            LoadedModel(
                name="m", spec=MODEL, memory_bytes=1, vram_bytes=0, context_tokens=1, slots=1, slots_busy=1,
                expires_at=None, engine=EngineInfo(name="echo", variant="", version=""), held=self.held,
            )
        ]  # fmt: skip

    async def unload(self, name: str) -> None:
        if self.breaks:
            raise Unavailable("not now")
        self.unloaded.append(name)


class Streams:
    """Of this node's own clients, and of others'."""

    def __init__(self) -> None:
        self.moves: list[tuple[str, ...]] = []
        self.elsewhere: list[bool] = []
        self.door = Door(self)

    def move(self, away_from: Sequence[str]) -> int:
        self.moves.append(tuple(away_from))
        return 1


class Door:
    def __init__(self, streams: Streams) -> None:
        self._streams = streams

    def move(self, elsewhere: Callable[[str], bool]) -> int:
        self._streams.elsewhere.append(elsewhere("m"))
        return 0


class World:
    def __init__(self, runs: Runs) -> None:
        self.cluster, self.streams, self.runs = Cluster(), Streams(), runs
        self.drains = self.rests = False
        self.clock = Clock()
        self.draining = Draining(
            A,
            answers=self.streams,
            door=self.streams.door,
            runs=runs,
            state=lambda: self.cluster.state,
            draining=lambda: self.drains or self.rests,
            resting=lambda: self.rests,
            patience_s=30.0,
            clock=self.clock,
        )


@pytest.mark.anyio
async def test_answers_have_their_time_then_others_go_on_with_them() -> None:
    world = World(Runs())
    await world.draining.look()
    assert not world.runs.unloaded
    world.drains = True
    await world.draining.look()
    assert not world.streams.moves
    assert world.runs.unloaded == [MODEL.name], "as soon as its answers have ended"
    world.clock.now += 29.0
    await world.draining.look()
    assert not world.streams.moves
    world.clock.now += 2.0
    await world.draining.look()
    assert world.streams.moves == [("", "a")]
    assert world.streams.elsewhere == [True]
    world.drains = False
    await world.draining.look()
    world.drains = True
    await world.draining.look()
    assert len(world.streams.moves) == 1, "its time begins anew"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("held", "other", "rests", "goes"),
    [
        (False, "online", False, True),
        (False, "offline", False, False),  # nobody else has it
        (True, "online", False, False),  # placement moves it
        (True, "online", True, True),  # its owner wants the memory
        (False, "offline", True, True),
    ],
)
async def test_which_models_go(*, held: bool, other: str, rests: bool, goes: bool) -> None:
    world = World(Runs(held=held))
    world.cluster.member(B, other)
    world.drains, world.rests = not rests, rests
    await world.draining.look()
    assert bool(world.runs.unloaded) == goes


@pytest.mark.anyio
async def test_a_model_that_cannot_be_unloaded_is_tried_again() -> None:
    world = World(Runs())
    world.rests = world.runs.breaks = True
    await world.draining.look()
    world.runs.breaks = False
    await world.draining.look()
    assert world.runs.unloaded


@pytest.mark.anyio
async def test_a_model_that_is_asked_for_meanwhile_is_left_to_keep_alive() -> None:
    world = World(Runs())
    world.rests = True
    await world.draining.look()
    world.runs.unloaded.clear()  # its owner asked for it
    await world.draining.look()
    assert not world.runs.unloaded


class Machine:
    """`node.polite.service.Probe`."""

    def __init__(self) -> None:
        self.battery = False
        self.read: list[str] = []

    def owner_idle_s(self) -> float | None:
        self.read.append("owner")
        return None

    def on_battery(self) -> bool | None:
        self.read.append("battery")
        return self.battery

    def others_cpu(self) -> float | None:
        self.read.append("cpu")
        return None


@pytest.mark.anyio
async def test_a_rest_begins_is_one_and_ends() -> None:
    machine, clock, told = Machine(), Clock(), list[Rest | None]()
    polite = Politeness(Policy(battery=True), machine, clock, lambda: told.append(polite.rest))
    for battery, seconds in ((True, 0.0), (True, 10.0), (True, 20.0), (False, 30.0), (False, 90.0)):
        machine.battery, clock.now = battery, 1000.0 + seconds
        await polite.look()
    assert told == [Rest(reason="it runs on battery", since=1010.0), None]
    assert set(machine.read) == {"battery"}, "only what the policy asks for"
