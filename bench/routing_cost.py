"""`python -m bench.routing_cost`: what the choice of a node costs a request, printed.

The router itself over a state of 1,000 replicas, and one of 4; nothing is sent. A prompt of 31 KB whose
beginning is known, and one that nobody has read.
"""

from __future__ import annotations

import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

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
from ollama_distributed.state.records import Advert, HeldModel, Holdings, Member

MODEL = "registry.ollama.ai/library/m:latest"
ROUNDS = 3000
PROMPT_BYTES = 31 * 1024
P99_GOAL_US = 100.0
CHAIN_GOAL_US = 40.0

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
            self._loads[node] = Load(boot="b", models=(one,), age_s=0.5)
        self._state = state

    def state(self) -> ClusterState:
        return self._state

    def interest(self, nodes: Iterable[NodeId]) -> None: ...

    def report(self, node: NodeId) -> Load | None:
        return self._loads.get(node)

    def version(self, name: str) -> str:  # noqa: ARG002  # a shelf without models
        return ""


def request(text: str) -> InferenceRequest:
    messages = (Message(role="system", content=text), Message(role="user", content="and now?"))
    return InferenceRequest(
        request_id=RequestId("r"), identity=Identity("admin"), model="m", prompt=ChatPrompt(messages=messages)
    )


def prompt(number: int) -> str:
    return f"{number} " + "".join(random.Random(number).choices("abcdefgh ", k=PROMPT_BYTES))


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Median and 99th percentile, microseconds of this thread's processor time: neighbours count less."""
    took = []
    for _ in range(ROUNDS):
        started = time.thread_time()
        work()
        took.append((time.thread_time() - started) * 1e6)
    return statistics.median(took), sorted(took)[int(ROUNDS * 0.99)]


def main() -> int:
    table = Table(title=f"a choice, {PROMPT_BYTES // 1024} KB prompt")
    for column in ("what", "median us", "p99 us", "goal"):
        table.add_column(column)
    known, unknown = request(prompt(1)), request(prompt(2))
    median, p99 = timed(lambda: chain_of(known, MODEL, "d", 1))
    table.add_row("keys of the prompt", f"{median:.0f}", f"{p99:.0f}", f"median <= {CHAIN_GOAL_US:.0f}")
    for count in (4, 1000):
        nodes: Any = Nodes(count)
        router = Router(nodes, nodes, nodes, nodes, random.Random(1).randrange)
        index = router.chooser.caches.index(MODEL)
        chain = chain_of(known, MODEL, "d", router.chooser.salt)
        for number in range(3):
            index.read(NodeId(f"n{number}"), chain.keys)
        gc.collect()
        gc.freeze()  # as a node does
        for name, asked in (("prompt that is known", known), ("prompt that is new", unknown)):
            router.explain(asked)  # the standings are made once for each state
            median, p99 = timed(partial(router.chooser.choose, asked))
            goal = f"p99 <= {P99_GOAL_US:.0f}, keys included"
            table.add_row(f"{count} replicas, {name}", f"{median:.0f}", f"{p99:.0f}", goal)
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
