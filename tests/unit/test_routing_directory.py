"""Who holds a model: from the state alone, made anew only when it changes."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any, TypeAlias, cast

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ollama_distributed.base.errors import NoCapacity
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import NodeId, RequestId
from ollama_distributed.base.inference import InferenceRequest, TextPrompt
from ollama_distributed.cluster.load import Load, ModelLoad
from ollama_distributed.routing import directory as directories
from ollama_distributed.routing.directory import Directory
from ollama_distributed.routing.plan import Standing
from ollama_distributed.routing.rosters import MOST_HOLDERS, MOST_WARM
from ollama_distributed.routing.service import Router
from ollama_distributed.routing.successors import MOST_ASKED
from ollama_distributed.state import keys
from ollama_distributed.state.cluster import ClusterState, apply
from ollama_distributed.state.codec import encode
from ollama_distributed.state.records import (
    Advert,
    HeldModel,
    Holdings,
    Intent,
    Lease,
    LoadedPlace,
    Member,
    Placed,
)

NAME = "registry.ollama.ai/library/m:latest"
Change: TypeAlias = str | int | list[str]
ZONE = {"zone": "a"}


def held(name: str = NAME) -> HeldModel:
    return HeldModel(name=name, display="m", digest="d", size_bytes=1, modified_at=1.0)


class View:
    me = NodeId("me")

    def __init__(self) -> None:
        self.seen = ClusterState()
        self.looks = 0
        self.listened: list[NodeId] = []
        self.busy: dict[NodeId, int] = {}
        """Slots of the model that nodes last said to be busy."""

    def state(self) -> ClusterState:
        self.looks += 1
        return self.seen

    def interest(self, nodes: Iterable[NodeId]) -> None:
        self.listened += nodes

    def report(self, node: NodeId) -> Load | None:
        busy = self.busy.get(node)
        if busy is None:
            return None
        return Load(boot="b", models=(ModelLoad(name=NAME, slots=4, busy=busy, life=1),), age_s=0.5)

    def write(self, key: str, record: msgspec.Struct) -> None:
        self.seen = apply(self.seen, key, encode(record), self.seen.revision + 1)

    def node(self, name: str, status: Any = "online", *models: HeldModel, hop: str = "h:1") -> None:
        node = NodeId(name)
        self.advertise(name, hop)
        self.write(keys.holdings(node), Holdings(node=node, models=models or (held(),)))
        self.write(keys.member(node), Member(node=node, status=status, since=0.0))

    def load(self, name: str, *, loaded: bool = True) -> None:
        places = (LoadedPlace(model=NAME),) if loaded else ()
        self.write(keys.placed(name), Placed(node=NodeId(name), loaded=places))

    def advertise(self, name: str, hop: str) -> None:
        node, hops = NodeId(name), (hop,) if hop else ()
        self.write(
            keys.advert(node),
            Advert(node=node, name=name, role="node", version="1", boot="b", started_at=0.0, hop=hops),
        )

    def change(self, name: str, change: Change, at: float) -> None:
        """A status, what it does, how many of its slots are busy, or the versions of the model that it
        holds; "far": in an engine of its own."""
        node = NodeId(name)
        if isinstance(change, int):
            self.busy[node] = change
        elif not isinstance(change, str):
            models = tuple(
                HeldModel(
                    name=NAME, display="m", digest=one, size_bytes=1, modified_at=at, remote=one == "far"
                )
                for one in change
            )
            self.write(keys.holdings(name), Holdings(node=node, models=models))
        elif change in ("load", "unload"):
            self.load(name, loaded=change == "load")
        elif change in ("drain", "free", "zone"):
            labels = {"zone": "a"} if change == "zone" else {}
            self.write(keys.intent(name), Intent(node=node, drain=change == "drain", labels=labels))
        elif change in ("h:1", ""):
            self.advertise(name, change)
        elif change == "gone":
            self.seen = apply(self.seen, keys.member(name), None, self.seen.revision + 1)
        else:
            status: Any = change
            self.write(keys.member(name), Member(node=node, status=status, since=at))


class Shelf:
    def __init__(self, *names: str) -> None:
        self.names = names

    def version(self, name: str) -> str:
        return "d" if name in self.names else ""


def directory(view: View) -> Directory:
    return Directory(view, random.Random(1).randrange)


class Local:
    """This node's serving, that has room."""

    def work(self, key: str) -> ModelLoad | None:
        return ModelLoad(name=key, slots=4)


def router(view: View, *own: str) -> Router:
    nobody: Any = None
    local: Any = Local()
    return Router(local, Shelf(*own), nobody, view, random.Random(1).randrange)


def text_request() -> InferenceRequest:
    return InferenceRequest(
        request_id=RequestId("r"), identity=Identity("admin"), model="m", prompt=TextPrompt(text="x")
    )


