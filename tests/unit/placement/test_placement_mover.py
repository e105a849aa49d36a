"""What a node does of a plan, and what it says it has: the mover over fakes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import pytest

from ollama_distributed.base.clock import SystemClock
from ollama_distributed.base.errors import Conflict, LoadFailed, ModelNotFound, Unavailable
from ollama_distributed.base.ids import NodeId
from ollama_distributed.distribution.downloads import Transfer
from ollama_distributed.distribution.exchange import CopyAsk
from ollama_distributed.models.names import name_key
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.node.placing import MEMORY_STEP, NodeMover
from ollama_distributed.serving.loaded import LoadedModel
from ollama_distributed.serving.speeds import Speed
from ollama_distributed.state import keys
from ollama_distributed.state.cluster import ClusterState, apply
from ollama_distributed.state.codec import encode
from ollama_distributed.state.records import Desired, Gpu, Hardware, HeldModel, Holdings
from ollama_distributed.testing.echo import EchoEngine, echo_model

B = NodeId("b")
KEY = name_key("Org/Model:q4")


def spec(digest: str, weights: str = "/blobs/1", name: str = "Org/Model:q4") -> ModelSpec:
    return msgspec.structs.replace(
        echo_model("x"),
        name=f"registry.ollama.ai/{name}",
        display=name,
        digest=digest,
        weights=weights,
        remote=None,
    )


class Node:
    """All that a mover works on."""

    def __init__(self) -> None:
        self.here: dict[str, ModelSpec] = {}
        self.rows: list[LoadedModel] = []
        self.done: list[tuple[str, Any]] = []
        self.copy: Transfer = Transfer(id="b.1", model="", state="done")
        self.comes: ModelSpec | None = None
        self.state = ClusterState()
        self.budget_bytes, self.seats = 1000, 3
        held = HeldModel(name=KEY, display="Org/Model:q4", digest="d2", size_bytes=9, modified_at=2.0)
        self.write(keys.holdings(B), Holdings(node=B, models=(held,)))
        self.mover = NodeMover(
            models=self,
            runs=self,
            copies=self,
            drop=self.drop,
            room=self.room,
            state=lambda: self.state,
            hardware=lambda: Hardware(gpus=(Gpu(name="g", memory_bytes=50),)),
            speeds=lambda: [Speed("cpu", 100, 12.34)],
            has_gpu=True,
            clock=SystemClock(),
        )

    def write(self, key: str, record: msgspec.Struct) -> None:
        self.state = apply(self.state, key, encode(record), self.state.revision + 1)

    # ── the catalogue ──

    def knows(self, name: str) -> bool:
        return name_key(name) in self.here

    async def resolve(self, name: str) -> ModelSpec:
        if not self.knows(name):
            raise ModelNotFound("no")
        return self.here[name_key(name)]

    # ── copies ──

    async def copy_here(self, ask: CopyAsk) -> Transfer:
        self.done.append(("copy", ask))
        return self.copy

    async def ended(self, transfer_id: str) -> Transfer:
        if self.comes is not None:
            self.here[KEY] = self.comes
        return self.copy

    async def drop(self, model: str, digest: str) -> None:
        self.done.append(("drop", (model, digest)))

    async def room(self) -> int:
        return 77

    # ── what runs ──

    def loaded(self) -> list[LoadedModel]:
        return self.rows

    def keep_alive(self, of: Mapping[str, float]) -> None:
        self.done.append(("keep_alive", dict(of)))

    async def hold(self, name: str) -> None:
        if not self.knows(name):
            raise LoadFailed("it is not here")
        self.done.append(("hold", name))

    def release(self, name: str) -> None:
        self.done.append(("release", name))

    def retire(self, spec: ModelSpec) -> None:
        self.done.append(("retire", spec.digest))

    async def let_go(self, name: str) -> None:
        self.done.append(("let_go", name))

    def run(self, row: ModelSpec, *held: str, reserved: int = 5) -> None:
        self.rows.append(
            LoadedModel(
                name=row.display,
                spec=row,
                memory_bytes=1,
                vram_bytes=0,
                context_tokens=1,
                slots=1,
                slots_busy=0,
                expires_at=None,
                engine=EchoEngine().info,
                reserved_bytes=reserved,
                held=held,
            )
        )


async def test_a_copy_is_of_the_version_that_is_wanted_under_its_own_name() -> None:
    node = Node()
    node.comes = spec("d2")
    await node.mover.fetch(KEY, "d2", [B])
    ((_, ask),) = node.done
    assert (ask.name, ask.sources, ask.digest) == ("Org/Model:q4", (B,), "d2")
    await node.mover.fetch(KEY, "d2", [B])
    assert len(node.done) == 1, "it is here"


@pytest.mark.parametrize(("state", "comes"), [("failed", None), ("cancelled", None), ("done", spec("d1"))])
async def test_a_copy_that_did_not_come_is_said(state: Any, comes: ModelSpec | None) -> None:
    node = Node()
    node.comes = comes
    node.copy = msgspec.structs.replace(node.copy, state=state, error="the disk is full")
    with pytest.raises(Unavailable, match="the disk is full" if state == "failed" else "another version"):
        await node.mover.fetch(KEY, "d2", [B])


async def test_loads_and_unloads_are_kept_and_let_go() -> None:
    node = Node()
    with pytest.raises(LoadFailed):
        await node.mover.load(KEY, "cpu")
    node.here[KEY] = spec("d2")
    await node.mover.load(KEY, "gpu")
    await node.mover.unload(KEY)
    assert node.done == [("hold", KEY), ("let_go", KEY)]


async def test_what_goes_goes_by_promise_of_the_version_that_counts() -> None:
    node = Node()
    await node.mover.delete(KEY)
    assert node.done == [], "it is gone already"
    node.here[KEY] = spec("d1")
    await node.mover.delete(KEY)
    assert node.done == [("drop", (KEY, "d2"))]
    node.state = ClusterState()
    with pytest.raises(Conflict):
        await node.mover.delete(KEY)


async def test_the_inventory() -> None:
    node = Node()
    other = name_key("copy")
    node.here = {KEY: spec("d2"), other: spec("d2", name="library/copy:latest")}
    node.run(spec("d2"), other)
    node.write(keys.desired(KEY), Desired(model=KEY, keep_alive_s=60.0))
    found = await node.mover.inventory()
    assert (found.memory_bytes, found.gpu_bytes, found.seats, found.disk_free_bytes) == (1000, 50, 3, 77)
    assert [(one.model, one.memory_bytes, one.held) for one in found.loaded] == [
        (other, 0, True),
        (KEY, MEMORY_STEP, False),
    ], "two names, one runner"
    assert [(one.weights_bytes, one.tokens_per_s) for one in found.speeds] == [(100, 12.3)]
    assert node.done == [("keep_alive", {KEY: 60.0})]


async def test_what_runs_of_a_version_that_is_gone_does_not_count_and_goes() -> None:
    node = Node()
    node.here = {KEY: spec("d2", weights="/blobs/2")}
    node.run(spec("d1"), KEY)
    assert (await node.mover.inventory()).loaded == ()
    assert node.done[1:] == [("retire", "d1"), ("release", KEY)]
