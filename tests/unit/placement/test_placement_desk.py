"""What people ask of models' places, over the routes and the SDK's calls."""

from __future__ import annotations

from typing import Any

import httpx
import msgspec
import pytest
from tests.gateway_bench import WALL, gateway

from ollama_distributed.access.keys import make_key
from ollama_distributed.access.service import Authenticator
from ollama_distributed.base.errors import Forbidden, ModelNotFound, OllamaDistributedError, Unavailable
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cli.places_view import fit_text
from ollama_distributed.cli.tables import Look
from ollama_distributed.client import places_calls as calls
from ollama_distributed.client.calls import Call
from ollama_distributed.cluster.load import Load, ModelLoad
from ollama_distributed.models.held import held_model, spec_of
from ollama_distributed.models.names import name_key
from ollama_distributed.models.spec import Architecture, ModelSpec
from ollama_distributed.placement.desk import Desk
from ollama_distributed.placement.wishes import Policy
from ollama_distributed.state import keys
from ollama_distributed.state.changes import Change, Proposal, plan_change
from ollama_distributed.state.cluster import ClusterState, apply
from ollama_distributed.state.codec import encode
from ollama_distributed.state.records import Advert, Gpu, Hardware, Holdings, Member
from ollama_distributed.testing.inference import ScriptedInference

GIB = 1 << 30
PLAIN, RECORD = make_key("admin", now=0.0)
MODEL = name_key("big")
SPEC = ModelSpec(
    name=MODEL,
    display="big:latest",
    digest="00",
    size_bytes=5 * GIB,
    weights_bytes=5 * GIB,
    modified_at=1.0,
    architecture=Architecture(
        name="llama",
        layers=32,
        context_tokens=8192,
        embedding_length=4096,
        heads=32,
        kv_heads=8,
        key_length=128,
        value_length=128,
        parameters=8_000_000_000,
        file_type="Q4_K_M",
        vocabulary=128_256,
    ),
)


class Site:
    """Three nodes; `a` has the model, `b` a GPU and another model in it, `c` little memory."""

    def __init__(self) -> None:
        self.state = ClusterState()
        self.by: list[str] = []
        self.registry: dict[str, OllamaDistributedError] = {}
        """What it refuses by name."""
        for node, memory, gpus in (("a", 64, ()), ("b", 64, (24,)), ("c", 4, ())):
            hardware = Hardware(
                memory_bytes=memory * GIB,
                gpus=tuple(Gpu(name="H200", memory_bytes=size * GIB) for size in gpus),
            )
            self.put(
                keys.advert(node),
                Advert(
                    node=NodeId(node),
                    name=f"node-{node}",
                    role="server",
                    version="1",
                    boot="x",
                    started_at=0.0,
                    hardware=hardware,
                ),
            )
            self.put(keys.member(node), Member(node=NodeId(node), status="online", since=0.0))
        self.put(keys.holdings("a"), Holdings(node=NodeId("a"), models=(held_model(SPEC),)))
        self.loads = {
            "a": Load(memory_free_bytes=60 * GIB),
            "b": Load(
                memory_free_bytes=60 * GIB,
                models=(ModelLoad(name="other", vram_bytes=20 * GIB, memory_bytes=GIB),),
            ),
        }

    def put(self, key: str, record: msgspec.Struct) -> None:
        self.state = apply(self.state, key, encode(record), self.state.revision + 1)

    def time(self) -> float:
        return 10.0

    monotonic = time

    async def resolve(self, name: str) -> ModelSpec:
        held = self.state.models.get(name_key(name))
        if not held:
            raise ModelNotFound(f"model '{name}' not found")
        return spec_of(next(iter(held.values())))

    async def look(self, name: str) -> tuple[ModelSpec, int]:
        if name != "new":
            raise self.registry.get(name) or ModelNotFound("file does not exist")
        return msgspec.structs.replace(
            SPEC, name=f"registry.ollama.ai/library/{name}:latest", digest="x"
        ), 5000

    def interest(self, nodes: Any) -> None:
        self.asked = tuple(nodes)

    def report(self, node: str) -> Load | None:
        return self.loads.get(node)

    async def propose(self, change: Change, *, actor: str) -> None:
        self.by.append(actor)
        proposal = Proposal(id=f"p{self.state.revision}", change=change)
        for write in plan_change(self.state, proposal):
            self.state = apply(self.state, write.key, write.value, self.state.revision + 1)

    async def ask(self, call: Call[Any]) -> Any:
        desk = Desk(
            catalogue=self,
            state=lambda: self.state,
            reports=self,
            propose=self.propose,
            clock=self,
            policy=lambda: Policy(copies=0),
            outside=self,
        )
        keeper = Authenticator([RECORD], require_key=False, wall=lambda: WALL)
        app = gateway(ScriptedInference([]), places=desk, authenticator=keeper)
        transport = httpx.ASGITransport(app, client=("127.0.0.1", 4711))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            answer = await client.request(
                call.method, call.path, content=call.body, headers={"authorization": f"Bearer {PLAIN}"}
            )
        await app.close()
        if answer.status_code != 200:
            raise AssertionError(f"{answer.status_code} {answer.text}")
        return call.decode(answer.content)


