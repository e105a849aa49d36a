"""What routing needs of the node: what is here, who is there, the way to them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.inference import (
    EmbedRequest,
    EmbedResult,
    Generation,
    InferenceRequest,
    RerankRequest,
    RerankResult,
)
from ollama_distributed.base.tokens import Resume, SourceSink, Written
from ollama_distributed.cluster.load import Load as LoadReport
from ollama_distributed.cluster.load import ModelLoad
from ollama_distributed.state.cluster import ClusterState


class Local(Protocol):
    """This node's own serving (`serving.service.Serving`)."""

    def start(
        self, request: InferenceRequest, sink: SourceSink, resume: Resume | None = None
    ) -> Generation: ...

    def work(self, key: str) -> ModelLoad | None:
        """What the model of this canonical name has to do here; None: it is not loaded."""
        ...

    async def embed(self, request: EmbedRequest) -> EmbedResult: ...

    async def rerank(self, request: RerankRequest) -> RerankResult: ...

    async def count_tokens(self, request: InferenceRequest) -> int: ...


class Shelf(Protocol):
    """The models on this node's disk (`catalog.service.Catalog`)."""

    def version(self, name: str) -> str:
        """The digest of the model's manifest, from memory, without a look at the disk; empty: it is
        not here."""
        ...


class Peers(Protocol):
    """The way to other nodes (`adapters.peers.pool.PeerPool`). A node that cannot be reached,
    or is lost before the end, is `Unavailable`."""

    def start(
        self,
        node: NodeId,
        request: InferenceRequest,
        sink: SourceSink,
        resume: Resume | None = None,
    ) -> Generation: ...

    async def written(self, node: NodeId, request: InferenceRequest) -> Written | None:
        """As in `streams.ports.Source`, of one node."""
        ...

    async def hand_over(self, node: NodeId, request: InferenceRequest, written: Written) -> None:
        """What was said of an answer, for who takes it up later."""
        ...

    async def embed(self, node: NodeId, request: EmbedRequest) -> EmbedResult: ...

    async def rerank(self, node: NodeId, request: RerankRequest) -> RerankResult: ...

    async def count_tokens(self, node: NodeId, request: InferenceRequest) -> int: ...


class ClusterView(Protocol):
    """What this node knows of the cluster now; the last that it knew while consensus is away."""

    @property
    def me(self) -> NodeId: ...

    def state(self) -> ClusterState:
        """`cluster.mirror.Mirror.state`."""
        ...

    def interest(self, nodes: Iterable[NodeId]) -> None:
        """These may get work soon: keep their load reports coming (`LoadReports.interest`)."""
        ...

    def report(self, node: NodeId) -> LoadReport | None:
        """What the node said last of its work (`LoadReports.report`); None: nothing yet."""
        ...
