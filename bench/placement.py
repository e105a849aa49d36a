"""The planner's figures: a full plan of 10,000 nodes and 500 models, and a plan after one event.

CPU time of this process, so that a busy machine does not count. Prints each figure beside its
limit; `python -m bench.placement` ends with 1 when one does not hold.
"""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable
from functools import partial
from time import process_time

import msgspec

from ollama_distributed.base.ids import NodeId
from ollama_distributed.node.garbage import YOUNG
from ollama_distributed.placement.facts import Blob, Loaded, Need, Rules, Site, Wish
from ollama_distributed.placement.outcome import Plan
from ollama_distributed.placement.plan import Planner

NODES, MODELS = 10_000, 500
FULL_LIMIT_S = 10.0
EVENT_LIMIT_S = 0.1
GIB = 1 << 30
EVENTS = 40
BULK = 5


def wishes(chance: random.Random) -> dict[str, Wish]:
    """A few models that many want, many that few want: 26,900 replicas, two thirds of them loaded."""
    made = {}
    for number in range(MODELS):
        weights = chance.choice((1, 2, 4, 8, 16, 40)) * GIB
        copies = min(3_000, 2 + 4_000 // (number + 1))
        made[f"m{number:03}"] = Wish(
            model=f"m{number:03}",
            blobs=(Blob(f"w{number}", weights), Blob(f"t{number}", 2_000)),
            need=Need(
                memory_bytes=weights + 2 * GIB,
                gpu_bytes=weights + 2 * GIB,
                host_bytes=GIB,
            ),
            copies=copies,
            warm=copies * 2 // 3,
            labels={"disk": "fast"} if number % 7 == 0 else {},
            pins=(NodeId(f"n{number * 13:05}"),) if number % 11 == 0 else (),
        )
    return made


def sites(chance: random.Random, wanted: dict[str, Wish]) -> dict[NodeId, Site]:
    """Racks of 40 in 10 zones, of three kinds; each model is on a few nodes."""
    seeds: dict[int, list[Wish]] = {}
    for wish in wanted.values():
        for _ in range(3):
            seeds.setdefault(chance.randrange(NODES), []).append(wish)
    made = {}
    for number in range(NODES):
        node = NodeId(f"n{number:05}")
        memory, gpu = chance.choice(((32, 0), (64, 0), (256, 96)))
        made[node] = Site(
            node=node,
            labels={
                "zone": f"z{number // 1_000}",
                "rack": f"r{number // 40}",
                "disk": "fast" if number % 3 else "slow",
            },
            memory_bytes=memory * GIB,
            gpu_bytes=gpu * GIB,
            disk_free_bytes=500 * GIB,
            speed=chance.choice((0, 1, 2)),
            blobs=frozenset(b.digest for wish in seeds.get(number, ()) for b in wish.blobs),
        )
    return made


def done(made: dict[NodeId, Site], wanted: dict[str, Wish], plan: Plan) -> dict[NodeId, Site]:
    """The cluster once all moves of `plan`, and all that follow them, are made."""
    blobs: dict[NodeId, set[str]] = {}
    loaded: dict[NodeId, dict[str, Loaded]] = {}
    for model, replicas in plan.assignments.items():
        need = wanted[model].need
        for replica in replicas:
            blobs.setdefault(replica.node, set()).update(b.digest for b in wanted[model].blobs)
            if replica.warm:
                gpu, memory = need.of(replica.device)
                loaded.setdefault(replica.node, {})[model] = Loaded(replica.device, gpu or memory)
    return {
        node: msgspec.structs.replace(
            site, blobs=site.blobs | blobs.get(node, set()), loaded=loaded.get(node, {})
        )
        for node, site in made.items()
    }


def timed(work: Callable[[], Plan]) -> tuple[float, Plan]:
    began = process_time()
    plan = work()
    return process_time() - began, plan


def full(wanted: dict[str, Wish], made: dict[NodeId, Site], standing: Plan | None) -> tuple[Planner, Plan]:
    planner = Planner(Rules())
    for wish in wanted.values():
        planner.put_wish(wish)
    for site in made.values():
        planner.put_site(site)
    if standing is not None:
        planner.adopt(standing)
    return planner, planner.plan()


def events(
    planner: Planner, plan: Plan, wanted: dict[str, Wish], made: dict[NodeId, Site], chance: random.Random
) -> dict[str, list[float]]:
    """Seconds of each plan, by kind: the one that an event asks for, and the one that follows once
    that is adopted."""
    spent: dict[str, list[float]] = {}

    def step(kind: str, tell: Callable[[], None]) -> None:
        nonlocal plan

        def work() -> Plan:
            tell()
            return planner.plan()

        for title, planning in ((kind, work), (f"{kind}, adopted", planner.plan)):
            seconds, plan = timed(planning)
            spent.setdefault(title, []).append(seconds)
            planner.adopt(plan)

    def scale(wish: Wish, whose: str) -> None:
        more = msgspec.structs.replace(wish, copies=wish.copies + 5, warm=wish.warm + 2)
        step(f"scale {whose}up", partial(planner.put_wish, more))
        step(f"scale {whose}down", partial(planner.put_wish, wish))
        cold = msgspec.structs.replace(wish, warm=0)
        step(f"{whose}to zero", partial(planner.put_wish, cold))
        step(f"{whose}from zero", partial(planner.put_wish, wish))

    planner.plan()
    gc.collect()
    # As a node does once it is up (`node/garbage.py`): else the collector walks all of it again and again.
    gc.freeze()
    gc.set_threshold(YOUNG, 20, 50)
    busy = sorted({replica.node for replicas in plan.assignments.values() for replica in replicas})
    for _ in range(EVENTS):
        node = made[chance.choice(busy)]
        for kind, presence in (("away", "away"), ("lost", "lost"), ("back", "here"), ("drain", "leaving")):
            site = msgspec.structs.replace(node, presence=presence)
            step(kind, partial(planner.put_site, site))
        step("back", partial(planner.put_site, node))
        scale(wanted[chance.choice(sorted(wanted))], "")
    for _ in range(BULK):
        scale(largest(wanted), "the largest ")
    return spent


def orders(planner: Planner, wanted: dict[str, Wish]) -> dict[str, list[float]]:
    """Seconds until the largest model, of thousands of copies, is forgotten and until it is placed
    anew: as much as a tenth of the whole plan."""
    wish = largest(wanted)
    spent: dict[str, list[float]] = {}
    for _ in range(BULK):
        for kind, tell in (
            ("forgotten", partial(planner.drop_wish, wish.model)),
            ("ordered", partial(planner.put_wish, wish)),
        ):
            tell()
            seconds, plan = timed(planner.plan)
            spent.setdefault(f"{wish.copies} copies {kind}", []).append(seconds)
            planner.adopt(plan)
            planner.plan()
    return spent


def largest(wanted: dict[str, Wish]) -> Wish:
    return max(wanted.values(), key=lambda wish: wish.copies)


def main() -> int:
    chance = random.Random(4)
    wanted = wishes(chance)
    made = sites(chance, wanted)
    worst = [0.0, 0.0]

    def show(what: str, seconds: float, limit: float) -> None:
        at = limit == EVENT_LIMIT_S
        worst[at] = max(worst[at], seconds)
        print(f"{what:<76} {seconds * 1e3:9.1f} ms   limit {limit * 1e3:8.0f} ms")

    def told(title: str, spent: dict[str, list[float]], limit: float = EVENT_LIMIT_S) -> None:
        for kind, times in spent.items():
            middle = sorted(times)[len(times) // 2]
            show(f"{title}: {kind} (median {middle * 1e3:.1f} ms), worst", max(times), limit)

    began = process_time()
    planner, plan = full(wanted, made, None)
    show(f"full plan, nothing decided ({NODES} x {MODELS})", process_time() - began, FULL_LIMIT_S)
    replicas = sum(len(one) for one in plan.assignments.values())
    print(
        f"  {replicas} replicas, {len(plan.moves)} moves, {plan.waiting} wait, {len(plan.refusals)} refusals"
    )
    planner.adopt(plan)
    show("the next plan, all of it just decided", timed(planner.plan)[0], FULL_LIMIT_S)
    told("moves wait", events(planner, planner.plan(), wanted, made, chance))
    told("moves wait", orders(planner, wanted), FULL_LIMIT_S)

    made = done(made, wanted, plan)
    began = process_time()
    planner, settled = full(wanted, made, plan)
    show("full plan, all in place", process_time() - began, FULL_LIMIT_S)
    same = settled.assignments == plan.assignments
    print(f"  {len(settled.moves)} moves, {settled.waiting} wait; the same places: {same}")
    told("all in place", events(planner, settled, wanted, made, chance))
    told("all in place", orders(planner, wanted), FULL_LIMIT_S)
    return int(worst[0] > FULL_LIMIT_S or worst[1] > EVENT_LIMIT_S)


if __name__ == "__main__":
    sys.exit(main())
