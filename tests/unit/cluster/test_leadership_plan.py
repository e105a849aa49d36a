"""Who may lead: the table, and that two never lead at once."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.leadership.plan import (
    LEASE_S,
    RENEW_S,
    SPREAD_S,
    TAKEOVER_S,
    Decision,
    Hold,
    Renew,
    Seen,
    Standing,
    StepDown,
    Take,
    Wait,
    decide,
    leader,
    leads,
)
from ollama_distributed.state.records import Lease, Term

ME, OTHER = NodeId("me"), NodeId("other")


def seen(node: NodeId | None = OTHER, *, epoch: int = 3, at: float = 10.0) -> Seen:
    lease = None if node is None else Lease(node=node, epoch=epoch, renewals=5)
    return Seen(
        lease=lease,
        lease_revision=40 if lease else 0,
        term=Term(node=node or OTHER, epoch=epoch),
        term_revision=30,
        at=at,
    )


def hold(*, epoch: int = 3, confirmed_at: float = 10.0) -> Hold:
    return Hold(
        lease=Lease(node=ME, epoch=epoch, renewals=7),
        lease_revision=41,
        fence_revision=31,
        confirmed_at=confirmed_at,
        next_at=confirmed_at + RENEW_S,
    )


def standing(**fields: object) -> Standing:
    return msgspec.structs.replace(Standing(node=ME, candidate=True), **fields)


def take(epoch: int, of: Seen) -> Take:
    return Take(Lease(node=ME, epoch=epoch, since=99.0), Term(node=ME, epoch=epoch), of)


NONE, OWN = seen(None), seen(ME)
TABLE: list[tuple[str, Standing, float, Decision]] = [
    ("nothing was loaded", standing(), 10.0, Wait(None)),
    ("a mere node never leads", standing(candidate=False, seen=NONE), 99.0, Wait(None)),
    ("no lease", standing(seen=NONE), 10.0, take(4, NONE)),
    ("no lease, not this one's turn", standing(seen=NONE, spread_s=0.2), 10.1, Wait(10.2)),
    ("no cluster yet", standing(seen=Seen(at=1.0)), 1.0, take(1, Seen(at=1.0))),
    ("an own lease of a former life", standing(seen=OWN), 10.0, take(4, OWN)),
    ("after a failure", standing(seen=OWN, not_before=11.0), 10.5, Wait(11.0)),
    ("another leads", standing(seen=seen(), spread_s=0.1), 12.9, Wait(13.1)),
    ("another fell silent", standing(seen=seen(), spread_s=0.1), 13.2, take(4, seen())),
    ("leads", standing(hold=hold(), seen=OWN), 10.5, Wait(11.0)),
    (
        "renewal is due",
        standing(hold=hold(), seen=OWN),
        11.0,
        Renew(Lease(node=ME, epoch=3, renewals=8), 41),
    ),
    ("ran out", standing(hold=hold(), seen=OWN), 12.5, StepDown("the lease was not renewed in time")),
    ("replaced", standing(hold=hold(), seen=seen(epoch=4)), 10.5, StepDown("another node leads")),
    ("the mirror lags", standing(hold=hold(), seen=seen(epoch=2)), 10.5, Wait(11.0)),
]


@pytest.mark.parametrize(("situation", "at", "now", "decision"), TABLE, ids=[row[0] for row in TABLE])
def test_table(situation: str, at: Standing, now: float, decision: Decision) -> None:
    assert decide(at, now, since=99.0) == decision


def test_who_leads_as_a_node_sees_it() -> None:
    follower = standing(seen=seen())
    assert leader(follower, 12.9) == OTHER
    assert leader(follower, 13.0) is None, "it may be anybody now"
    assert leader(standing(), 10.0) is None
    assert leader(standing(seen=OWN), 10.0) is None, "an own lease that is not held leads nobody"
    me = standing(hold=hold(), seen=OWN)
    assert leader(me, 12.4) == ME
    assert leader(me, 12.5) is None
    assert not leads(me, 12.5)
    assert leader(standing(hold=hold(), seen=seen(epoch=4)), 10.5) == OTHER


def test_a_wait_is_never_over_before_it_begins() -> None:
    """A decision to wait lies in the future, so a loop on it does not spin."""
    for _, at, now, decision in TABLE:
        if isinstance(decision, Wait) and decision.until is not None:
            assert decision.until > now
            assert decide(at, decision.until, since=99.0) != decision


class World:
    """The lease's one history, and nodes with clocks of their own. What happens when, and which
    message is late, is drawn."""

    def __init__(self, rates: list[float]) -> None:
        self.now = 0.0
        self.rates = rates
        self.revision = 0
        self.lease: Lease | None = None
        self.term: Term | None = None
        self.revisions = (0, 0)
        self.nodes = [Standing(node=NodeId(f"n{i}"), candidate=True) for i in range(len(rates))]

    def clock(self, i: int) -> float:
        return self.now * self.rates[i]

    def see(self, i: int) -> None:
        """The news reach node i."""
        node = self.nodes[i]
        found = Seen(
            lease=self.lease,
            lease_revision=self.revisions[0],
            term=self.term,
            term_revision=self.revisions[1],
            at=self.clock(i),
        )
        if node.seen is not None and node.seen.lease_revision == found.lease_revision:
            found = msgspec.structs.replace(found, at=node.seen.at)
        self.nodes[i] = msgspec.structs.replace(node, seen=found)

    def act(self, i: int, took_s: float, arrives: bool, heard: bool) -> None:
        """Node i does what it decides; its write takes a while, may get lost, or its answer may."""
        node, sent_at = self.nodes[i], self.clock(i)
        match decide(node, sent_at, since=0.0):
            case Wait():
                return
            case StepDown():
                self.nodes[i] = msgspec.structs.replace(node, hold=None)
            case Renew(lease, revision):
                self.now += took_s
                applied = arrives and self.revisions[0] == revision
                if applied:
                    self.lease, self.revisions = lease, (self._next(), self.revisions[1])
                if applied and heard and node.hold:
                    renewed = msgspec.structs.replace(
                        node.hold,
                        lease=lease,
                        lease_revision=self.revisions[0],
                        confirmed_at=sent_at,
                        next_at=sent_at + RENEW_S,
                    )
                    self.nodes[i] = msgspec.structs.replace(node, hold=renewed)
            case Take(lease, term, known):
                self.now += took_s
                stands = self.revisions == (known.lease_revision, known.term_revision)
                if arrives and stands:
                    assert term.epoch > (self.term.epoch if self.term else 0), "an epoch comes once"
                    self.lease, self.term, self.revisions = lease, term, (self._next(), self._next())
                    if heard:
                        got = Hold(
                            lease=lease,
                            lease_revision=self.revisions[0],
                            fence_revision=self.revisions[1],
                            confirmed_at=sent_at,
                            next_at=sent_at + RENEW_S,
                        )
                        self.nodes[i] = msgspec.structs.replace(node, hold=got)

    def _next(self) -> int:
        self.revision += 1
        return self.revision

    def leaders(self) -> list[int]:
        return [i for i, node in enumerate(self.nodes) if leads(node, self.clock(i))]


class Spell(msgspec.Struct, frozen=True):
    """For some seconds: who is in reach of the engine, who sleeps, and how slow writes are."""

    ticks: int
    reached: tuple[bool, bool, bool]
    awake: tuple[bool, bool, bool]
    heard: tuple[bool, bool, bool]
    """The engine's answers get back to it."""
    took_s: float


