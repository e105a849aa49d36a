"""Routing by prefix beside the other policies, in virtual time: counted work only.

The echo engine remembers prompts as a real one does; serving, router and answers are the real ones.
`python -m bench.prefix` shows the same with real nodes and a real model.
"""

from __future__ import annotations

import random
from collections import Counter

import msgspec
import pytest
from tests.failing_replicas import Replicas

from ollama_distributed.base.inference import ChatPrompt, Finished, Message, Opened
from ollama_distributed.base.routing import Policy, RouteTimes
from ollama_distributed.routing.replay import recorded, replay, usable
from ollama_distributed.serving.cluster import load_of
from ollama_distributed.testing.echo import EchoSettings
from ollama_distributed.testing.virtual_time import VirtualClock, VirtualLoop

SYSTEMS = [
    f"{number}: " + "".join(random.Random(number).choice("abcdefgh ") for _ in range(6000))
    for number in range(8)
]
REQUESTS = 120


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, object]]:
    return "asyncio", {"loop_factory": VirtualLoop}


class Shared:
    """Four replicas that hold the model in memory, and requests that share eight system prompts."""

    def __init__(self, policy: Policy, *, remembers: int = 12) -> None:
        self.replicas = Replicas(
            4, EchoSettings(answer="yes", prompt_cache=remembers, tokens_per_s=1000), VirtualClock(), seed=3
        )
        self.router = self.replicas.routers["g"]
        self.router.use(policy)
        self.read = 0
        self.by_node: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()

    async def warm(self) -> None:
        for replica in self.replicas.all.values():
            if replica.held:
                await replica.serving.preload("m")
        self.report()

    def report(self) -> None:
        """As each node says once a second."""
        for name, replica in self.replicas.all.items():
            self.replicas.loads[replica.id] = load_of(
                replica.serving.loaded(), boot=name, queued=0, memory_free_bytes=0, draining=False
            )

    async def ask(self, number: int, system: str) -> None:
        messages = (Message(role="system", content=system), Message(role="user", content=f"case {number}?"))
        heard = self.replicas.ask(request_id=f"r{number}", prompt=ChatPrompt(messages=messages))
        last = await heard.end()
        assert isinstance(last, Finished), last
        usage = last.usage
        self.read += usage.prompt_tokens - usage.cached_tokens
        opened = next(event for event in heard.events if isinstance(event, Opened))
        self.by_node[opened.node] += 1
        self.reasons[opened.route] += 1
        self.router.decisions.ended(
            f"r{number}",
            "default",
            RouteTimes(
                node=opened.node,
                prefill_s=usage.prompt_s,
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.cached_tokens,
            ),
        )

    async def run(self) -> None:
        await self.warm()
        chance = random.Random(5)
        for number in range(REQUESTS):
            await self.ask(number, chance.choice(SYSTEMS))
            self.report()


async def test_a_prompt_goes_where_it_was_read_and_others_elsewhere() -> None:
    ours, turn, fewest = (Shared(policy) for policy in ("prefix", "round-robin", "least-connections"))  # type: ignore[arg-type]
    for one in (ours, turn, fewest):
        await one.run()
    assert ours.read <= 0.35 * turn.read, (ours.read, turn.read)
    assert ours.read <= 0.35 * fewest.read, (ours.read, fewest.read)
    assert ours.reasons["prefix"] == REQUESTS - len(SYSTEMS)
    assert len(ours.by_node) == 4, "eight prompts are spread over the replicas"
    assert turn.reasons == {"round-robin": REQUESTS}

    # What is recorded says of the other policies what they then did.
    kept = [msgspec.json.decode(msgspec.json.encode(one), type=type(one)) for one in
            ours.router.decisions.latest(REQUESTS, None).decisions]  # fmt: skip
    assert usable(kept)[0].request_id == "r0"
    assert recorded(usable(kept)).read_tokens == ours.read
    again = {policy: replay(usable(kept), policy) for policy in ("prefix", "round-robin")}  # type: ignore[arg-type]
    assert again["prefix"].read_tokens <= 0.35 * again["round-robin"].read_tokens
    assert abs(again["round-robin"].read_tokens - turn.read) < 0.25 * turn.read
    assert again["prefix"].requests == REQUESTS


async def test_a_model_that_was_loaded_anew_is_not_believed_to_hold_anything() -> None:
    shared = Shared("prefix")
    await shared.warm()
    await shared.ask(0, SYSTEMS[0])
    (home,) = shared.by_node
    replica = next(one for one in shared.replicas.all.values() if one.id.upper() == home)
    asked = shared.replicas.request(
        prompt=ChatPrompt(
            messages=(Message(role="system", content=SYSTEMS[0]), Message(role="user", content="x"))
        )
    )
    assert shared.router.explain(asked).reason == "prefix"
    await replica.serving.unload("m")
    shared.report()
    seen = shared.router.explain(asked)
    assert seen.candidates[0].cached_tokens == 0
    assert not next(one for one in seen.candidates if one.node == replica.id).loaded
    await replica.serving.preload("m")
    shared.report()
    assert all(one.cached_tokens == 0 for one in shared.router.explain(asked).candidates)


async def test_a_replica_whose_cache_is_full_gets_no_new_prompts() -> None:
    """Each remembers three: there is room for all eight prompts only if they are spread."""
    ours, turn = Shared("prefix", remembers=3), Shared("round-robin", remembers=3)
    for shared in (ours, turn):
        await shared.run()
    assert ours.read <= 0.35 * turn.read, (ours.read, turn.read)


async def test_a_burst_is_spread_though_no_report_has_come() -> None:
    """What this gateway sent itself counts before the replicas say so."""
    shared = Shared("prefix")
    await shared.warm()
    heard = [
        shared.replicas.ask(
            request_id=f"b{n}",
            prompt=ChatPrompt(messages=(Message(role="user", content=f"{n} {SYSTEMS[n % 8]}"),)),
        )
        for n in range(16)
    ]
    for one in heard:
        assert isinstance(await one.end(), Finished)
    nodes = Counter(next(e.node for e in one.events if isinstance(e, Opened)) for one in heard)
    assert max(nodes.values()) <= 6, nodes
