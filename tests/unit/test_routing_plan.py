"""Properties of the choice of nodes, whatever the cluster and the dice."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.base.errors import ModelNotFound, NoCapacity, QueueFull, Unavailable
from ollama_distributed.base.ids import NodeId
from ollama_distributed.routing.plan import MAX_TRIES, SLOTS, Load, Prompt, Standing, most_telling, plan

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
def test_no_one_before_a_better_one(holders: list[Standing], loads: dict[NodeId, Load], seed: int) -> None:
    made = plan(holders, ME, loads, random.Random(seed).randrange)
    status = {one.node: one.status for one in holders}
    rank = ["online", "joining", "suspect", "draining", "offline"].index
    tiers = [rank(status[node]) for node in made.order]
    assert tiers == sorted(tiers)


@given(standings, loads, seeds)
def test_no_hop_for_nothing(holders: list[Standing], loads: dict[NodeId, Load], seed: int) -> None:
    """Another node comes before this one only if the first token comes sooner there, this one is
    crowded, or is to get no work."""
    made = plan(holders, ME, loads, random.Random(seed).randrange)
    status = {one.node: one.status for one in holders}
    if status.get(ME) != "online" or made.order[0] == ME:
        return
    scores = {one.node: one for one in made.scores}
    assert scores[ME].crowded or scores[made.order[0]].ttft_s < scores[ME].ttft_s


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
    idle, full = Load(slots=4, loaded=True), Load(slots=4, busy=4, loaded=True)
    assert plan([here, there], ME, {ME: idle, there.node: idle}, dice).order == (ME, there.node)
    assert plan([here, there], ME, {ME: full, there.node: idle}, dice).order == (there.node, ME)
    for load in (full, Load(slots=4), None):
        loads = {ME: full, **({there.node: load} if load is not None else {})}
        assert plan([here, there], ME, loads, dice).order == (ME, there.node), load
    drained = Standing(node=there.node, status="draining")
    assert plan([here, drained], ME, {ME: full, there.node: idle}, dice).order == (ME, there.node)


def test_who_comes_while_a_model_is_loaded_here_waits_with_a_few_only() -> None:
    """Sixteen at once, three cold replicas: not one of them loads for all."""
    holders, dice = [standing(name) for name in ("me", "n1", "n2")], random.Random(1).randrange
    sent = Counter[NodeId]()
    for _ in range(16):
        cold = {one.node: Load(queued=sent[one.node]) for one in holders}
        sent[plan(holders, ME, cold, dice).order[0]] += 1
        if sent.total() == SLOTS:
            assert sent == {ME: SLOTS}, "no other one is loaded for what has its slot here"
    assert max(sent.values()) <= SLOTS + 3


N1, N2, N3 = (NodeId(f"n{i}") for i in (1, 2, 3))


def three(**busy: int) -> dict[NodeId, Load]:
    return {
        node: Load(slots=4, busy=min(work, 4), queued=max(work - 4, 0), loaded=True, read_tokens_per_s=250)
        for node, work in zip((N1, N2, N3), (busy.get(name, 0) for name in ("n1", "n2", "n3")), strict=True)
    }


THREE = [standing("n1"), standing("n2"), standing("n3")]


@given(seeds)
def test_who_read_the_prompt_is_asked(seed: int) -> None:
    dice = random.Random(seed).randrange
    prompt = Prompt(tokens=1500, cached={N2: 1400})
    made = plan(THREE, ME, three(n2=3), dice, prompt=prompt)
    assert (made.order[0], made.reason) == (N2, "prefix")
    assert made.scores[0].ttft_s > 1500 / 250
    here = [Standing(node=ME, status="online"), *THREE]
    assert plan(here, ME, {**three(), ME: three()[N1]}, dice, prompt=prompt).order[0] == N2


@given(seeds, st.integers(4, 40))
def test_a_crowded_replica_gives_way_whatever_it_holds(seed: int, work: int) -> None:
    """It is waited for while that is shorter than reading all of it elsewhere, and never once it
    has two requests for each slot."""
    made = plan(
        THREE,
        ME,
        three(n2=work),
        random.Random(seed).randrange,
        prompt=Prompt(tokens=4000, cached={N2: 3900}),
    )
    assert (made.order[0] == N2) == (work < 8)
    assert made.reason == ("prefix" if work < 8 else "spill")
    assert N2 in made.order
    all_full = three(n1=30, n2=work, n3=30)
    made = plan(
        THREE, ME, all_full, random.Random(seed).randrange, prompt=Prompt(tokens=4000, cached={N2: 1})
    )
    assert bool(made.order)


@given(
    standings,
    loads,
    seeds,
    st.dictionaries(st.sampled_from([NodeId(f"n{i}") for i in range(8)]), st.integers(0, 5000)),
)
def test_the_times_add_up_and_the_chosen_one_is_among_the_best(
    holders: list[Standing], loads: dict[NodeId, Load], seed: int, cached: dict[NodeId, int]
) -> None:
    made = plan(holders, ME, loads, random.Random(seed).randrange, prompt=Prompt(tokens=3000, cached=cached))
    for one in made.scores:
        assert abs(one.hop_s + one.load_s + one.wait_s + one.read_s - one.ttft_s) < 1e-9
        assert 0 <= one.cached_tokens <= 3000
    online = {one.node for one in holders if one.status == "online"}
    scores = [one for one in made.scores if one.node in online]
    if scores and made.order[0] in online and not any(one.crowded for one in scores):
        chosen = next(one for one in scores if one.node == made.order[0])
        assert chosen.ttft_s <= min(one.ttft_s for one in scores) * 1.1 + 0.02


def test_only_nodes_with_the_labels_that_are_wanted() -> None:
    zones = [
        Standing(node=node, status="online", labels={"zone": zone}) for node, zone in ((N1, "a"), (N2, "b"))
    ]
    dice = random.Random(1).randrange
    made = plan(zones, ME, {}, dice, wanted={"zone": "b"})
    assert made.order == (N2,)
    assert [(one.node, one.reason) for one in made.left_out] == [(N1, "it lacks the labels zone=b")]
    assert plan(zones, ME, {}, dice, wanted={"zone": "c"}).order == ()


def test_in_turn_and_fewest_connections() -> None:
    dice = random.Random(1).randrange
    turns = [plan(THREE, ME, three(), dice, policy="round-robin", turn=turn).order[0] for turn in range(6)]
    assert turns == [N1, N2, N3] * 2
    made = plan(THREE, ME, three(n1=2, n2=1, n3=2), dice, policy="least-connections", turn=4)
    assert (made.order[0], made.reason) == (N2, "least-connections")


def test_a_choice_looks_at_each_replica_once() -> None:
    """Counted work: what a choice costs grows with the replicas, no faster."""
    looks = 0

    class Counted(dict[NodeId, Load]):
        def get(self, node: NodeId, default: object = None) -> Load:  # type: ignore[override]
            nonlocal looks
            looks += 1
            return Load(slots=4, loaded=True)

    holders = [standing(f"n{i}") for i in range(1000)]
    plan(holders, ME, Counted(), random.Random(1).randrange)
    assert looks == 1000


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
