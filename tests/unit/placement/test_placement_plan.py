"""What holds of every plan, whatever the cluster."""

from __future__ import annotations

import random
from collections.abc import Iterator

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.placement.world import MODELS, NODES, RULES, World, site, sites, wish, wishes, worlds

from ollama_distributed.base.ids import NodeId
from ollama_distributed.placement.facts import Blob, Replica, Wish
from ollama_distributed.placement.outcome import Delete, Fetch, Load, Plan, Unload
from ollama_distributed.placement.plan import Planner


def where(plan: Plan, model: str) -> set[str]:
    return {replica.node for replica in plan.assignments.get(model, ())}


def stages(world: World, seed: int, count: int = 12) -> Iterator[Plan]:
    """Plans along the way; between them moves are done one here and there, in another order each
    time. Each comes while `world` is as it was planned for."""
    chance = random.Random(seed)
    for _ in range(count):
        plan = world.plan()
        yield plan
        if chance.random() < 0.7:
            world.adopt(plan)
        for move in chance.sample(plan.moves, chance.randint(0, len(plan.moves))):
            check_move(world, move)
            world.run(move)
        if chance.random() < 0.5:
            world.land()


def check_move(world: World, move: object) -> None:
    there = world.sites[move.node]  # type: ignore[attr-defined]
    match move:
        case Load(model=model, device=device):
            gpu, memory = world.wishes[model].need.of(device)
            if model in there.loaded:
                assert world.wishes[model].hold
                assert not there.loaded[model].held
                return
            assert not there.seats or len(there.loaded) < there.seats
            used_gpu = sum(one.memory_bytes for one in there.loaded.values() if one.device == "gpu")
            used = sum(one.memory_bytes for one in there.loaded.values() if one.device == "cpu")
            assert used + memory <= there.memory_bytes
            assert used_gpu + gpu <= there.gpu_bytes
            assert {blob.digest for blob in world.wishes[model].blobs} <= there.blobs
        case Fetch(digest=digest, size_bytes=size, holders=holders):
            assert holders
            assert all(digest in world.sites[holder].blobs for holder in holders)
            assert digest not in there.blobs | there.arriving
            coming = size + sum(world.size_of(other) for other in there.arriving)
            assert coming <= there.disk_free_bytes - RULES.disk_low_bytes
        case Delete(model=model):
            digests = {blob.digest for blob in world.wishes[model].blobs}
            others = [n for n, s in world.sites.items() if digests <= s.blobs and n != there.node]
            assert others, "the last copy"
            assert model not in there.loaded or not digests <= there.blobs


@given(worlds(), st.integers(0, 2**32))
def test_never_over_memory_or_disk_and_never_the_last_copy(world: World, seed: int) -> None:
    for plan in stages(world, seed):
        for node, there in world.sites.items():
            memory, gpu = there.memory_bytes, there.gpu_bytes
            lacks: dict[str, int] = {}
            strangers, warm = sum(model not in world.wishes for model in there.loaded), 0
            for model, replicas in plan.assignments.items():
                for replica in replicas:
                    if replica.node != node:
                        continue
                    one = world.wishes[model]
                    if replica.warm:
                        needed = one.need.of(replica.device)
                        gpu, memory, warm = gpu - needed[0], memory - needed[1], warm + 1
                    lacks |= {b.digest: b.size_bytes for b in one.blobs if b.digest not in there.blobs}
            assert memory >= 0
            assert gpu >= 0
            assert not there.seats or warm <= max(0, there.seats - strangers)
            if there.presence != "away":
                assert sum(lacks.values()) <= max(there.disk_free_bytes - RULES.disk_low_bytes, 0)


@given(worlds(), st.integers(0, 2**32))
def test_the_order_in_which_things_are_told_decides_nothing(world: World, seed: int) -> None:
    world.adopt(world.plan())
    plan = world.plan()
    events: list[tuple[str, object]] = [("wish", one) for one in world.wishes.values()]
    events += [("site", one) for one in world.sites.values()]
    events += [("standing", item) for item in world.standing.items()]
    random.Random(seed).shuffle(events)
    planner = Planner(RULES)
    for kind, one in events:
        if kind == "wish":
            planner.put_wish(one)  # type: ignore[arg-type]
        elif kind == "site":
            planner.put_site(one)  # type: ignore[arg-type]
        else:
            planner.put_standing(*one)  # type: ignore[misc]
    assert planner.plan() == plan


