"""When keys were used last: told between nodes, kept over a restart, never believed from the future."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import KeyId, NodeId, RequestId
from ollama_distributed.base.inference import InferenceRequest, TextPrompt
from ollama_distributed.cluster.network import Message
from ollama_distributed.node.cluster import book
from ollama_distributed.node.cluster.book import KeyUses
from ollama_distributed.streams.kept import same

pytestmark = pytest.mark.anyio

K1, K2 = KeyId("aaaaaaa1"), KeyId("aaaaaaa2")


class Network:
    """Hears what is told to all."""

    def __init__(self) -> None:
        self.told: list[bytes] = []

    async def broadcast(self, kind: str, body: bytes) -> None:
        assert kind == "key-uses"
        self.told.append(body)


async def heard(uses: KeyUses, body: bytes) -> None:
    await uses.hear(Message(type="key-uses", sender=NodeId("n2"), body=body))


async def test_uses_are_told_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(book, "TELL_S", 0.0)
    own, network = {K1: 100.0}, Network()
    uses = KeyUses(tmp_path, lambda: own, lambda: 100.0)
    await uses.step(network)  # type: ignore[arg-type]  # of which one method is used
    await uses.step(network)  # type: ignore[arg-type]
    assert [msgspec.msgpack.decode(body) for body in network.told] == [{K1: 100.0}]
    own[K1] = 160.0
    await uses.step(network)  # type: ignore[arg-type]
    assert len(network.told) == 2
    assert KeyUses(tmp_path, dict, lambda: 200.0).last(K1) == 100.0, "kept a minute ago"


async def test_the_latest_use_counts_and_none_of_the_future(tmp_path: Path) -> None:
    uses = KeyUses(tmp_path, lambda: {K1: 50.0}, lambda: 100.0)
    assert uses.last(K2) is None
    await heard(uses, msgspec.msgpack.encode({K1: 90.0, K2: 99_999.0}))
    await heard(uses, msgspec.msgpack.encode({K1: 70.0}))
    await heard(uses, b"\xc1 nonsense")
    assert (uses.last(K1), uses.last(K2)) == (90.0, None)


def test_another_s_answer_is_not_taken_up() -> None:
    """Re-attach finds an answer by its request id only for who asked: team, person and key (S-07)."""
    asked = InferenceRequest(
        request_id=RequestId("r"),
        identity=Identity("user", K1, "red", "ann"),
        model="m",
        prompt=TextPrompt(text="x"),
    )
    for other in (
        Identity("user", K2, "red", "ann"),
        Identity("user", K1, "blue", "ann"),
        Identity("user", K1, "red", "bob"),
        Identity("admin", K1, "red", "ann"),
    ):
        assert not same(asked, msgspec.structs.replace(asked, identity=other))
    assert same(asked, msgspec.structs.replace(asked, identity=Identity("user", K1, "red", "ann")))
