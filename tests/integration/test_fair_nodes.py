"""A key that floods one node's gateway, and the replicas behind it, does not hold up another key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.hop_nodes import HopNode, cluster, text_request, until
from tests.turn_queues import TurnQueue

from ollama_distributed.base.clock import SystemClock
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import KeyId, RequestId
from ollama_distributed.base.inference import Event, Failed, Finished, InferenceRequest, Sampling
from ollama_distributed.serving.options import Rules
from ollama_distributed.serving.settings import ServingSettings

pytestmark = pytest.mark.integration

SLOTS = 2
FLOOD = 20
"""Requests through each gateway that is flooded."""
SLOW, FAST = 1.0, 1000.0
"""Tokens a second: while the flood comes, and once all wait."""


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": True}


def request(key: str, number: int) -> InferenceRequest:
    return msgspec.structs.replace(
        text_request("m", "one two three four five six"),
        request_id=RequestId(f"{key}{number}"),
        identity=Identity("user", KeyId(key), "team"),
        sampling=Sampling(num_predict=3),
    )


@pytest.mark.parametrize("asked", ["a", "c"])
async def test_another_key_has_the_next_turn_wherever_it_asks(tmp_path: Path, asked: str) -> None:
    ended: list[Event] = []

    def ask(node: HopNode, key: str, number: int = 0) -> None:
        def hear(event: Event) -> None:
            if isinstance(event, Finished | Failed):
                ended.append(event)

        node.answers.open(request(key, number), hear)

    async with cluster(tmp_path) as nodes:
        settings = ServingSettings(rules=Rules(slots=SLOTS))
        queues = [TurnQueue(SystemClock(), "seldom") for _ in range(2)]
        a = await nodes.add("a")
        b, c = [
            await nodes.add(name, ("m",), echo={"tokens_per_s": SLOW}, settings=settings, queue=queue)
            for name, queue in zip("bc", queues, strict=True)
        ]
        for number in range(FLOOD):
            ask(a, "flood", number)
            ask(b, "flood", FLOOD + number)
        await until(lambda: all(queue.waiting > SLOTS for queue in queues), "the flood waits at both")
        ask({"a": a, "c": c}[asked], "seldom")
        await until(lambda: any(queue.watched_waiting for queue in queues), "the other key waits")
        for replica in (b, c):
            replica.engine.speaks(FAST)
        await until(lambda: len(ended) == 2 * FLOOD + 1, "everybody is answered")
    assert all(isinstance(one, Finished) for one in ended)
    (passed,) = [passed for queue in queues for passed in queue.passed]
    assert passed <= 1, f"{passed} of the flood, which came before, had their turn before it"