@settings(max_examples=200)
@given(worlds(), st.data())
def test_after_each_event_the_plan_is_that_of_a_new_planner(world: World, data: st.DataObject) -> None:
    planner = world.planner()
    for _ in range(data.draw(st.integers(1, 8))):
        plan = planner.plan()
        assert plan == world.plan()
        match data.draw(st.sampled_from(["site", "drop", "wish", "unwish", "adopt", "run", "scale"])):
            case "site":
                node = data.draw(st.sampled_from(NODES))
                world.sites[node] = data.draw(sites(node, world.wishes))
                planner.put_site(world.sites[node])
            case "drop":
                node = data.draw(st.sampled_from(NODES))
                world.sites.pop(node, None)
                planner.drop_site(node)
            case "wish":
                model = data.draw(st.sampled_from(MODELS))
                world.wishes[model] = data.draw(wishes(model))
                planner.put_wish(world.wishes[model])
            case "scale":
                for model, one in world.wishes.items():
                    world.wishes[model] = msgspec.structs.replace(
                        one, copies=data.draw(st.integers(0, 4)), warm=data.draw(st.integers(0, 4))
                    )
                    planner.put_wish(world.wishes[model])
            case "unwish":
                model = data.draw(st.sampled_from(MODELS))
                world.wishes.pop(model, None)
                planner.drop_wish(model)
            case "adopt":
                world.adopt(plan)
                planner.adopt(plan)
            case "run":
                for move in plan.moves:
                    world.run(move)
                world.land()
                for one_site in world.sites.values():
                    planner.put_site(one_site)
    assert planner.plan() == world.plan()


@given(worlds())
def test_it_comes_to_rest(world: World) -> None:
    plan = world.settle()
    assert world.plan().moves == ()
    assert world.plan().assignments == plan.assignments


@given(worlds())
def test_what_was_decided_stands(world: World) -> None:
    """The same facts again: nothing goes elsewhere, though nothing has moved yet."""
    for _ in range(4):
        plan = world.plan()
        world.adopt(plan)
    assert world.plan().assignments == plan.assignments


@given(worlds())
def test_pins_are_honoured_or_refused(world: World) -> None:
    plan = world.plan()
    refused = {refusal.model for refusal in plan.refusals}
    for model, one in world.wishes.items():
        for pin in one.pins:
            assert pin in where(plan, model) or model in refused


@given(worlds())
def test_what_is_not_refused_is_there(world: World) -> None:
    plan = world.settle()
    refused = {refusal.model for refusal in plan.refusals}
    for model, one in world.wishes.items():
        if model in refused:
            continue
        replicas = plan.assignments.get(model, ())
        assert len(replicas) >= one.copies
        assert sum(replica.warm for replica in replicas) == one.warm
        for replica in replicas:
            there = world.sites[replica.node]
            if there.presence in ("here", "wavering"):
                assert {blob.digest for blob in one.blobs} <= there.blobs
                loaded = there.loaded.get(model)
                assert loaded is not None if replica.warm else loaded is None or not loaded.held
                assert not replica.warm or not one.hold or (loaded is not None and loaded.held)
        if len(replicas) >= max(one.copies, 1) and all(
            world.sites[replica.node].presence in ("here", "wavering") for replica in replicas
        ):
            for node, there in world.sites.items():
                if there.presence in ("here", "wavering") and model in there.named:
                    assert {blob.digest for blob in one.blobs} <= there.blobs, f"{node} has another version"


@given(st.data())
def test_a_drained_node_is_emptied_while_its_models_run_on(data: st.DataObject) -> None:
    wanted = {m: wish(m, 3, copies=2, warm=data.draw(st.integers(0, 2))) for m in MODELS}
    blobs = frozenset(blob.digest for one in wanted.values() for blob in one.blobs)
    nodes = {NODES[0]: site("n0", 40, blobs=blobs)}
    nodes |= {node: site(node, 40) for node in NODES[1:4]}
    world = World(nodes, wanted)
    world.settle()
    victim = data.draw(st.sampled_from(NODES[:4]))
    running = {m: sum(m in s.loaded for s in world.sites.values()) for m in MODELS}
    world.sites[victim] = msgspec.structs.replace(world.sites[victim], presence="leaving")
    for _ in range(60):
        plan = world.plan()
        world.adopt(plan)
        for move in plan.moves:
            world.run(move)
            for model in MODELS:
                assert sum(model in s.loaded for s in world.sites.values()) >= running[model]
        world.land()
    assert not plan.moves
    assert not plan.refusals
    assert not world.sites[victim].loaded
    for model, one in wanted.items():
        assert victim not in where(plan, model)
        holding = [n for n, s in world.sites.items() if one.blobs[0].digest in s.blobs and n != victim]
        assert len(holding) >= 2


