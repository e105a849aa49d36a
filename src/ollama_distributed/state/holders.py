"""Who holds a model that is there, and who still holds one that was deleted. Pure.

A name has versions, each with the time it was made, and perhaps a deletion: a version that was
made later than the deletion is there, an older one is a leftover, wherever it lies. So no order
of events brings a deleted model back, and a node that was away finds out when it returns.
"""

from __future__ import annotations

from typing import TypeAlias

from ollama_distributed.base.ids import NodeId
from ollama_distributed.state.maps import SortedMap
from ollama_distributed.state.records import Deleted, HeldModel, Holdings

Holders: TypeAlias = SortedMap[str, SortedMap[NodeId, HeldModel]]
"""Canonical name → node → model."""


def gone(deleted: Deleted | None, model: HeldModel) -> bool:
    """Whether this version was deleted."""
    return deleted is not None and model.modified_at <= deleted.until and not model.remote


def held(
    models: Holders,
    leftovers: Holders,
    deleted: SortedMap[str, Deleted],
    node: NodeId,
    before: Holdings | None,
    after: Holdings | None,
) -> tuple[Holders, Holders]:
    """Both maps once a node holds other models than before."""
    has = {model.name: model for model in after.models} if after else {}
    for old in before.models if before else ():
        if old.name not in has:
            models, leftovers = _without(models, old.name, node), _without(leftovers, old.name, node)
    for name, model in has.items():
        if gone(deleted.get(name), model):
            models, leftovers = _without(models, name, node), _with(leftovers, name, node, model)
        else:
            models, leftovers = _with(models, name, node, model), _without(leftovers, name, node)
    return models, leftovers


def divided(
    models: Holders, leftovers: Holders, name: str, deleted: Deleted | None
) -> tuple[Holders, Holders]:
    """Both maps once the deletion of a name is another; None: there is none."""
    there: SortedMap[NodeId, HeldModel] = SortedMap()
    left: SortedMap[NodeId, HeldModel] = SortedMap()
    for known in (models.get(name, _NOBODY), leftovers.get(name, _NOBODY)):
        for node, model in known.items():
            if gone(deleted, model):
                left = left.with_(node, model)
            else:
                there = there.with_(node, model)
    return _put(models, name, there), _put(leftovers, name, left)


def _with(holders: Holders, name: str, node: NodeId, model: HeldModel) -> Holders:
    return holders.with_(name, holders.get(name, _NOBODY).with_(node, model))


def _without(holders: Holders, name: str, node: NodeId) -> Holders:
    known = holders.get(name)
    return holders if known is None or node not in known else _put(holders, name, known.without(node))


def _put(holders: Holders, name: str, known: SortedMap[NodeId, HeldModel]) -> Holders:
    return holders.with_(name, known) if known else holders.without(name)


_NOBODY: SortedMap[NodeId, HeldModel] = SortedMap()
