"""A key that floods three gateways leaves another one its turn, in virtual time: what that waits for is a
slot that becomes free, as it is where as many slots work and nobody floods. Turns and calls are counted."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
from tests.failing_replicas import Heard, Replicas, Wire
from tests.turn_queues import TurnQueue

from ollama_distributed.admission.bounds import Bounds
from ollama_distributed.base.errors import QueueFull
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import KeyId, NodeId, RequestId
from ollama_distributed.base.inference import Failed, Finished, InferenceRequest, Sampling
from ollama_distributed.base.tokens import Resume, SourceSink
from ollama_distributed.serving.cluster import load_of
from ollama_distributed.testing.echo import EchoSettings
from ollama_distributed.testing.virtual_time import VirtualClock, VirtualLoop

NODES = "abc"
SLOTS = 4
TOKENS_PER_S = 10.0
TOKENS = 4
CAPACITY = len(NODES) * SLOTS * TOKENS_PER_S / (TOKENS + 1)
"""Answers a second: a slot is free one step after the last token."""
TIMES = 5
FLOOD_S = 12.0
SELDOM_PER_S = 3.0


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, object]]:
    return "asyncio", {"loop_factory": VirtualLoop}


pytestmark = pytest.mark.anyio


class World(Replicas):
    """Three nodes that are gateways and replicas alike."""

    def __init__(self) -> None:
        clock = VirtualClock()
        self.queues = {name: TurnQueue(clock, "seldom", Bounds(total=2 * SLOTS)) for name in NODES}
        settings = EchoSettings(answer=" word" * TOKENS, tokens_per_s=TOKENS_PER_S, spread=0.2)
        super().__init__(len(NODES), settings, clock, seed=5, slots=SLOTS, queues=self.queues)
        self.calls = 0
        """Of nodes by others."""
        self.flood: list[Heard] = []
        self.first_s: list[float] = []
        """Until the other key's first words."""
        self._numbers = iter(range(10**9))

    def start(
        self, node: NodeId, request: InferenceRequest, sink: SourceSink, resume: Resume | None = None
    ) -> Wire:
        self.calls += 1
        return super().start(node, request, sink, resume)

    def open(self, key: str, on_word: Callable[[Heard], None] = lambda _: None) -> Heard:
        """At the nodes in turn."""
        number = next(self._numbers)
        return self.ask(
            NODES[number % len(NODES)],
            on_word,
            request_id=RequestId(f"r{number}"),
            identity=Identity("user", KeyId(key), "team"),
            sampling=Sampling(num_predict=TOKENS),
        )

    async def load(self) -> None:
        for name in NODES:
            await self[name].serving.preload("m")

    async def report(self) -> None:
        """As each node says once a second."""
        while True:
            for name in NODES:
                self.loads[self[name].id] = load_of(
                    self[name].serving.loaded(), boot=name, queued=0, memory_free_bytes=0, draining=False
                )
            await asyncio.sleep(1.0)

    async def seldom(self) -> None:
        """Now and then, for ever."""
        loop, chance = asyncio.get_running_loop(), random.Random(2)
        while True:
            await asyncio.sleep(chance.expovariate(SELDOM_PER_S))
            began = loop.time()

            def spoke(one: Heard, began: float = began) -> None:
                if one.pieces == 1:
                    self.first_s.append(loop.time() - began)

            self.open("seldom", spoke)

    async def flooded(self) -> None:
        """`TIMES` what they can answer."""
        loop, chance = asyncio.get_running_loop(), random.Random(3)
        end = loop.time() + FLOOD_S
        while loop.time() < end:
            await asyncio.sleep(chance.expovariate(CAPACITY * TIMES))
            self.flood.append(self.open("flood"))

    async def busy(self) -> None:
        """As many at once as there are slots, and half as many more."""

        async def again() -> None:
            while loop.time() < end:
                self.flood.append(heard := self.open("flood"))
                await heard.end()

        loop = asyncio.get_running_loop()
        end = loop.time() + FLOOD_S
        await asyncio.gather(*(again() for _ in range(len(NODES) * SLOTS * 3 // 2)))

    async def run(self, work: Callable[[], Awaitable[None]]) -> World:
        await self.load()
        beside = [asyncio.create_task(one()) for one in (self.report, self.seldom)]
        await work()
        for task in beside:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        for heard in self.flood:
            await heard.end()
        await self.close()
        return self

    @property
    def passed(self) -> list[int]:
        return [count for queue in self.queues.values() for count in queue.passed]


def p99(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)]


async def test_another_key_waits_for_a_slot_and_not_for_the_flood() -> None:
    flooded = World()
    await flooded.run(flooded.flooded)
    calm = World()
    await calm.run(calm.busy)

    ends = [heard.events[-1] for heard in flooded.flood]
    answered = [end for end in ends if isinstance(end, Finished)]
    assert all(isinstance(end.error, QueueFull) for end in ends if isinstance(end, Failed))
    assert len(answered) >= 0.8 * CAPACITY * FLOOD_S, "the slots were never idle"
    assert len(flooded.passed) > 2 * FLOOD_S, "it had to wait"
    assert max(flooded.passed) <= 1, "it has the next turn, also of several at once"
    assert len(flooded.first_s) >= 0.9 * SELDOM_PER_S * FLOOD_S, "it is never refused"
    assert p99(flooded.first_s) <= 1.2 * p99(calm.first_s)
    # Without `routing.refusals` each refusal asks all three: nine calls for an answer.
    assert flooded.calls <= 4 * len(answered), flooded.calls