@given(worlds(), st.data())
def test_a_lost_node_moves_nothing_but_its_own(world: World, data: st.DataObject) -> None:
    before = world.settle()
    victim = data.draw(st.sampled_from(sorted(world.sites)))
    world.sites[victim] = msgspec.structs.replace(world.sites[victim], presence="lost")
    after = world.plan()
    short = {refusal.model for refusal in before.refusals}
    for model in world.wishes:
        if victim not in where(before, model) and model not in short:
            assert where(after, model) == where(before, model)
        elif model not in short:
            assert where(before, model) - {victim} <= where(after, model)


@given(st.integers(1, 6), st.integers(1, 4))
def test_replicas_are_spread_over_zones(copies: int, zones: int) -> None:
    nodes = {
        NodeId(f"s{i:02}"): site(f"s{i:02}", labels={"zone": f"z{i % zones}"}) for i in range(zones * copies)
    }
    nodes[NodeId("s00")] = msgspec.structs.replace(nodes[NodeId("s00")], blobs=frozenset({"m-w"}))
    plan = World(nodes, {"m": wish("m", copies=copies, warm=copies)}).plan()
    counts = [0] * zones
    for node in where(plan, "m"):
        counts[int(nodes[NodeId(node)].labels["zone"][1:])] += 1
    assert sum(counts) == copies
    assert max(counts) - min(counts) <= 1


def test_a_refusal_names_the_figures() -> None:
    gib = 1 << 30
    world = World(
        {NodeId("a"): site("a", 8 * gib, 99 * gib, blobs=frozenset({"m-w"}))},
        {"m": wish("m", int(12.3 * gib) - 1, copies=1, warm=1)},
    )
    plan = world.plan()
    assert plan.assignments == {}
    assert plan.refusals[0].reasons == (
        "does not fit: needs 12.3 GiB, the most that is free is 8.0 GiB on a",
    )
    planner = world.planner()
    planner.plan()
    assert planner.explain("m")[0].reason == "does not fit: needs 12.3 GiB, node has 8.0 GiB"


def test_a_replica_waits_for_the_memory_of_what_goes() -> None:
    """Two models change places: without room for both, one must stop first."""
    nodes = {
        NodeId("a"): site("a", 5, labels={"k": "1"}, blobs=frozenset({"p-w"})),
        NodeId("b"): site("b", 5, labels={"k": "2"}, blobs=frozenset({"q-w"})),
    }
    world = World(nodes, {"p": wish("p", warm=1), "q": wish("q", warm=1)})
    world.settle()
    assert set(world.sites[NodeId("a")].loaded) == {"p"}
    world.wishes = {"p": wish("p", warm=1, labels={"k": "2"}), "q": wish("q", warm=1, labels={"k": "1"})}
    world.settle()
    assert set(world.sites[NodeId("a")].loaded) == {"q"}
    assert set(world.sites[NodeId("b")].loaded) == {"p"}


def test_an_offline_node_is_waited_for_and_then_replaced() -> None:
    nodes = {NodeId(n): site(n) for n in "abc"}
    nodes[NodeId("a")] = site("a", blobs=frozenset({"m-w"}))
    world = World(nodes, {"m": wish("m", copies=2)})
    before = world.settle()
    gone = next(iter(where(before, "m") - {"a"}))
    world.sites[NodeId(gone)] = msgspec.structs.replace(world.sites[NodeId(gone)], presence="away")
    assert where(world.plan(), "m") == where(before, "m")
    assert world.plan().moves == ()
    world.sites[NodeId(gone)] = msgspec.structs.replace(world.sites[NodeId(gone)], presence="lost")
    after = world.plan()
    assert where(after, "m") == {"a", "b", "c"} - {gone}
    assert isinstance(after.moves[0], Fetch)
    assert after.moves[0].holders == ("a",)


def test_a_surplus_copy_goes_only_when_room_is_short_or_it_is_said() -> None:
    blobs = frozenset({"m-w"})
    nodes = {NodeId(n): site(n, blobs=blobs) for n in "abc"}
    world = World(nodes, {"m": wish("m", copies=1)})
    assert world.plan().moves == ()
    world.sites[NodeId("c")] = site("c", disk=1, blobs=blobs)
    world.adopt(world.plan())
    assert (
        [move for move in world.plan().moves if isinstance(move, Delete)]
        == [move for move in world.plan().moves if move.node == "c"]
        != []
    )
    world.wishes["m"] = wish("m", copies=1, keep=False)
    assert {move.node for move in world.plan().moves} == {"b", "c"}


