"""What the sign-in page calls the OIDC provider, at a node that must ask a server for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests.gateway_bench import Clock

from ollama_distributed.base.errors import Unavailable
from ollama_distributed.node.people import ops
from ollama_distributed.node.people.service import NAME_AGAIN_S, NAME_HOLDS_S, PeopleService


class Hop:
    """A server, away until it has a name to tell."""

    def __init__(self) -> None:
        self.name = ""
        self.asked = 0

    async def ask(self, *_: Any, **__: Any) -> ops.Done:
        self.asked += 1
        if not self.name:
            raise Unavailable("away")
        return ops.Done(token=self.name)


def service(hop: Hop, clock: Clock) -> PeopleService:
    async def linked() -> Any:
        return SimpleNamespace(is_server=False), None

    nothing: Any = SimpleNamespace(people=None, oidc_name="", add=lambda *_: None)
    keeper: Any = SimpleNamespace(linked=linked, state=SimpleNamespace(servers=("one",), nodes={}))
    pool: Any = hop
    return PeopleService(nothing, nothing, nothing, keeper, pool=pool, door=nothing, clock=clock)


async def test_it_is_asked_for_rarely_and_missed_without_harm() -> None:
    hop, clock = Hop(), Clock()
    people = service(hop, clock)
    assert [await people.oidc_name() for _ in range(5)] == [""] * 5
    assert hop.asked == 1
    hop.name = "idp.example"
    clock.now += NAME_AGAIN_S
    assert [await people.oidc_name() for _ in range(5)] == ["idp.example"] * 5
    assert hop.asked == 2
    hop.name = ""
    clock.now += NAME_HOLDS_S
    assert await people.oidc_name() == "idp.example", "the last that was known"
    assert hop.asked == 3
