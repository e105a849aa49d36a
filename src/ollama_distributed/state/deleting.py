"""What the deletion of a model in the whole cluster writes. Pure; part of `state.changes`."""

from __future__ import annotations

import msgspec

from ollama_distributed.base.errors import Conflict, Invalid
from ollama_distributed.state.cluster import ClusterState
from ollama_distributed.state.records import Deleted

KEPT_S = 7 * 86_400.0
"""A deletion that no known node has still to hear of is forgotten after this: what was on its way
then, from a node that held the model, has long arrived or failed."""
MAX_DELETED = 5_000
"""Names; every node keeps them in memory."""
FORGOTTEN_AT_ONCE = 16
"""With each new one: a batch stays small."""
MAX_NAME = 1_024


class DeleteModel(msgspec.Struct, frozen=True, kw_only=True, tag="delete_model"):
    """The name goes everywhere, also from nodes that are away now."""

    model: str
    """Canonical full name."""


def deletion(state: ClusterState, model: str, *, by: str, at: float) -> Deleted:
    """The record. Its time is that of the newest known version at least, whatever the clock that
    it was made by says.

    Raises:
        Invalid: it is no name.
        Conflict: too many deletions wait for nodes that are away.
    """
    if not 0 < len(model) <= MAX_NAME:
        raise Invalid("that is no model's name")
    before = state.deleted.get(model)
    if before is None and len(state.deleted) - len(forgotten(state, at)) >= MAX_DELETED:
        raise Conflict(
            f"{MAX_DELETED} deleted models wait for nodes that are away; remove those that will "
            "not come back (node remove)"
        )
    known = [held.modified_at for held in state.models.get(model, {}).values()]
    known += [held.modified_at for held in state.leftovers.get(model, {}).values()]
    return Deleted(model=model, until=max(at, before.until if before else 0.0, *known), by=by, at=at)


def forgotten(state: ClusterState, now: float) -> list[str]:
    """The oldest of those that every node which held the model has heard of; as many names as there
    are too many, and all that are older than a week, a few at a time."""
    done = sorted((known.at, name) for name, known in state.deleted.items() if name not in state.leftovers)
    surplus = len(state.deleted) + 1 - MAX_DELETED
    return [
        name
        for rank, (at, name) in enumerate(done[:FORGOTTEN_AT_ONCE])
        if rank < surplus or at + KEPT_S < now
    ]