def test_scaling_down_unloads_and_scaling_up_prefers_what_has_the_files() -> None:
    blobs = frozenset({"m-w"})
    nodes = {NodeId(n): site(n, blobs=blobs if n in "cd" else frozenset()) for n in "abcd"}
    world = World(nodes, {"m": wish("m", copies=2, warm=2)})
    plan = world.settle()
    assert plan.assignments["m"] == (Replica(NodeId("c"), True), Replica(NodeId("d"), True))
    world.wishes["m"] = wish("m", copies=2, warm=0)
    assert {type(move) for move in world.plan().moves} == {Unload}
    world.settle()
    assert not any(one.loaded for one in world.sites.values())


def test_moves_in_flight_are_bounded() -> None:
    nodes = {NodeId(f"n{i}"): site(f"n{i}", 100, 100) for i in range(9)}
    wanted: dict[str, Wish] = {f"m{i}": wish(f"m{i}", 2, copies=9) for i in range(3)}
    nodes[NodeId("n0")] = site("n0", 100, 100, blobs=frozenset(f"m{i}-w" for i in range(3)))
    world = World(nodes, wanted)
    plan = world.plan()
    assert len(plan.moves) == RULES.fetches
    assert plan.waiting == 24 - RULES.fetches
    world.run(plan.moves[0])
    assert len(world.plan().moves) == RULES.fetches - 1


def test_what_was_on_its_way_to_nodes_that_went_away_holds_up_nothing() -> None:
    nodes = {
        NodeId(f"n{i}"): site(f"n{i}", presence="away", arriving=frozenset({"m-w"}))
        for i in range(RULES.fetches)
    }
    nodes |= {NodeId("a"): site("a", blobs=frozenset({"m-w"})), NodeId("b"): site("b")}
    world = World(nodes, {"m": wish("m", copies=RULES.fetches + 2)})
    assert [move.node for move in world.plan().moves if isinstance(move, Fetch)] == ["b"]


def test_nothing_is_brought_into_the_room_of_what_is_on_its_way() -> None:
    """Not even of what is wanted there no more: it comes all the same."""
    nodes = {
        NodeId("a"): site("a", disk=10, labels={"k": "1"}, arriving=frozenset({"p-w"})),
        NodeId("b"): site("b", blobs=frozenset({"p-w", "q-w"})),
    }
    world = World(nodes, {"p": wish("p", 6, copies=0), "q": wish("q", 4, labels={"k": "1"})})
    planner = world.planner()
    plan = planner.plan()
    assert plan.assignments == {}
    assert plan.refusals[0].model == "q"
    assert planner.explain("q")[0].reason.startswith("no room on its disk")
    world.wishes["p"] = wish("p", 6, labels={"k": "1"})
    planner.put_wish(world.wishes["p"])
    assert where(planner.plan(), "p") == {"a"}, "there is room for what comes"
    assert where(planner.plan(), "q") == set()
    world.sites[NodeId("a")] = site("a", disk=10, labels={"k": "1"})
    planner.put_site(world.sites[NodeId("a")])
    planner.drop_wish("p")
    assert where(planner.plan(), "q") == {"a"}


def test_who_is_to_delete_a_blob_is_not_asked_for_it() -> None:
    both = frozenset({"w", "p-t", "q-t"})
    nodes = {NodeId(n): site(n, blobs=both - {"q-t"}) for n in "ab"}
    nodes[NodeId("c")] = site("c", labels={"k": "1"})
    nodes[NodeId("d")] = site("d", disk=0, blobs=frozenset({"q-t"}))
    shares = Blob("w", 4)
    world = World(
        nodes,
        {
            "p": wish("p", blobs=(shares, Blob("p-t", 1)), keep=False),
            "q": wish("q", blobs=(shares, Blob("q-t", 1)), labels={"k": "1"}),
        },
    )
    world.adopt(world.plan())
    moves = world.plan().moves
    gone = {move.node for move in moves if isinstance(move, Delete)}
    asked = {move.digest: move.holders for move in moves if isinstance(move, Fetch)}
    assert gone == {"b"}
    assert asked == {"w": ("a",), "q-t": ("d",)}


def test_where_all_nodes_have_a_model_nothing_else_is_said_to_lack() -> None:
    held = frozenset({"m-w"})
    world = World({node: site(node, blobs=held) for node in NODES[:2]}, {"m": wish("m", 1, copies=3)})
    assert world.settle().refusals[0].reasons == ("all 2 nodes that may have it have it",)
