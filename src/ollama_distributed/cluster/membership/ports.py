"""What membership asks of the rest of the cluster room."""

from __future__ import annotations

from typing import Protocol

from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.ports import Fence
from ollama_distributed.state.cluster import ClusterState


class Leadership(Protocol):
    """`cluster.consensus.ConsensusEngine`."""

    def get_leader(self) -> NodeId | None: ...

    def fence(self) -> Fence | None:
        """What a leader's writes carry; None: this node does not lead."""
        ...


class View(Protocol):
    """`cluster.mirror.Mirror`."""

    @property
    def state(self) -> ClusterState: ...