def test_every_spelling_of_a_name_finds_its_holders() -> None:
    view = View()
    view.node("n1")
    view.node("n2", "suspect")
    view.node("me")
    found = directory(view)
    for name in ("m", "M", "m:latest", "library/M:Latest", NAME, f"https://{NAME}"):
        assert [(one.node, one.status) for one in found.others(name)] == [("n1", "online"), ("n2", "suspect")]
    assert found.others("other") == ()
    assert found.others("///") == ()


def test_it_follows_the_state() -> None:
    view, status = View(), []
    view.node("n1")
    found = directory(view)
    for change in ("online", "offline"):
        view.write(keys.member("n1"), Member(node=NodeId("n1"), status=change, since=1.0))  # type: ignore[arg-type]
        status.append(found.others("m")[0].status)
    view.write(keys.member("n1"), Member(node=NodeId("n1"), status="online", since=2.0))
    view.write(keys.intent("n1"), Intent(node=NodeId("n1"), drain=True))
    assert [*status, found.others("m")[0].status] == ["online", "offline", "draining"]
    view.write(keys.holdings("n1"), Holdings(node=NodeId("n1")))
    assert found.others("m") == ()


def test_standings_are_kept_while_only_the_lease_changes() -> None:
    view = View()
    view.node("n1")
    found = directory(view)
    first = found.others("m")
    view.write(keys.LEASE, Lease(node=NodeId("n1"), epoch=1))
    assert found.others("m") is first


def test_a_change_of_one_node_makes_its_standing_anew_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    view, made = View(), list[Any]()

    def standing(**fields: Any) -> Standing:
        made.append(fields["node"])
        return Standing(**fields)

    monkeypatch.setattr(directories, "Standing", standing)
    for i in range(200):
        view.node(f"n{i}")
    found = directory(view)
    found.others("m")
    assert len(made) == 200
    view.load("n7")
    view.node("n8", "online", held(), held("registry.ollama.ai/library/other:latest"))
    found.others("m")
    assert sorted(made[200:]) == ["n7", "n8"]


def test_of_very_many_holders_a_draw_is_looked_at() -> None:
    view = View()
    for i in range(200):
        view.node(f"n{i}")
    found = directory(view)
    draws = [found.others("m") for _ in range(20)]
    assert all(len({one.node for one in draw}) == len(draw) == MOST_HOLDERS for draw in draws)
    assert len({one.node for draw in draws for one in draw}) > 50
    for i in range(200):
        view.write(keys.member(f"n{i}"), Member(node=NodeId(f"n{i}"), status="offline", since=1.0))
    assert len(found.others("m")) == MOST_HOLDERS
    for lucky in ("n7", "n120"):
        view.write(keys.member(lucky), Member(node=NodeId(lucky), status="online", since=1.0))
    assert {one.node for one in found.others("m") if one.status == "online"} == {"n7", "n120"}


def test_of_very_many_holders_those_with_it_in_memory_are_drawn_first() -> None:
    view, warm = View(), {f"n{i}" for i in range(0, 200, 20)}
    for i in range(200):
        view.node(f"n{i}")
    for name in warm:
        view.load(name)
    found = directory(view)
    draws = [{one.node for one in found.others("m")} for _ in range(50)]
    assert all(len(draw & warm) == MOST_WARM and len(draw) == MOST_HOLDERS for draw in draws)
    assert set().union(*draws) > warm
    view.load("n0", loaded=False)
    view.write(keys.member("n20"), Member(node=NodeId("n20"), status="suspect", since=1.0))
    warm -= {"n0", "n20"}
    assert all(len({one.node for one in found.others("m")} & warm) == MOST_WARM for _ in range(50))


def test_of_very_many_holders_the_few_with_the_labels_that_are_wanted() -> None:
    view, chance, zone = View(), random.Random(1), {"zone": "a"}
    for i in range(100):
        view.node(f"n{i}")
    found, labelled = directory(view), set[str]()
    assert len(found.others("m", zone)) == MOST_HOLDERS, "nobody has them: the plan says so"
    for _ in range(100):
        name = f"n{chance.randrange(100)}"
        labelled = {*labelled, name} if len(labelled) < MOST_HOLDERS else set()
        for node in range(100):
            labels = {"zone": "a" if f"n{node}" in labelled else "b"}
            if dict(found.labels(NodeId(f"n{node}"))) != labels:
                view.write(keys.intent(f"n{node}"), Intent(node=NodeId(f"n{node}"), labels=labels))
        if labelled:
            assert {one.node for one in found.others("m", zone)} == labelled