async def test_fit_is_of_a_model_that_only_another_node_holds() -> None:
    answer = await Site().ask(calls.fit("big", slots=2))
    assert (answer.model, answer.context_tokens, answer.slots) == ("big:latest", 4096, 2)
    rows = {row.name: row for row in answer.nodes}
    assert [row.name for row in answer.nodes] == ["node-a", "node-b", "node-c"]
    assert rows["node-a"].holds
    assert (rows["node-a"].device, rows["node-a"].fetch_bytes) == ("cpu", 0)
    assert (rows["node-b"].device, rows["node-b"].fetch_bytes) == ("cpu", 5 * GIB)
    assert rows["node-c"].verdict == "no"
    assert rows["node-c"].reason.endswith("node has 4.0 GiB")


async def test_fit_of_a_model_that_is_in_its_registry_only() -> None:
    site = Site()
    answer = await site.ask(calls.fit("new"))
    assert (answer.registry, answer.bytes_read, answer.size_bytes) == ("registry.ollama.ai", 5000, 5 * GIB)
    rows = {row.name: row for row in answer.nodes}
    assert not any(row.holds for row in answer.nodes)
    assert rows["node-a"].fetch_bytes == 5 * GIB
    text = fit_text(answer, Look(colour=False, width=200))
    assert "looked at in registry.ollama.ai, 5 KB were read" in text
    assert "unknown" in text
    site.registry = {
        "far": Unavailable("evil.example cannot be reached"),
        "evil.example/a/b": Forbidden("the registry evil.example may not be asked"),
    }
    for name, says in (
        ("none", "404 .*no node has model 'none', and neither has registry.ollama.ai"),
        ("far", "503 .*no node has model 'far', and it cannot be looked at: evil.example cannot be reached"),
        ("evil.example/a/b", "403 .*may not be asked"),
    ):
        with pytest.raises(AssertionError, match=says):
            await site.ask(calls.fit(name))


async def test_orders_are_changes_of_the_state() -> None:
    site = Site()
    assert not (await site.ask(calls.places("big"))).wanted
    answer = await site.ask(calls.replicas("big", 2))
    assert (answer.wanted, answer.replicas, answer.nodes) == (True, 2, ("node-a",))
    answer = await site.ask(calls.replicas("big", least=1, most=3))
    assert (answer.replicas, answer.min, answer.max) == (None, 1, 3)
    assert (await site.ask(calls.pin("big", "node-b"))).pins == ("node-b",)
    answer = await site.ask(calls.place("big", labels={"zone": "x"}, preload=True, keep=False))
    assert (answer.labels, answer.preload, answer.keep, answer.pins) == (
        {"zone": "x"},
        True,
        False,
        ("node-b",),
    )
    assert (await site.ask(calls.unpin("big", "b"))).pins == ()
    assert not (await site.ask(calls.place("big", clear=True))).wanted
    assert not site.state.desired
    assert len(site.by) == 6


async def test_what_if_says_what_would_be_gone_and_what_would_move() -> None:
    site = Site()
    answer = await site.ask(calls.what_if(["node-a"]))
    assert (answer.lost, answer.last_copies, answer.planned) == (("node-a",), ("big:latest",), 0)
    site.put(keys.holdings("b"), Holdings(node=NodeId("b"), models=(held_model(SPEC),)))
    await site.ask(calls.replicas("big", 1))
    answer = await site.ask(calls.what_if(["a"]))
    assert [(row.gone, row.new, row.loads) for row in answer.moved] == [(("node-a",), ("node-b",), ())]
    assert (answer.last_copies, answer.no_longer, answer.planned) == ((), (), 1)


@pytest.mark.parametrize(
    ("call", "status"),
    [
        (calls.fit("nobody"), "404"),
        (calls.places("nobody"), "404"),
        (calls.pin("big", "nobody"), "404"),
        (calls.unpin("big", "b"), "404"),
        (calls.fit("big", context_tokens=0), "400"),
        (calls.replicas("big", -1), "400"),
        (calls.replicas("big", least=3, most=2), "400"),
        (calls.what_if([]), "400"),
        (calls.what_if(["nobody"]), "404"),
    ],
)
async def test_what_cannot_be_is_refused(call: Call[Any], status: str) -> None:
    with pytest.raises(AssertionError, match=f"^{status} "):
        await Site().ask(call)
