"""What this node says of itself: its advert and the models on its disk. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from msgspec import UNSET

from ollama_distributed._version import __version__
from ollama_distributed.base.ids import NodeId, NodeRole
from ollama_distributed.catalog.cluster import held_model
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.serving.ports import EngineInfo
from ollama_distributed.state.records import Advert, EngineSummary, Hardware, Holdings, Rest

MAX_MODELS = 1000
"""Told to others: some 300 KB, under what a value may have. The newest ones."""


def advert(
    *,
    node: NodeId,
    name: str,
    role: NodeRole,
    boot: str,
    started_at: float,
    hop: Sequence[str],
    nats: Sequence[str],
    routes: Sequence[str],
    api: Sequence[str],
    hardware: Hardware,
    engines: Iterable[EngineInfo],
    labels: Mapping[str, str],
    rest: Rest | None = None,
) -> Advert:
    return Advert(
        node=node,
        name=name,
        role=role,
        version=__version__,
        boot=boot,
        started_at=started_at,
        hop=tuple(hop),
        nats=tuple(nats),
        routes=tuple(routes),
        api=tuple(api),
        hardware=hardware,
        engines=tuple(map(_summary, engines)),
        labels=dict(labels),
        rest=UNSET if rest is None else rest,
    )


def holdings(node: NodeId, specs: Iterable[ModelSpec]) -> Holdings:
    """Sorted by name, so that the same models are the same bytes."""
    newest = sorted(specs, key=lambda spec: (-spec.modified_at, spec.name))[:MAX_MODELS]
    return Holdings(node=node, models=tuple(sorted(map(held_model, newest), key=lambda model: model.name)))


def _summary(info: EngineInfo) -> EngineSummary:
    return EngineSummary(
        name=info.name,
        variant=info.variant,
        version=info.version,
        instruction_set=info.instruction_set,
        devices=info.devices,
    )
