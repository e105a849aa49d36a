"""Two nodes in one process over real mutual TLS: a request to one is answered by the other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.hop_nodes import HopNode, cluster, text_request

from ollama_distributed.base.inference import Delta, Event, Failed, Finished, InferenceRequest

pytestmark = pytest.mark.integration


async def until(condition: Callable[[], object], what: str = "", within_s: float = 5.0) -> None:
    try:
        async with asyncio.timeout(within_s):
            while not condition():
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise AssertionError(f"never came: {what or condition}") from None


class Heard:
    def __init__(self, node: HopNode, request: InferenceRequest) -> None:
        self.events: list[Event] = []
        self.generation = node.answers.open(request, self.events.append)

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Delta))

    async def end(self) -> Event:
        await until(lambda: self.events and isinstance(self.events[-1], Finished | Failed), "the end")
        return self.events[-1]


async def test_a_model_of_another_node_answers(tmp_path: Path) -> None:
    async with cluster(tmp_path) as nodes:
        a = await nodes.add("a")
        await nodes.add("b", ("m",))
        heard = Heard(a, text_request("m", "hello there"))
        end = await heard.end()
        assert isinstance(end, Finished), end
        assert "hello there" in heard.text
