"""Files and batches of one node, asked at another: found by their ids, and said to be away."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.unit.batches.test_batch_service import CHAT, IDENTITY, Node, row

from ollama_distributed.base.batches import BatchAsk
from ollama_distributed.base.errors import NotFound, Unavailable
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import KeyId, NodeId
from ollama_distributed.batches.cluster import ClusterBatches
from ollama_distributed.batches.files import MOST_READ_BYTES


class Direct:
    """The way to the other node, without a network."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.away = False

    def __getattr__(self, name: str) -> Callable[..., Any]:
        files, batches = self.node.files, self.node.batches
        ways: dict[str, Callable[[Any], Any]] = {
            "file": files.get,
            "files": files.list,
            "read": files.read,
            "delete_file": files.delete,
            "create": batches.create,
            "batch": batches.get,
            "batches": batches.list,
            "cancel": batches.cancel,
        }

        async def ask(node: NodeId, asked: Any) -> Any:
            assert node == "n1"
            if self.away:
                raise Unavailable("no answer")
            found = ways[name](asked)
            return await found if hasattr(found, "__await__") else found

        return ask


async def chunks(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def test_a_batch_is_asked_for_at_another_node(tmp_path: Path) -> None:
    owner, other = Node(tmp_path / "one"), Node(tmp_path / "two", node="n2")
    for node in (owner, other):
        await node.files.start()
        await node.batches.start()
    way = Direct(owner)
    alive = {"n1": True}
    state = lambda: SimpleNamespace(  # noqa: E731
        nodes={
            NodeId("n1"): SimpleNamespace(id=NodeId("n1"), name="one", alive=alive["n1"]),
            NodeId("n2"): SimpleNamespace(id=NodeId("n2"), name="two", alive=True),
        }
    )
    here = ClusterBatches(NodeId("n1"), owner.files, owner.batches, way, state)  # type: ignore[arg-type]
    there = ClusterBatches(NodeId("n2"), other.files, other.batches, way, state)  # type: ignore[arg-type]
    data = b"\n".join(row(number) for number in range(3)) + b"\n" * (MOST_READ_BYTES // 2)
    file = await here.upload(IDENTITY, "in.jsonl", chunks(data))
    assert await there.file(IDENTITY, file.id) == file
    _, pieces = await there.content(IDENTITY, file.id)
    assert b"".join([piece async for piece in pieces]) == data
    batch = await there.create(IDENTITY, BatchAsk(input_file_id=file.id, endpoint=CHAT))
    assert batch.id in {one.id for one in (await there.batches(IDENTITY, limit=5)).data}
    assert (await there.files(IDENTITY, limit=5)).data == (file,)
    stranger = Identity("user", KeyId("k2"))
    for look in (there.batch(stranger, batch.id), there.file(stranger, file.id)):
        with pytest.raises(NotFound):
            await look
    with pytest.raises(NotFound):
        await there.batch(IDENTITY, "batch_n9_x")
    assert (await there.cancel(IDENTITY, batch.id)).status == "cancelling"
    way.away = True
    with pytest.raises(Unavailable, match="kept by node one, which is away"):
        await there.batch(IDENTITY, batch.id)
    assert (await there.batches(IDENTITY, limit=5)).away == ("one",)
    alive["n1"] = False
    assert (await there.files(IDENTITY, limit=5)).away == ("one",)


async def test_pages_go_over_all_nodes(tmp_path: Path) -> None:
    one, two = Node(tmp_path / "one"), Node(tmp_path / "two", node="n2")
    way = Direct(one)
    nodes = {NodeId(name): SimpleNamespace(id=NodeId(name), name=name, alive=True) for name in ("n1", "n2")}
    there = ClusterBatches(NodeId("n2"), two.files, two.batches, way, lambda: SimpleNamespace(nodes=nodes))  # type: ignore[arg-type,return-value]
    for node in (one, two):
        await node.files.start()
    for number in range(4):
        for node in (one, two):
            node.clock.wall = 1_700_000_000.0 + number
            await node.send(json.dumps({"n": number}).encode())
    seen: list[str] = []
    after = ""
    while True:
        page = await there.files(IDENTITY, limit=3, after=after)
        seen += [file.id for file in page.data]
        if not page.has_more:
            break
        after = page.last_id or ""
    assert len(seen) == len(set(seen)) == 8
