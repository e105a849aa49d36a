"""What may leave a disk, by all orders of messages and views that Hypothesis finds."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.base.ids import NodeId
from ollama_distributed.distribution.eviction import (
    Attempt,
    Candidate,
    Leaving,
    choose,
    freed_bytes,
    spare,
    weight,
)

NODES = [NodeId(f"n{number}") for number in range(6)]
DIGESTS = st.text("abcdef", min_size=1, max_size=4)


@given(
    digest=DIGESTS,
    copies=st.integers(1, 3),
    moves=st.lists(st.tuples(st.sampled_from(NODES), st.booleans(), st.integers(0, 5))),
)
def test_what_is_spare_by_old_views_leaves_enough(
    digest: str, copies: int, moves: list[tuple[NodeId, bool, int]]
) -> None:
    """Nodes fetch and drop; each judges by what it saw some moves ago."""
    holders = set(NODES[: copies + 1])
    history = [frozenset(holders)]
    for node, fetches, ago in moves:
        if fetches:
            holders.add(node)
        elif node in holders and spare(node, digest, history[-1 - min(ago, len(history) - 1)], copies):
            holders.remove(node)
        assert len(holders) >= copies
        history.append(frozenset(holders))


@given(digest=DIGESTS, holders=st.sets(st.sampled_from(NODES), min_size=1), copies=st.integers(1, 3))
def test_the_heaviest_are_the_keepers(digest: str, holders: set[NodeId], copies: int) -> None:
    keepers = sorted(holders, key=lambda node: weight(digest, node))[-copies:]
    assert {node for node in holders if not spare(node, digest, holders, copies)} == set(keepers)


class World:
    """Nodes that drop one model, and messages that come when Hypothesis says so, or never."""

    def __init__(self, holders: int, copies: int) -> None:
        self.copies = copies
        self.holds = dict.fromkeys(NODES[:holders], True)
        self.leaving = {node: Leaving(node) for node in NODES}
        self.attempts: dict[NodeId, Attempt] = {}
        self.air: list[Callable[[], None]] = []

    def begin(self, node: NodeId) -> None:
        if not self.holds.get(node):
            return
        attempt = self.leaving[node].begin("m", "d", self.copies)
        if attempt is not None:
            self.attempts[node] = attempt
            self.air += [self._question(node, attempt, other) for other in NODES if other != node]

    def _question(self, node: NodeId, attempt: Attempt, other: NodeId) -> Callable[[], None]:
        def arrives() -> None:
            if self.leaving[other].promise(node, "m", "d", holds=self.holds.get(other, False)):
                self.air.append(lambda: attempt.promised.add(other))

        return arrives

    def end(self, node: NodeId) -> None:
        """It goes, if it may; else it stays."""
        attempt = self.attempts.pop(node, None)
        if attempt is not None:
            if self.leaving[node].settle(attempt):
                self.holds[node] = False
            self.leaving[node].end(attempt)

    def crash(self, node: NodeId) -> None:
        """It forgets what it was about; its disk stays."""
        self.attempts.pop(node, None)
        self.leaving[node] = Leaving(node)

    def fetch(self, node: NodeId) -> None:
        if any(self.holds.values()):
            self.holds[node] = True


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["begin", "end", "end", "air", "air", "air", "lose", "crash", "fetch"]),
        st.integers(0, 99),
    ),
    max_size=80,
)


@given(steps=STEPS, holders=st.integers(1, 5), copies=st.integers(1, 2))
def test_no_order_of_promises_loses_the_last_copies(
    steps: list[tuple[str, int]], holders: int, copies: int
) -> None:
    world = World(holders, copies)
    least = min(holders, copies)
    for kind, number in steps:
        if kind in ("air", "lose"):
            if world.air:
                message = world.air.pop(number % len(world.air))
                if kind == "air":
                    message()
        else:
            getattr(world, kind)(NODES[number % len(NODES)])
        assert sum(world.holds.values()) >= least


def test_of_two_that_ask_each_other_the_lighter_goes() -> None:
    light, heavy = sorted(NODES[:2], key=lambda node: weight("d", node))
    sides = {node: Leaving(node) for node in (light, heavy)}
    attempts = {node: side.begin("m", "d", 1) for node, side in sides.items()}
    assert not sides[light].promise(heavy, "m", "d", holds=True)
    assert sides[heavy].promise(light, "m", "d", holds=True)
    mine, other = attempts[light], attempts[heavy]
    assert mine is not None
    assert other is not None
    mine.promised.add(heavy)
    other.promised.add(light)
    assert sides[light].settle(mine)
    assert not sides[heavy].settle(other), "it gave way"
    assert not sides[light].promise(heavy, "m", "d", holds=True), "it is going"
    sides[light].end(mine)
    assert sides[heavy].begin("m", "d", 1) is not None


BLOBS = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 9), max_size=4)


@st.composite
def shelves(draw: st.DrawFn) -> tuple[list[Candidate], set[str]]:
    sizes = {digest: draw(st.integers(0, 9)) for digest in "abcdefgh"}
    named = draw(st.lists(st.sets(st.sampled_from("abcdefgh"), max_size=4), max_size=6))
    models = [
        Candidate(
            model=f"m{number}", blobs={one: sizes[one] for one in blobs}, last_used=draw(st.integers(0, 3))
        )
        for number, blobs in enumerate(named)
    ]
    return models, draw(st.sets(st.sampled_from("abcdefgh"), max_size=3))


@given(shelf=shelves(), need=st.integers(0, 40))
def test_what_goes_frees_enough_and_nothing_goes_in_vain(
    shelf: tuple[list[Candidate], set[str]], need: int
) -> None:
    models, kept = shelf
    going = choose(models, kept, need)

    def freed(names: set[str]) -> int:
        stays = kept.union(*(one.blobs for one in models if one.model not in names))
        return freed_bytes([one for one in models if one.model in names], stays)

    if not going:
        assert need <= 0 or freed({one.model for one in models}) < need
        return
    assert freed(set(going)) >= need
    for name in going:
        assert freed(set(going) - {name}) < need, "less would have done"


def test_the_least_recently_used_go_first() -> None:
    def model(name: str, last_used: float, **blobs: int) -> Candidate:
        return Candidate(model=name, blobs=blobs, last_used=last_used)

    old, mid, new = model("old", 1, a=5), model("mid", 2, b=5), model("new", 3, c=50)
    assert choose([new, old, mid], (), 5) == ("old",)
    assert choose([new, old, mid], (), 10) == ("old", "mid")
    assert choose([new, old, mid], (), 12) == ("new",), "the small ones would go in vain"
    assert choose([old, model("twin", 2, a=5), new], (), 5) == ("old", "twin"), "both names of one file"
    assert choose([old], {"a"}, 1) == ()
