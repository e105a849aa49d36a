"""Where a model would fit, what would have to go, how fast it would be; and what a loss would mean."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.placement.world import NODES, World, site, wish, worlds

from ollama_distributed.base.ids import NodeId
from ollama_distributed.models.memory import estimate
from ollama_distributed.models.spec import Architecture
from ollama_distributed.placement.demand import Demand, wanted
from ollama_distributed.placement.fit import (
    Machine,
    Question,
    Running,
    Speed,
    expected_speed,
    fit,
    what_if,
)
from ollama_distributed.state.records import Desired

GIB = 1 << 30
LLAMA_8B = Architecture(
    name="llama",
    layers=32,
    context_tokens=131_072,
    embedding_length=4096,
    heads=32,
    kv_heads=8,
    key_length=128,
    value_length=128,
    parameters=8_030_261_248,
    file_type="Q4_K_M",
    vocabulary=128_256,
)
ASKED = Question(
    architecture=LLAMA_8B, weights_bytes=5 * GIB, size_bytes=5 * GIB, context_tokens=8192, slots=4
)
NEED = estimate(LLAMA_8B, weights_bytes=5 * GIB, context_tokens=8192, slots=4).total_bytes


def machine(name: str, memory: int = 0, free: int | None = None, **more: object) -> Machine:
    fields = {"memory_bytes": memory, "memory_free_bytes": memory if free is None else free, **more}
    return Machine(node=NodeId(name), name=name, **fields)  # type: ignore[arg-type]


def test_a_gpu_goes_first_and_the_processor_where_it_is_too_small() -> None:
    rows = fit(
        ASKED,
        [
            machine("big", 64 * GIB, gpu_bytes=24 * GIB, gpu_free_bytes=24 * GIB),
            machine("small", 64 * GIB, gpu_bytes=4 * GIB, gpu_free_bytes=4 * GIB),
        ],
    )
    assert [(row.name, row.verdict, row.device) for row in rows] == [
        ("big", "fits", "gpu"),
        ("small", "fits", "cpu"),
    ]
    assert {row.memory_bytes for row in rows} == {NEED}
    assert {(row.context_tokens, row.slots, row.fetch_bytes) for row in rows} == {(8192, 4, 5 * GIB)}


def test_it_says_what_would_have_to_be_unloaded_the_idle_ones_first() -> None:
    running = (
        Running(model="busy", memory_bytes=9 * GIB, busy=True),
        Running(model="idle", memory_bytes=8 * GIB),
        Running(model="tiny", memory_bytes=GIB),
    )
    row = fit(ASKED, [machine("n", 20 * GIB, 2 * GIB, running=running)])[0]
    assert (row.verdict, row.unload) == ("unload", ("idle",))


def test_with_less_memory_slots_go_before_context() -> None:
    row = fit(ASKED, [machine("n", NEED - GIB)])[0]
    assert (row.verdict, row.context_tokens, row.slots) == ("smaller", 8192, 3)
    assert row.memory_bytes <= NEED - GIB


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (machine("n", 4 * GIB), f"does not fit: needs {NEED / GIB:.1f} GiB, node has 4.0 GiB"),
        (machine("n", 64 * GIB, presence="leaving"), "it drains"),
        (machine("n", 64 * GIB, presence="away"), "it is offline"),
        (
            machine("n", 64 * GIB, disk_free_bytes=GIB),
            "no room on its disk: needs 5.0 GiB, 1.0 GiB free",
        ),
    ],
)
def test_a_refusal_says_why(node: Machine, reason: str) -> None:
    row = fit(ASKED, [node])[0]
    assert (row.verdict, row.reason) == ("no", reason)


def test_a_node_that_has_the_files_needs_no_disk() -> None:
    row = fit(ASKED, [machine("n", 64 * GIB, disk_free_bytes=0, has_files=True)])[0]
    assert (row.verdict, row.fetch_bytes) == ("fits", 0)


def test_speed_falls_as_weights_grow_and_is_unknown_without_a_measurement() -> None:
    speeds = [
        Speed(device="cpu", weights_bytes=GIB, tokens_per_s=20.0),
        Speed(device="cpu", weights_bytes=100, tokens_per_s=9000.0),
        Speed(device="gpu", weights_bytes=GIB, tokens_per_s=100.0),
    ]
    assert expected_speed(speeds, "cpu", 2 * GIB) == (10.0, "estimated")
    assert expected_speed(speeds, "gpu", 2 * GIB) == (50.0, "estimated")
    assert expected_speed(speeds[:2], "gpu", 2 * GIB) is None
    assert expected_speed(speeds, "gpu", speeds[2].weights_bytes + 1000) == (
        pytest.approx(speeds[2].tokens_per_s),
        "measured",
    )
    assert fit(ASKED, [machine("n", 64 * GIB)])[0].tokens_per_s is None
    assert fit(ASKED, [machine("n", 64 * GIB, speeds=tuple(speeds))])[0].tokens_per_s == 4.0


machines = st.builds(
    lambda memory, gpu, running, used: Machine(
        node=NodeId("n"),
        memory_bytes=memory,
        memory_free_bytes=max(0, memory - sum(r.memory_bytes for r in running if r.device == "cpu") - used),
        gpu_bytes=gpu,
        gpu_free_bytes=max(0, gpu - sum(r.memory_bytes for r in running if r.device == "gpu")),
        running=tuple(running),
    ),
    st.integers(0, 40 * GIB),
    st.integers(0, 40 * GIB),
    st.lists(
        st.builds(
            Running,
            model=st.text(min_size=1, max_size=3),
            device=st.sampled_from(["gpu", "cpu"]),
            memory_bytes=st.integers(0, 20 * GIB),
            busy=st.booleans(),
        ),
        max_size=4,
    ),
    st.integers(0, 4 * GIB),
)


@given(machines, st.integers(0, 30 * GIB), st.integers(1, 8), st.sampled_from([512, 4096, 32768]))
def test_what_is_said_to_fit_does(node: Machine, weights: int, slots: int, context: int) -> None:
    asked = Question(architecture=LLAMA_8B, weights_bytes=weights, slots=slots, context_tokens=context)
    row = fit(asked, [node])[0]
    if row.verdict == "no":
        least = estimate(LLAMA_8B, weights_bytes=weights, context_tokens=512).total_bytes
        freed = sum(r.memory_bytes for r in node.running if r.device == "cpu")
        assert least > min(node.memory_free_bytes + freed, node.memory_bytes)
        return
    gpu = row.device == "gpu"
    gone = sum(r.memory_bytes for r in node.running if r.model in row.unload and r.device == row.device)
    assert row.memory_bytes <= (node.gpu_bytes if gpu else node.memory_bytes)
    assert row.memory_bytes <= (node.gpu_free_bytes if gpu else node.memory_free_bytes) + gone
    assert (row.verdict == "unload") <= bool(row.unload)


# ── what if ─────────────────────────────────────────────────────────────────────────


def test_what_a_loss_moves_and_what_no_longer_fits() -> None:
    nodes = {node: site(node, 10) for node in NODES[:2]}
    nodes |= {NODES[2]: site("n2", 30, blobs=frozenset({"big-w", "small-w"}))}
    world = World(nodes, {"big": wish("big", 20, warm=1), "small": wish("small", 3, copies=2, warm=1)})
    world.settle()
    planner = world.planner()
    before = planner.plan()
    found = what_if(planner, [NODES[2]], {"big": [NODES[2]], "small": [NODES[2], NODES[0]]})
    assert found.last_copies == ("big",)
    assert [refusal.model for refusal in found.no_longer] == ["big"]
    assert {changed.model for changed in found.moved} == {"big", "small"}
    assert planner.plan() == before


@given(worlds(), st.data())
def test_what_if_says_what_the_planner_does_and_leaves_no_trace(world: World, data: st.DataObject) -> None:
    plan = world.settle()
    lost = data.draw(st.sets(st.sampled_from(sorted(world.sites)), max_size=2))
    planner = world.planner()
    found = what_if(planner, lost, {})
    assert planner.plan() == plan
    for node in lost:
        world.sites[node] = msgspec.structs.replace(world.sites[node], presence="lost")
    after = world.plan()
    for model in world.wishes:
        old, new = set(plan.assignments.get(model, ())), set(after.assignments.get(model, ()))
        told = next((changed for changed in found.moved if changed.model == model), None)
        assert (set(told.gone), set(told.new)) == (old - new, new - old) if told else old == new


# ── demand ──────────────────────────────────────────────────────────────────────────


def counts(desired: Desired, **said: object) -> tuple[int, int]:
    return wanted(desired, Demand(slots=4, **said), keep_alive_s=300.0, nodes=10)  # type: ignore[arg-type]


def test_replicas_follow_demand_inside_their_limits() -> None:
    free = Desired(model="m", min=1, max=3)
    assert counts(free) == (1, 0)
    assert counts(free, work=1, idle_s=0.0) == (1, 0), "the request loads it"
    assert counts(free, work=1, loaded=1, idle_s=0.0) == (1, 1)
    assert counts(free, work=5, loaded=1, idle_s=0.0) == (2, 2)
    assert counts(free, work=50, loaded=2, idle_s=0.0) == (3, 3)
    assert counts(free, work=5, loaded=3, idle_s=0.0) == (3, 3)
    assert counts(free, work=4, loaded=3, idle_s=0.0) == (2, 2)
    assert counts(Desired(model="m", replicas=2), work=50, loaded=1, idle_s=0.0) == (2, 2)
    assert counts(Desired(model="m", replicas=0), work=5, loaded=1, idle_s=0.0) == (0, 0)


def test_nobody_asks_nothing_is_loaded() -> None:
    free = Desired(model="m", min=2)
    assert counts(free, loaded=2, idle_s=299.0) == (2, 1)
    assert counts(free, loaded=2, idle_s=300.0) == (2, 0)
    assert counts(Desired(model="m", min=1, keep_alive_s=10.0), loaded=1, idle_s=11.0) == (1, 0)
    assert counts(Desired(model="m", min=2, preload=True), idle_s=1e9) == (2, 2)


@given(st.floats(0, 200), st.integers(1, 12), st.integers(1, 8))
def test_a_steady_load_changes_the_number_once(work: float, loaded: int, slots: int) -> None:
    desired = Desired(model="m")
    first = wanted(
        desired, Demand(work=work, slots=slots, loaded=loaded, idle_s=0.0), keep_alive_s=9.0, nodes=500
    )
    again = wanted(
        desired, Demand(work=work, slots=slots, loaded=first[1], idle_s=0.0), keep_alive_s=9.0, nodes=500
    )
    assert again == first
    assert work <= first[1] * slots