def test_who_may_have_an_answer_is_the_same_at_every_node_and_of_very_many_those_with_it_in_memory() -> None:
    view = View()
    for i in range(100):
        view.node(f"n{i}")
    request = text_request()
    first = router(view)
    assert len(first._successors.keepers(request)) == MOST_ASKED
    for name in ("n99", "n50"):
        view.load(name)
    view.load("n3")
    view.load("n3", loaded=False)
    kept, fresh = first._successors.keepers(request), router(view)._successors.keepers(request)
    assert kept == fresh
    assert kept[:2] == ["n50", "n99"]


def test_a_model_is_unloaded_where_the_state_says_it_is_though_no_report_has_come() -> None:
    view, asked = View(), list[NodeId]()
    for i in range(100):
        view.node(f"n{i}")
    view.load("n42")
    view.load("n77")

    class Peers:
        def start(self, node: NodeId, *_: Any) -> Any:
            asked.append(node)
            return self

        def cancel(self) -> None: ...

    local, peers = cast(Any, Local()), cast(Any, Peers())
    made = Router(local, Shelf(), peers, view, random.Random(1).randrange)
    made.start(msgspec.structs.replace(text_request(), load_only=True, keep_alive_s=0.0), lambda _: None)
    assert sorted(asked) == ["n42", "n77"]


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["me", *(f"n{number}" for number in range(1, 12))]),
        st.one_of(
            st.sampled_from(["online", "online", "suspect", "offline", "gone", "load", "unload"]),
            st.sampled_from(["drain", "free", "zone", "h:1", ""]),
            st.integers(0, 5),
            st.lists(st.sampled_from(["d", "d", "d", "e", "far"]), max_size=1),
        ),
        st.sampled_from(["", "followed", "asked"]),
    ),
    max_size=60,
)


class Dice:
    """Thrown alike for two that are compared."""

    def __init__(self) -> None:
        self.chance = random.Random(0)

    def __call__(self, sides: int) -> int:
        return self.chance.randrange(sides)


def plain(state: ClusterState, me: NodeId) -> list[tuple[Any, ...]]:
    """What is to be known of the others that hold the model, straight from the records."""
    found = []
    for node in state.holders(NAME):
        known = state.nodes[node]
        loaded = known.placed is not None and any(one.model == NAME for one in known.placed.loaded)
        tier = 2 if known.status != "online" else int(not loaded)
        reachable = known.advert is not None and known.advert.hop != ()
        if node != me:
            found.append((tier, node, known.status, reachable, known.labels))
    return sorted(found, key=lambda one: one[:2])


@pytest.mark.parametrize("everywhere", [False, True], ids=["nobody holds it at first", "all hold it"])
@given(changes=CHANGES)
@example(changes=[("n1", ["d"], ""), ("n2", ["e"], "asked"), ("n2", "offline", "asked")])
@example(
    changes=[("n1", ["d"], "asked"), ("me", ["d"], "asked"), ("n2", ["e"], "asked"), ("n2", [], "asked")]
)
def test_what_is_kept_and_put_right_chooses_as_what_would_be_made_anew(
    changes: list[tuple[str, Change, str]], everywhere: bool
) -> None:
    """The third of a change: what comes after it."""
    view, local, nobody = View(), cast(Any, Local()), cast(Any, None)
    if everywhere:
        for number in range(1, 12):
            view.node(f"n{number}")

    def made() -> tuple[Router, Dice]:
        dice = Dice()
        return Router(local, Shelf(), nobody, view, dice), dice

    kept, kept_dice = made()
    for number, (name, change, then) in enumerate(changes):
        view.change(name, change, float(number))
        if then == "followed":
            kept.chooser.directory.follow()
        if then != "asked":
            continue
        fresh, fresh_dice = made()
        one, other = kept.chooser.directory, fresh.chooser.directory
        tier = {node: tier for tier, node, *_ in plain(view.seen, view.me)}
        assert [
            (tier[one.node], one.node, one.status, one.reachable, one.labels) for one in one.everyone("m")
        ] == plain(view.seen, view.me)
        assert one.warm("m") == {node for node in tier if tier[node] == 0} == other.warm("m")
        counts = view.seen.current(NAME)
        assert one.digest("m") == other.digest("m") == (counts.digest if counts is not None else "")
        for digest in ("d", "e"):
            assert one.superseded("m", digest) == other.superseded("m", digest)
        for seed, wanted in enumerate(({}, {}, ZONE, ZONE)):
            kept_dice.chance, fresh_dice.chance = random.Random(seed), random.Random(seed)
            assert one.others("m", wanted) == other.others("m", wanted)
            assert one.others("other", wanted) == other.others("other", wanted) == ()
            assert kept.chooser.choose(text_request()).plan == fresh.chooser.choose(text_request()).plan
            assert kept.chooser.plan("m", wanted) == fresh.chooser.plan("m", wanted)


