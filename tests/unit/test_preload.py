"""Models that are to be loaded at the start: from here, from others, from a registry; what fails."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from tests.answering import FixedMachine, Models
from tests.gateway_bench import gateway

from ollama_distributed.base.clock import SystemClock
from ollama_distributed.base.errors import (
    Forbidden,
    ModelNotFound,
    NoCapacity,
    OllamaDistributedError,
    Unavailable,
)
from ollama_distributed.base.ids import NodeId
from ollama_distributed.distribution.downloads import Transfer
from ollama_distributed.distribution.exchange import CopyAsk
from ollama_distributed.models.names import name_key
from ollama_distributed.node import preload as preloads
from ollama_distributed.node.preload import Preload
from ollama_distributed.serving.service import Serving
from ollama_distributed.serving.settings import ServingSettings
from ollama_distributed.state import keys
from ollama_distributed.state.cluster import ClusterState, apply
from ollama_distributed.state.codec import encode
from ollama_distributed.state.records import Advert, HeldModel, Holdings, Member
from ollama_distributed.testing.echo import EchoEngine, echo_model
from ollama_distributed.testing.inference import ScriptedInference


class World:
    def __init__(self) -> None:
        self.state = ClusterState()
        self.here: set[str] = set()
        self.loads: list[str] = []
        self.asks: list[CopyAsk] = []
        self.downloads: list[str] = []
        self.fails: dict[str, list[Exception]] = {}
        """By what is tried (`load x`, `copy x`, `pull x`): errors, one after the other."""

    def fail(self, what: str) -> None:
        if left := self.fails.get(what):
            raise left.pop(0)

    async def resolve(self, name: str) -> object:
        if name not in self.here:
            raise ModelNotFound(f"model '{name}' not found")
        return name

    async def load(self, name: str) -> None:
        self.fail(f"load {name}")
        self.loads.append(name)

    async def copy_here(self, ask: CopyAsk) -> Transfer:
        self.asks.append(ask)
        return self.begun(ask.name.removesuffix(":latest"), "copy")

    def start(self, name: str) -> Transfer:
        self.downloads.append(name)
        return self.begun(name, "pull")

    def begun(self, name: str, how: str) -> Transfer:
        try:
            self.fail(f"{how} {name}")
        except OllamaDistributedError as exc:
            self.over = Transfer(id="t", model=name, state="failed", error=exc.message, code=exc.code)
        else:
            self.here.add(name)
            self.over = Transfer(id="t", model=name, state="done")
        return self.over

    async def ended(self, _: str) -> Transfer:
        return self.over

    def holds(self, node: str, name: str, *, alive: bool = True) -> None:
        model = HeldModel(
            name=name_key(name), display=f"{name}:latest", digest="d", size_bytes=1, modified_at=1.0
        )
        advert = Advert(node=NodeId(node), name=node, role="node", version="1", boot="b", started_at=0.0)
        member = Member(node=NodeId(node), status="online" if alive else "offline", since=0.0)
        for key, record in (
            (keys.advert(node), advert),
            (keys.member(node), member),
            (keys.holdings(node), Holdings(node=NodeId(node), models=(model,))),
        ):
            self.state = apply(self.state, key, encode(record), self.state.revision + 1)

    def preload(self, *names: str) -> Preload:
        return Preload(
            names,
            resolve=self.resolve,
            load=self.load,
            copies=self,
            downloads=self,
            state=lambda: self.state,
            settled=lambda: True,
            clock=SystemClock(),
        )


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preloads, "AGAIN_S", (0.0, 0.0))


def states(preload: Preload) -> dict[str, str]:
    return {name: row.state for name, row in preload.rows().items()}


async def test_from_here_from_another_node_from_a_registry() -> None:
    world = World()
    world.here.add("mine")
    world.holds("b", "theirs")
    world.holds("c", "lost", alive=False)
    preload = world.preload("mine", "theirs", "far", "lost")
    assert set(states(preload).values()) == {"waiting"}
    await preload.run()
    assert world.loads == ["mine", "theirs", "far", "lost"]
    assert [(ask.name, ask.sources, ask.digest) for ask in world.asks] == [("theirs:latest", ("b",), "d")]
    assert world.downloads == ["far", "lost"]
    assert set(states(preload).values()) == {"loaded"}


async def test_what_may_work_later_is_tried_again_and_holds_nothing_up() -> None:
    world = World()
    world.fails = {
        "pull away": [Unavailable("the registry is away"), ModelNotFound("not yet")],
        "pull evil": [Forbidden("may not be asked")],
        "load big": [NoCapacity("no room")],
        "pull never": [Unavailable("away")] * 9,
    }
    world.here.add("big")
    preload = world.preload("away", "evil", "big", "never", "small")
    await preload.run()
    assert world.loads == ["small", "away"]
    assert states(preload) == {
        "away": "loaded", "evil": "failed", "big": "failed", "never": "failed", "small": "loaded"
    }  # fmt: skip
    assert preload.rows()["evil"].error == "may not be asked"
    assert world.downloads.count("evil") == 1
    assert world.downloads.count("never") == 3


async def test_a_defect_with_one_model_holds_up_no_other() -> None:
    world = World()
    world.here |= {"odd", "mine"}
    world.fails = {"load odd": [KeyError("a defect")]}
    preload = world.preload("odd", "mine")
    await preload.run()
    assert states(preload) == {"odd": "failed", "mine": "loaded"}
    assert "the node's log" in preload.rows()["odd"].error


async def test_probes_show_how_far_it_is() -> None:
    world = World()
    world.here.add("mine")
    world.fails = {"pull evil": [Forbidden("may not be asked")]}
    async with world.preload("mine", "evil") as preload:
        app = gateway(ScriptedInference([]), preloaded=preload.rows)
        before = await asked(app, "/readyz")
        assert before == {"status": "ready", "preload": {"loaded": 0, "coming": 2, "failed": 0}}
        await preload.run()
        after = await asked(app, "/readyz")
        assert after["preload"] == {"loaded": 1, "coming": 0, "failed": 1}
        health = await asked(app, "/api/v1/health")
        assert health["preload"]["evil"] == {"state": "failed", "error": "may not be asked"}
        await app.close()
    assert "preload" not in await asked(gateway(ScriptedInference([])), "/readyz")


async def asked(app: Any, path: str) -> dict[str, Any]:
    transport = httpx.ASGITransport(app, client=("127.0.0.1", 4711))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        answer: dict[str, Any] = (await client.get(path)).json()
    return answer


async def test_a_preloaded_model_stays_and_takes_nobodys_place() -> None:
    settings = ServingSettings(max_loaded_models=1)
    models = Models(echo_model("m"), echo_model("n"))
    serving = Serving(
        models, [EchoEngine()], FixedMachine(), SystemClock(), settings, estimate=lambda *_, **__: 1 << 20
    )
    try:
        for _ in range(2):
            await serving.preload("m")
        (row,) = serving.loaded()
        assert (row.name, row.expires_at) == ("m", None)
        with pytest.raises(NoCapacity, match="no room beside"):
            await serving.preload("n")
        assert [row.name for row in serving.loaded()] == ["m"]
    finally:
        await serving.close(drain_s=0)
