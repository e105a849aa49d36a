"""Small clusters for the planner: made by Hypothesis, and moved on as a plan says."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from hypothesis import strategies as st

from ollama_distributed.base.ids import NodeId
from ollama_distributed.placement.facts import Blob, Loaded, Need, Presence, Replica, Rules, Site, Wish
from ollama_distributed.placement.outcome import Delete, Fetch, Load, Move, Plan, Unload
from ollama_distributed.placement.plan import Planner

RULES = Rules(spread_by=("zone",), disk_low_bytes=2, fetches=4, deletes=4)
NODES = [NodeId(f"n{i}") for i in range(6)]
MODELS = [f"m{i}" for i in range(5)]


def wish(model: str, size: int = 4, **more: object) -> Wish:
    fields: dict[str, object] = {"blobs": (Blob(f"{model}-w", size),), "need": Need(memory_bytes=size + 1)}
    return Wish(model=model, **{**fields, **more})  # type: ignore[arg-type]


def site(node: str, memory: int = 20, disk: int = 40, **more: object) -> Site:
    return Site(
        node=NodeId(node),
        memory_bytes=memory,
        disk_free_bytes=disk,
        **more,  # type: ignore[arg-type]
    )


@st.composite
def wishes(draw: st.DrawFn, model: str) -> Wish:
    size = draw(st.integers(1, 9))
    # Two models may share their weights.
    weights = draw(st.sampled_from([f"{model}-w", "shared"]))
    blobs = (Blob(weights, 5 if weights == "shared" else size), Blob(f"{model}-t", 1))
    gpu = draw(st.sampled_from([0, 0, size + 1]))
    copies = draw(st.integers(0, 4))
    return Wish(
        model=model,
        blobs=blobs,
        need=Need(memory_bytes=size + 2, gpu_bytes=gpu, host_bytes=1 if gpu else 0),
        copies=copies,
        warm=draw(st.integers(0, max(copies, 1))),
        hold=draw(st.booleans()),
        labels=draw(st.sampled_from([{}, {}, {"kind": "a"}, {"zone": "x"}])),
        pins=tuple(sorted(draw(st.sets(st.sampled_from(NODES), max_size=1)))),
        keep=draw(st.booleans()),
        priority=draw(st.sampled_from([0, 0, 1])),
    )


PRESENCES: st.SearchStrategy[Presence] = st.sampled_from(
    ["here", "here", "here", "wavering", "away", "leaving", "lost"]
)


@st.composite
def sites(draw: st.DrawFn, node: NodeId, wanted: Mapping[str, Wish]) -> Site:
    have = sorted({blob.digest for one in wanted.values() for blob in one.blobs})
    blobs = draw(st.frozensets(st.sampled_from(have), max_size=6)) if have else frozenset()
    complete = [m for m, one in wanted.items() if {b.digest for b in one.blobs} <= blobs]
    memory = draw(st.integers(4, 30))
    loaded: dict[str, Loaded] = {}
    free = memory
    for model in draw(st.lists(st.sampled_from(complete), unique=True, max_size=3)) if complete else []:
        need = wanted[model].need.memory_bytes
        if need <= free:
            free -= need
            loaded[model] = Loaded("cpu", need, held=draw(st.booleans()))
    if draw(st.integers(0, 5)) == 0 and free >= 3:
        loaded["stranger"] = Loaded("cpu", 3)
    seats = draw(st.sampled_from([0, 0, 0, 1, 2]))
    if seats and len(loaded) > seats:
        loaded = dict(list(loaded.items())[-seats:])
    others = [digest for digest in have if digest not in blobs]
    return Site(
        node=node,
        presence=draw(PRESENCES),
        labels=draw(
            st.sampled_from([{}, {"zone": "x"}, {"zone": "y", "kind": "a"}, {"zone": "x", "kind": "a"}])
        ),
        memory_bytes=memory,
        gpu_bytes=draw(st.sampled_from([0, 0, 12])),
        disk_free_bytes=draw(st.integers(0, 40)),
        speed=draw(st.sampled_from([0, 0, 1])),
        blobs=blobs,
        arriving=draw(st.frozensets(st.sampled_from(others), max_size=1)) if others else frozenset(),
        loaded=loaded,
        seats=seats,
        named=frozenset(complete) | draw(st.frozensets(st.sampled_from(MODELS), max_size=1)),
        no_load=draw(st.sampled_from([frozenset(), frozenset(), frozenset(MODELS[:2])])),
        no_fetch=draw(st.sampled_from([frozenset(), frozenset(), frozenset(MODELS[:2])])),
    )


class World:
    """Sites and wishes; `run` does what a plan says."""

    def __init__(
        self, nodes: Mapping[NodeId, Site], wanted: Mapping[str, Wish], rules: Rules = RULES
    ) -> None:
        self.sites = dict(nodes)
        self.wishes = dict(wanted)
        self.standing: dict[NodeId, dict[str, Replica]] = {}
        self.rules = rules

    def planner(self) -> Planner:
        planner = Planner(self.rules)
        for one in self.wishes.values():
            planner.put_wish(one)
        for there in self.sites.values():
            planner.put_site(there)
        for node, standing in self.standing.items():
            planner.put_standing(node, standing)
        return planner

    def plan(self) -> Plan:
        return self.planner().plan()

    def adopt(self, plan: Plan) -> None:
        self.standing = {node: {} for node in self.standing}
        for model, replicas in plan.assignments.items():
            for replica in replicas:
                self.standing.setdefault(replica.node, {})[model] = replica

    def size_of(self, digest: str) -> int:
        sizes = (b.size_bytes for one in self.wishes.values() for b in one.blobs if b.digest == digest)
        return max(sizes, default=0)

    def land(self) -> None:
        """What was on its way is there."""
        for node, there in self.sites.items():
            if there.arriving and there.presence in ("here", "wavering", "leaving"):
                free = there.disk_free_bytes - sum(self.size_of(d) for d in there.arriving)
                blobs = there.blobs | there.arriving
                come = {m for m, one in self.wishes.items() if {b.digest for b in one.blobs} <= blobs}
                self.sites[node] = msgspec.structs.replace(
                    there, blobs=blobs, named=there.named | come, arriving=frozenset(), disk_free_bytes=free
                )

    def run(self, move: Move) -> None:
        there = self.sites[move.node]
        match move:
            case Fetch(digest=digest):
                there = msgspec.structs.replace(there, arriving=there.arriving | {digest})
            case Load(model=model, device=device):
                gpu, memory = self.wishes[model].need.of(device)
                loaded = Loaded(device, gpu if device == "gpu" else memory)
                if model in there.loaded:
                    loaded = msgspec.structs.replace(there.loaded[model], held=True)
                there = msgspec.structs.replace(there, loaded={**there.loaded, model: loaded})
            case Unload(model=model):
                left = {name: one for name, one in there.loaded.items() if name != model}
                there = msgspec.structs.replace(there, loaded=left)
            case Delete(model=model):
                there = self._deleted(there, model)
        self.sites[move.node] = there

    def _deleted(self, there: Site, model: str) -> Site:
        """As a catalogue does: what another whole model needs stays."""
        mine = {blob.digest: blob.size_bytes for blob in self.wishes[model].blobs}
        others = {
            blob.digest
            for name, one in self.wishes.items()
            if name != model and {b.digest for b in one.blobs} <= there.blobs
            for blob in one.blobs
        }
        others |= {
            blob.digest
            for name in self.standing.get(there.node, {})
            if name != model and name in self.wishes
            for blob in self.wishes[name].blobs
        }
        gone = {digest: size for digest, size in mine.items() if digest in there.blobs - others}
        return msgspec.structs.replace(
            there,
            blobs=there.blobs - gone.keys(),
            named=there.named - {model},
            loaded={name: one for name, one in there.loaded.items() if name != model},
            disk_free_bytes=there.disk_free_bytes + sum(gone.values()),
        )

    def settle(self, rounds: int = 60) -> Plan:
        """Plan and move until nothing is left to do."""
        for _ in range(rounds):
            plan = self.plan()
            self.adopt(plan)
            busy = any(
                there.arriving and there.presence in ("here", "wavering", "leaving")
                for there in self.sites.values()
            )
            if not plan.moves and not busy and self.plan().assignments == plan.assignments:
                return plan
            for move in plan.moves:
                self.run(move)
            self.land()
        raise AssertionError(f"it never settles: {plan.moves}")


@st.composite
def worlds(draw: st.DrawFn) -> World:
    wanted = {model: draw(wishes(model)) for model in draw(st.lists(st.sampled_from(MODELS), unique=True))}
    nodes = {
        node: draw(sites(node, wanted))
        for node in draw(st.lists(st.sampled_from(NODES), unique=True, min_size=1))
    }
    return World(nodes, wanted)
