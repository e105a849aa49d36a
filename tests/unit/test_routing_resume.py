"""Who goes on with an answer whose node was lost: of equals the one that has read the prompt."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import pytest

from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import NodeId, RequestId
from ollama_distributed.base.inference import InferenceRequest, TextPrompt
from ollama_distributed.base.tokens import Left, Resume
from ollama_distributed.cluster.load import Load, ModelLoad
from ollama_distributed.routing.blocks import chain_of
from ollama_distributed.routing.service import Router
from ollama_distributed.state import keys
from ollama_distributed.state.cluster import ClusterState, apply
from ollama_distributed.state.codec import encode
from ollama_distributed.state.records import Advert, HeldModel, Holdings, Member

MODEL = "registry.ollama.ai/library/m:latest"
NODES = tuple(NodeId(f"n{number}") for number in range(4))
LOST = NODES[0]


class Cluster:
    """Four nodes that hold the model and have nothing to do; seen from a gateway that does not."""

    me = NodeId("gateway")

    def __init__(self) -> None:
        state = ClusterState()
        for node in NODES:
            advert = Advert(
                node=node, name=node, role="node", version="1", boot="b", started_at=0.0, hop=("h:1",)
            )
            model = HeldModel(name=MODEL, display="m", digest="d", size_bytes=1, modified_at=1.0)
            for key, record in (
                (keys.advert(node), advert),
                (keys.holdings(node), Holdings(node=node, models=(model,))),
                (keys.member(node), Member(node=node, status="online", since=0.0)),
            ):
                state = apply(state, key, encode(record), state.revision + 1)
        self._state = state
        self.asked: list[NodeId] = []

    def state(self) -> ClusterState:
        return self._state

    def interest(self, nodes: Iterable[NodeId]) -> None: ...

    def report(self, node: NodeId) -> Load | None:
        one = ModelLoad(name=MODEL, slots=4, read_tokens_per_s=250.0, life=1)
        return Load(boot="b", models=(one,), age_s=0.5)

    def version(self, name: str) -> str:
        return ""

    def start(self, node: NodeId, *_: Any) -> Any:
        self.asked.append(node)
        return self

    def cancel(self) -> None: ...


@pytest.mark.parametrize("seed", range(8))
def test_the_one_that_has_read_the_prompt_goes_on(seed: int) -> None:
    cluster: Any = Cluster()
    router = Router(cluster, cluster, cluster, cluster, random.Random(seed).randrange)
    request = InferenceRequest(
        request_id=RequestId("r"),
        identity=Identity("admin"),
        model="m",
        prompt=TextPrompt(text="a prompt " * 2000, raw=True),
    )
    chain = chain_of(request, MODEL, "d", router.chooser.salt)
    index = router.chooser.caches.index(MODEL)
    router.chooser.known(request, router.chooser.holders("m"))  # their lives are known
    for node in (LOST, NODES[3]):
        index.read(node, chain.keys)
    resume = Resume(ids=(1, 2), model_digest="d", left=(Left(replica=LOST, stalled=False),))
    router.start(request, lambda _: None, resume)
    assert cluster.asked == [NODES[3]]
    assert router.elsewhere(request, resume)
