"""The cluster as routing asks for it (`routing.ports.ClusterView`), from the last known state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.load import Load, LoadReports
from ollama_distributed.state.cluster import ClusterState


class View:
    """`state` and `loads` of now: they change hands when this node joins another cluster."""

    def __init__(
        self, me: NodeId, state: Callable[[], ClusterState], loads: Callable[[], LoadReports | None]
    ) -> None:
        self._me = me
        self.state = state
        self._loads = loads

    @property
    def me(self) -> NodeId:
        return self._me

    def interest(self, nodes: Iterable[NodeId]) -> None:
        loads = self._loads()
        if loads is not None:
            loads.interest(nodes)

    def report(self, node: NodeId) -> Load | None:
        loads = self._loads()
        return loads.report(node) if loads is not None else None

    def addresses(self, node: NodeId) -> Sequence[str]:
        """Where the node's cluster listener answers, best first."""
        known = self.state().nodes.get(node)
        return known.advert.hop if known and known.advert else ()

    def draining(self) -> bool:
        """This node is to get no new work from others."""
        own = self.state().nodes.get(self._me)
        return own is not None and own.draining
