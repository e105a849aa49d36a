"""A voter whose server lost records is told of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from ollama_distributed.base.errors import Unavailable
from ollama_distributed.base.ids import NodeId
from ollama_distributed.node.cluster import alerts, replicas
from ollama_distributed.node.cluster.compared import Compared
from ollama_distributed.node.cluster.replicas import AGAIN_S, EVERY_S, FIRST_S, Comparison
from ollama_distributed.node.cluster.voters import heir
from ollama_distributed.state.cluster import ClusterState

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")


class Servers:
    """Looks find what they are told; the last one again and again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *looks: tuple[NodeId, ...] | Unavailable) -> None:
        self.looks = list(looks)
        self.slept: list[float] = []
        self.asked: list[str] = []

        async def damaged(_system: object, _formation: object, stream: str) -> tuple[NodeId, ...]:
            self.asked.append(stream)
            look = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
            if isinstance(look, Unavailable):
                raise look
            return look

        async def sleep(seconds: float) -> None:
            self.slept.append(seconds)
            await checkpoint()

        monkeypatch.setattr(replicas, "damaged", damaged)
        monkeypatch.setattr(anyio, "sleep", sleep)


def life(*voters: NodeId, me: NodeId = A) -> Any:
    formation = SimpleNamespace(nodes=voters) if voters else None
    bus = SimpleNamespace(formation=formation, system=lambda _urls: None)
    return SimpleNamespace(bus=bus, bus_urls=tuple, parts=SimpleNamespace(node=me), compared=Compared())


def lost(here: Any) -> tuple[NodeId, ...]:
    found: Compared = here.compared
    return found.lost(here.bus.formation if here.bus is not None else None)


pytestmark = pytest.mark.anyio


async def test_a_server_that_lost_records_twice_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    servers, here = Servers(monkeypatch, (B, C), (B,)), life(A, B, C)
    duty = Comparison(here)
    await duty.step()
    assert lost(here) == (B,)
    assert servers.asked == ["KV_cfg"] * 2
    servers.looks = [()]
    await duty.step()
    assert lost(here) == ()
    assert servers.slept == [FIRST_S, AGAIN_S, *[FIRST_S] * round(EVERY_S / FIRST_S)]


async def test_who_was_taken_out_and_in_again_is_not_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    servers, here = Servers(monkeypatch, (B,), (B,), ()), life(A, B, C)
    duty = Comparison(here)
    await duty.step()
    before = here.bus.formation
    here.bus.formation = None  # while one goes on alone
    assert lost(here) == ()
    here.bus.formation = SimpleNamespace(nodes=before.nodes, id="another")
    assert lost(here) == ()
    servers.slept.clear()
    await duty.step()
    assert servers.slept == [FIRST_S], "others are compared within a minute"
    assert here.compared.formation is here.bus.formation


async def test_servers_that_were_under_way_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    Servers(monkeypatch, (B,), ())
    here = life(A, B, C)
    await Comparison(here).step()
    assert lost(here) == ()


async def test_what_was_found_holds_until_it_can_be_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    servers, here = Servers(monkeypatch, (B,), (B,), Unavailable("nobody answers")), life(A, B, C)
    duty = Comparison(here)
    await duty.step()
    with pytest.raises(Unavailable):
        await duty.step()
    assert lost(here) == (B,)
    assert len(servers.slept) == 2 + EVERY_S / FIRST_S


NOWHERE = SimpleNamespace(bus=None, compared=Compared())


@pytest.mark.parametrize("here", [life(), life(A), life(B, C), NOWHERE])
async def test_only_voters_look_who_are_not_alone(monkeypatch: pytest.MonkeyPatch, here: Any) -> None:
    servers = Servers(monkeypatch, (B,))
    await Comparison(here).step()
    assert (servers.asked, lost(here)) == ([], ())


async def test_who_lost_records_is_not_left_alone_with_the_state() -> None:
    assert heir((A, B, C), A, B, ()) == B
    assert heir((A, B, C), A, None, ()) == B
    assert heir((A, B, C), A, B, (B,)) == C
    assert heir((A, B, C), A, A, (A, C)) == B
    assert heir((A, B), A, B, (B,)) == B


async def test_people_are_told_what_to_do() -> None:
    assert alerts.of_damage([], ClusterState()) == []
    (said,) = alerts.of_damage([NodeId("attic")], ClusterState())
    assert said.level == "error"
    assert "attic" in said.message
    assert "cluster leave" in said.message
