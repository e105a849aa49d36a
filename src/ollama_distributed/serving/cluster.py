"""Models in memory, seen from the cluster: this node's own, and what other nodes report of theirs.

Others' rows come from their load reports, so they are a second or so old, and there are rows
only of nodes that this one listens to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from ollama_distributed.base.errors import ModelNotFound
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.load import Load, ModelLoad
from ollama_distributed.models.held import spec_of, spec_of_name
from ollama_distributed.models.names import name_key
from ollama_distributed.serving.loaded import LoadedModel
from ollama_distributed.serving.ports import EngineInfo
from ollama_distributed.state.cluster import ClusterState

MOST_LISTENED = 64
"""Nodes that a look at the loaded models makes this node listen to for a while: enough for a
rack, and no storm of reports in a cluster of thousands."""
USED_STEP_S = 10.0
STALE_S = 15.0
"""A report that is older is not shown."""


class Own(Protocol):
    """`serving.service.Serving`."""

    def loaded(self) -> list[LoadedModel]: ...

    async def unload(self, name: str) -> None: ...


class Reports(Protocol):
    """`cluster.load.LoadReports`."""

    def interest(self, nodes: Iterable[NodeId]) -> None: ...

    def report(self, node: NodeId) -> Load | None: ...


class ClusterResidents:
    """Implements `gateway.ports.Residents`. `state`: the latest, `Mirror.state`."""

    def __init__(self, own: Own, reports: Reports, me: NodeId, state: Callable[[], ClusterState]) -> None:
        self._own = own
        self._reports = reports
        self._me = me
        self._state = state

    def loaded(self) -> list[LoadedModel]:
        """This node's own first. Asking makes this node listen to the others for a minute."""
        state = self._state()
        living = [node.id for node in state.nodes.values() if node.id != self._me and node.alive]
        self._reports.interest(living[:MOST_LISTENED])
        rows = self._own.loaded()
        for node in living:
            report = self._reports.report(node)
            if report is not None and (report.age_s or 0.0) <= STALE_S:
                rows += [_row(state, node, one) for one in report.models]
        return rows

    async def unload(self, name: str) -> None:
        """Of this node's own. Nothing for a model that only other nodes hold."""
        try:
            await self._own.unload(name)
        except ModelNotFound:
            if not self._state().models.get(name_key(name)):
                raise


def load_of(
    loaded: Sequence[LoadedModel], *, boot: str, queued: int, memory_free_bytes: int, draining: bool
) -> Load:
    """What this node reports of its work."""
    return Load(
        boot=boot,
        slots=sum(one.slots for one in loaded),
        busy=sum(one.slots_busy for one in loaded),
        queued=queued,
        memory_free_bytes=memory_free_bytes,
        draining=draining,
        models=tuple(
            ModelLoad(
                name=name_key(one.spec.name),
                slots=one.slots,
                busy=one.slots_busy,
                queued=one.queued,
                # Two digits, and steps of ten seconds: what hardly changes must look unchanged.
                tokens_per_s=float(f"{one.tokens_per_s:.2g}"),
                read_tokens_per_s=float(f"{one.read_tokens_per_s:.2g}"),
                life=one.life,
                used_at=int(one.used_at / USED_STEP_S) * USED_STEP_S,
                memory_bytes=one.memory_bytes,
                vram_bytes=one.vram_bytes,
                context_tokens=one.context_tokens,
                # Whole seconds: an unchanged model must look unchanged.
                expires_at=None if one.expires_at is None else round(one.expires_at),
                engine=f"{one.engine.name}/{one.engine.variant}/{one.engine.version}",
            )
            for one in loaded
        ),
    )


def _row(state: ClusterState, node: NodeId, one: ModelLoad) -> LoadedModel:
    held = state.models.get(one.name)
    model = held.get(node) if held else None
    spec = spec_of(model) if model is not None else spec_of_name(one.name)
    name, _, rest = one.engine.partition("/")
    variant, _, version = rest.partition("/")
    return LoadedModel(
        name=spec.display,
        spec=spec,
        memory_bytes=one.memory_bytes,
        vram_bytes=one.vram_bytes,
        context_tokens=one.context_tokens,
        slots=one.slots,
        slots_busy=one.busy,
        expires_at=one.expires_at,
        engine=EngineInfo(name=name, variant=variant, version=version),
        node=state.nodes[node].name,
    )