def test_a_request_pays_nothing_for_changes_that_were_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    view = View()
    for i in range(200):
        view.node(f"n{i}")
    found = directory(view)
    found.others("m")

    def standing(**_: Any) -> Standing:
        raise AssertionError("by the request")

    for i in range(200):
        view.load(f"n{i}")
        found.follow()
    view.write(keys.member("n7"), Member(node=NodeId("n7"), status="offline", since=2.0))
    found.follow()
    monkeypatch.setattr(directories, "Standing", standing)
    assert len(found.others("m")) == MOST_HOLDERS
    assert len(found.warm("m")) == 199


def test_what_nobody_asks_for_is_followed_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directories, "_MOST_UNASKED", 10)
    view, made = View(), list[Any]()

    def standing(**fields: Any) -> Standing:
        made.append(fields["node"])
        return Standing(**fields)

    monkeypatch.setattr(directories, "Standing", standing)
    view.node("n1")
    view.node("n2")
    found = directory(view)
    found.others("m")
    for number in range(40):
        view.load("n1", loaded=number % 2 == 0)
        found.follow()
    assert made == ["n1", "n2", *["n1"] * 10]
    assert [one.node for one in found.others("m")] == ["n1", "n2"]
    assert found.warm("m") == set()


def test_a_node_without_an_address_is_left_out_with_the_reason() -> None:
    view = View()
    view.node("n1", hop="")
    view.node("n2")
    made = router(view).plan("m")
    assert made.order == ("n2",)
    assert [(one.node, "address" in one.reason) for one in made.left_out] == [("n1", True)]
    assert view.listened == ["n1", "n2"]


def test_what_is_here_needs_no_word_of_the_cluster() -> None:
    """Also before the state was read for the first time, and for names that no rule allows."""
    view = View()
    assert router(view, "m").plan("m").order == ("me",)
    assert router(view, "odd name!").plan("odd name!").order == ("me",)
    assert router(view).plan("m").order == ()
    view.node("n1")
    assert router(view, "m").plan("m").order == ("me", "n1")
    view.write(keys.intent("me"), Intent(node=NodeId("me"), drain=True))
    assert router(view, "m").plan("m").order == ("n1", "me")


def test_of_two_versions_the_one_that_counts_is_asked_for() -> None:
    view = View()
    old, new = held(), HeldModel(name=NAME, display="m", digest="new", size_bytes=1, modified_at=2.0)
    view.node("me", "online", old)
    view.node("n1", "online", old)
    view.node("n2", "online", new)
    assert [one.node for one in directory(view).others("m")] == ["n2"]
    assert router(view, "m").plan("m").order == ("n2",), "not what this node itself holds"
    # It has got another one, and the news is still under way: nothing can be newer.
    view.write(keys.holdings("me"), Holdings(node=NodeId("me")))
    assert router(view, "m").plan("m").order == ("me", "n2")
    view.write(keys.holdings("me"), Holdings(node=NodeId("me"), models=(old,)))
    view.write(keys.member("n2"), Member(node=NodeId("n2"), status="offline", since=1.0))
    assert router(view, "m").plan("m").order == ("me", "n1"), "rather an old one than none"


def test_what_the_state_says_of_this_node_is_not_believed() -> None:
    """It was deleted here a moment ago, and the news is still under way."""
    view = View()
    view.node("me")
    assert router(view).plan("m").order == ()


def test_only_nodes_with_the_labels_that_a_request_wants() -> None:
    view = View()
    view.node("me")
    view.node("n1")
    view.write(keys.intent("n1"), Intent(node=NodeId("n1"), labels={"zone": "a"}))
    nobody: Any = None
    local: Any = Local()
    heard: list[Any] = []
    for zone, order in (("a", ("n1",)), ("b", ())):
        made = Router(
            local,
            Shelf("m"),
            nobody,
            view,
            random.Random(1).randrange,
            wanted=lambda _, zone=zone: {"zone": zone},
        )
        request = text_request()
        assert made.chooser.choose(request).plan.order == order
    made.start(request, heard.append)
    (failed,) = heard
    assert isinstance(failed.error, NoCapacity)
    assert "zone=b" in failed.error.message


def test_what_was_sent_where_the_model_is_loaded_just_now_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Local, "work", lambda *_: None)
    view = View()
    view.node("n1")
    chooser = router(view, "m").chooser
    holders = chooser.holders("m")
    assert not chooser.loads(NAME, holders)[view.me].queued
    for _ in range(5):
        chooser.caches.started(view.me, NAME)
    load = chooser.loads(NAME, holders)[view.me]
    assert (load.loaded, load.queued) == (False, 5)
    assert chooser.plan("m").order[0] == "n1"
