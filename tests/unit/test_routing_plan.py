"""Properties of the choice of nodes, whatever the cluster and the dice."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.base.errors import ModelNotFound, NoCapacity, QueueFull, Unavailable
from ollama_distributed.base.ids import NodeId
from ollama_distributed.routing.plan import MAX_TRIES, Load, Standing, most_telling, plan

ME = NodeId("me")
STATUSES = ("joining", "online", "suspect", "offline", "draining")


def standing(name: str, status: str = "online", *, reachable: bool = True) -> Standing:
    return Standing(node=NodeId(name), status=status, reachable=reachable)  # type: ignore[arg-type]


standings = st.lists(
    st.builds(
        standing,
        st.sampled_from(["me", *(f"n{i}" for i in range(8))]),
        st.sampled_from(STATUSES),
        reachable=st.booleans(),
    ),
    max_size=9,
    unique_by=lambda one: one.node,
)
loads = st.dictionaries(
    st.sampled_from([NodeId(f"n{i}") for i in range(8)]),
    st.builds(
        Load,
        slots=st.integers(0, 8),
        busy=st.integers(0, 8),
        queued=st.integers(0, 50),
        loaded=st.booleans(),
    ),
)
seeds = st.integers(0, 2**32)


@given(standings, loads, seeds)
def test_every_holder_is_asked_or_has_a_reason(
    holders: list[Standing], loads: dict[NodeId, Load], seed: int
) -> None:
    made = plan(holders, ME, loads, random.Random(seed).randrange)
    asked, left_out = list(made.order), [one.node for one in made.left_out]
    assert sorted(asked + left_out) == sorted(one.node for one in holders)
    assert len(asked) <= MAX_TRIES
    assert all(one.reason for one in made.left_out)


@given(standings, loads, seeds)
def test_it_is_never_empty_while_a_holder_can_be_asked(
    holders: list[Standing], loads: dict[NodeId, Load], seed: int
) -> None:
    made = plan(holders, ME, loads, random.Random(seed).randrange)
    assert bool(made.order) == any(one.reachable or one.node == ME for one in holders)


@given(standings, loads, seeds)
def test_here_first_and_no_one_before_a_better_one(
    holders: list[Standing], loads: dict[NodeId, Load], seed: int
) -> None:
    made = plan(holders, ME, loads, random.Random(seed).randrange)
    status = {one.node: one.status for one in holders}
    if status.get(ME, "draining") != "draining":
        assert made.order[0] == ME
    rank = ["online", "joining", "suspect", "draining", "offline"].index
    others = [rank(status[node]) for node in made.order if node != ME or status[ME] == "draining"]
    assert others == sorted(others)


@given(standings, loads, seeds)
def test_the_same_dice_make_the_same_plan(
    holders: list[Standing], loads: dict[NodeId, Load], seed: int
) -> None:
    plans = {plan(holders, ME, loads, random.Random(seed).randrange).order for _ in range(3)}
    assert len(plans) == 1


@given(seeds)
def test_of_two_the_free_one_is_asked_first(seed: int) -> None:
    holders = [standing("n1"), standing("n2")]
    free = Load(slots=4, busy=1, loaded=True)
    full = Load(slots=4, busy=4, queued=3, loaded=True)
    made = plan(holders, ME, {NodeId("n1"): full, NodeId("n2"): free}, random.Random(seed).randrange)
    assert made.order == ("n2", "n1")
    cold = Load(slots=4, loaded=False)
    made = plan(holders, ME, {NodeId("n1"): full, NodeId("n2"): cold}, random.Random(seed).randrange)
    assert made.order == ("n2", "n1")
    made = plan(holders, ME, {NodeId("n1"): cold, NodeId("n2"): free}, random.Random(seed).randrange)
    assert made.order == ("n2", "n1")


def test_here_first_unless_a_request_would_wait_here_and_not_there() -> None:
    here, there = (Standing(node=node, status="online") for node in (ME, NodeId("n1")))
    dice = random.Random(1).randrange
    free = {there.node: Load(slots=4, busy=3, loaded=True)}
    assert plan([here, there], ME, free, dice).order == (ME, there.node)
    assert plan([here, there], ME, free, dice, full=True).order == (there.node, ME)
    for load in (Load(slots=4, busy=4, loaded=True), Load(slots=4), None):
        loads = {there.node: load} if load is not None else {}
        assert plan([here, there], ME, loads, dice, full=True).order == (ME, there.node)
    drained = Standing(node=there.node, status="draining")
    assert plan([here, drained], ME, free, dice, full=True).order == (ME, there.node)


def test_two_choices_spread_the_load() -> None:
    """Of 1,000 requests over 10 equal nodes, with figures that are always fresh, none gets more
    than a few above its share; one random choice would give the luckless one some 30 more."""
    dice = random.Random(1).randrange
    holders = [standing(f"n{i}") for i in range(10)]
    busy = {one.node: 0 for one in holders}
    for _ in range(1000):
        figures = {node: Load(slots=1000, busy=count, loaded=True) for node, count in busy.items()}
        busy[plan(holders, ME, figures, dice).order[0]] += 1
    assert max(busy.values()) <= 104


def test_the_most_telling_refusal_is_shown() -> None:
    away, full, gone = Unavailable("away"), QueueFull("full"), ModelNotFound("gone")
    assert most_telling([away, full, gone]) is full
    assert most_telling([gone, away]) is away
    assert most_telling([away, NoCapacity("small"), full]).message == "small"
