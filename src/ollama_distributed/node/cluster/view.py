"""The cluster as routing asks for it (`routing.ports.ClusterView`), from the last known state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.load import Load, LoadReports
from ollama_distributed.state.cluster import ClusterState
from ollama_distributed.state.records import Rest


class View:
    """`state` and `loads` of now: they change hands when this node joins another cluster."""

    def __init__(
        self,
        me: NodeId,
        state: Callable[[], ClusterState],
        loads: Callable[[], LoadReports | None],
        rest: Callable[[], Rest | None] = lambda: None,
    ) -> None:
        """`rest`: of this node, which the state may show later."""
        self._me = me
        self.state = state
        self._loads = loads
        self._rest = rest

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
        own, rest = self.state().nodes.get(self._me), self._rest()
        if own is not None and own.draining:
            return True
        woken = own.intent.woken if own is not None and own.intent is not None else None
        return rest is not None and rest.since != woken