TICK_S = 0.25
each = st.tuples(st.booleans(), st.booleans(), st.booleans())
mostly = st.one_of(st.just((True, True, True)), each)
spells = st.builds(
    Spell,
    ticks=st.integers(1, 20),
    reached=mostly,
    awake=mostly,
    heard=mostly,
    took_s=st.sampled_from([0.0, 0.1, 1.0, 2.0]),
)


def live(world: World, spell: Spell) -> None:
    for _ in range(spell.ticks):
        for i in range(3):
            if spell.reached[i]:
                world.see(i)
            if spell.awake[i]:
                world.act(i, spell.took_s if spell.reached[i] else 0.0, spell.reached[i], spell.heard[i])
            assert len(world.leaders()) <= 1, world.leaders()
        world.now += TICK_S
        assert len(world.leaders()) <= 1, world.leaders()


@given(st.lists(st.floats(0.96, 1.04), min_size=3, max_size=3), st.lists(spells, max_size=12))
def test_two_never_lead_at_once_while_clocks_run_alike(rates: list[float], spells: list[Spell]) -> None:
    world = World(rates)
    for spell in spells:
        live(world, spell)


def test_a_leader_that_is_cut_off_is_replaced_and_comes_back_as_a_follower() -> None:
    """The property above would hold where nobody ever leads; this one would not."""
    world, fine = World([1.0, 1.0, 1.0]), (True, True, True)
    live(world, Spell(ticks=4, reached=fine, awake=fine, heard=fine, took_s=0.0))
    assert world.leaders() == [0]
    live(world, Spell(ticks=16, reached=(False, True, True), awake=fine, heard=fine, took_s=0.0))
    assert world.leaders() == [1]
    live(world, Spell(ticks=16, reached=fine, awake=fine, heard=fine, took_s=0.0))
    assert world.leaders() == [1]
    assert world.term == Term(node=NodeId("n1"), epoch=2)


def test_a_silent_leader_stops_before_anybody_takes_its_place() -> None:
    assert LEASE_S * 1.1 < TAKEOVER_S * 0.95
    assert TAKEOVER_S + SPREAD_S < 3.5
