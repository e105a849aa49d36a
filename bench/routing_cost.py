"""`python -m bench.routing_cost`: what the choice of a node costs a request, printed.

The router itself over a state of 1,000 replicas, and one of 4; nothing is sent. A prompt of 31 KB whose
beginning is known, and one that nobody has read; a choice after the records of one node, or of many, changed,
and what it takes to follow a change, which a node does when it learns of it. Beside them, in turn with them
and timed alike, a loop that takes 100 us of an idle machine: its p99 is what the limit is worth on a machine
on which other work runs.
"""

from __future__ import annotations

import gc
import random
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeAlias

import msgspec
from rich.console import Console
from rich.table import Table

from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import NodeId, RequestId
from ollama_distributed.base.inference import ChatPrompt, InferenceRequest, Message
from ollama_distributed.cluster.load import Load, ModelLoad
from ollama_distributed.routing.blocks import chain_of
from ollama_distributed.routing.service import Router
from ollama_distributed.state import keys
from ollama_distributed.state.cluster import ClusterState, apply
from ollama_distributed.state.codec import encode
from ollama_distributed.state.records import Advert, HeldModel, Holdings, LoadedPlace, Member, Placed

MODEL = "registry.ollama.ai/library/m:latest"
ROUNDS = 2000
PROMPT_BYTES = 31 * 1024
P99_GOAL_US = 100.0
MANY = 100
"""Changes between two choices: 1,000 nodes that change once in a second, and ten requests in it."""

Works: TypeAlias = dict[str, tuple[Callable[[], object], Callable[[], object]]]
"""What is timed, by name, and what comes before it."""

console = Console(width=100)


class Nodes:
    """A gateway that holds no model, and so many nodes that do and say so."""

    me = NodeId("gateway")

    def __init__(self, count: int) -> None:
        state = ClusterState()
        chance = random.Random(1)
        self._loads: dict[NodeId, Load] = {}
        for number in range(count):
            node = NodeId(f"n{number}")
            advert = Advert(
                node=node, name=node, role="node", version="1", boot="b", started_at=0.0, hop=("h:1",)
            )
            model = HeldModel(name=MODEL, display="m", digest="d", size_bytes=1, modified_at=1.0)
            for key, record in (
                (keys.advert(node), advert),
                (keys.holdings(node), Holdings(node=node, models=(model,))),
                (keys.member(node), Member(node=node, status="online", since=0.0)),
            ):
                state = apply(state, key, encode(record), state.revision + 1)
            one = ModelLoad(name=MODEL, slots=4, busy=chance.randrange(4), read_tokens_per_s=250.0, life=1)
            self._loads[node] = Load(boot="b", models=(one,))
        self._state = state
        self._count = count
        self._changes = 0

    def state(self) -> ClusterState:
        return self._state

    def interest(self, nodes: Iterable[NodeId]) -> None: ...

    def report(self, node: NodeId) -> Load | None:
        load = self._loads.get(node)  # a new one each time, with its age, as `LoadReports` has it
        return msgspec.structs.replace(load, age_s=0.5) if load is not None else None

    def change(self) -> None:
        """A node loads the model, or lets it go."""
        self._changes += 1
        node = NodeId(f"n{self._changes * 7 % self._count}")
        loaded = (LoadedPlace(model=MODEL),) if self._changes % 3 else ()
        record = encode(Placed(node=node, loaded=loaded))
        self._state = apply(self._state, keys.placed(node), record, self._state.revision + 1)

    def version(self, name: str) -> str:  # noqa: ARG002  # a shelf without models
        return ""


def request(text: str) -> InferenceRequest:
    messages = (Message(role="system", content=text), Message(role="user", content="and now?"))
    return InferenceRequest(
        request_id=RequestId("r"), identity=Identity("admin"), model="m", prompt=ChatPrompt(messages=messages)
    )


def prompt(number: int) -> str:
    return f"{number} " + "".join(random.Random(number).choices("abcdefgh ", k=PROMPT_BYTES))


def spin(times: int) -> int:
    total = 0
    for number in range(times):
        total += number
    return total


def limit() -> Callable[[], object]:
    """Work that takes `P99_GOAL_US` where nothing disturbs it."""
    times = 1000
    least = min(took(partial(spin, times)) for _ in range(500))
    return partial(spin, round(times * P99_GOAL_US / least))


def took(work: Callable[[], object]) -> float:
    """Microseconds of this thread's processor time: neighbours count less."""
    started = time.thread_time()
    work()
    return (time.thread_time() - started) * 1e6


def choices(count: int) -> Works:
    known, unknown = request(prompt(1)), request(prompt(2))
    nodes: Any = Nodes(count)
    router = Router(nodes, nodes, nodes, nodes, random.Random(1).randrange)
    chain = chain_of(known, MODEL, "d", router.chooser.salt)
    for number in range(3):
        router.chooser.caches.index(MODEL).read(NodeId(f"n{number}"), chain.keys)
    choose, directory = router.chooser.choose, router.chooser.directory

    def change(times: int) -> None:
        """So many nodes, followed as a node does it."""
        for _ in range(times):
            nodes.change()
            directory.follow()

    works: Works = {
        f"{count:,} replicas, prompt that is known": (partial(choose, known), nothing),
        f"{count:,} replicas, prompt that is new": (partial(choose, unknown), nothing),
        f"{count:,} replicas, a node changed": (partial(choose, unknown), partial(change, 1)),
        f"{count:,} replicas, to follow a change": (directory.follow, nodes.change),
    }
    if count > MANY:
        works[f"{count:,} replicas, {MANY} nodes changed"] = (partial(choose, unknown), partial(change, MANY))
    return works


def nothing() -> None: ...


def main() -> int:
    works: Works = {f"a loop of {P99_GOAL_US:.0f} us": (limit(), nothing)}
    known = request(prompt(1))
    works["keys of the prompt"] = (partial(chain_of, known, MODEL, "d", 1), nothing)
    for count in (4, 1000):
        works |= choices(count)
    gc.collect()
    gc.freeze()  # as a node does
    seen: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, (work, before) in works.items():
            before()
            seen[name].append(took(work))
    table = Table(title=f"a choice, {PROMPT_BYTES // 1024} KB prompt: us of processor time, keys included")
    for column in ("what", "least", "median", "p99", "of the loop's p99"):
        table.add_column(column)
    worst = percentile(next(iter(seen.values())), 0.99)
    for name, times in seen.items():
        p99 = percentile(times, 0.99)
        table.add_row(
            name, *(f"{us:.0f}" for us in (min(times), percentile(times, 0.5), p99)), f"{p99 / worst:.2f}"
        )
    console.print(table)
    return 0


def percentile(times: list[float], share: float) -> float:
    return sorted(times)[int(len(times) * share)]


if __name__ == "__main__":
    sys.exit(main())
