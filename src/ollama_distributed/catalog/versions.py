"""Versions of a model's name, in time: of two, the newer one counts, wherever they lie.

A version's time is that of its manifest. A copy has its original's time; what is new is newer
than all that is known of its name, a deletion in the whole cluster included, whatever this
node's clock says. So all nodes agree on which version counts without asking each other.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Protocol

import msgspec
import structlog

from ollama_distributed.base.errors import InvalidModel, ModelNotFound
from ollama_distributed.state.cluster import ClusterState
from ollama_distributed.state.records import Deleted

log = structlog.get_logger()

STEP_S = 0.001
"""Between a version and the one before it, where clocks cannot tell them apart."""
LATEST = 4_102_444_800.0
"""The year 2100: no version comes after it, whatever nonsense a node tells of its own."""


class History(msgspec.Struct, frozen=True):
    """What is known of a name: times in seconds since the Unix epoch, 0.0: none."""

    newest_at: float = 0.0
    """When the newest version was made."""
    deleted_until: float = 0.0
    """Up to when versions were deleted in the whole cluster."""


def history_of_nothing(_key: str) -> History:
    """Of a node that is alone."""
    return History()


def history_in(state: ClusterState, key: str) -> History:
    held = state.models.get(key)
    deleted = state.deleted.get(key)
    return History(
        newest_at=max((model.modified_at for model in held.values()), default=0.0) if held else 0.0,
        deleted_until=deleted.until if deleted is not None else 0.0,
    )


def next_time(now: float, history: History, here_at: float = 0.0) -> float:
    """When a new version is made, that takes the place of one of `here_at`."""
    return min(max(now, max(history.newest_at, history.deleted_until, here_at) + STEP_S), LATEST)


class Own(Protocol):
    """This node's models (`catalog.service.Catalog`)."""

    def models(self) -> Mapping[str, float]: ...

    async def clear(self, key: str, until: float) -> bool: ...

    async def renew(self, key: str) -> None: ...


class Cleaner:
    """Removes from this node what was deleted in the whole cluster, perhaps while it was away."""

    def __init__(self, own: Own, unload: Callable[[str], Awaitable[None]]) -> None:
        self._own = own
        self._unload = unload

    async def clean(self, deleted: Mapping[str, Deleted], member_since: float) -> None:
        """What a node brought along when it became a member was never deleted there: it counts
        as new."""
        for key, made_at in self._own.models().items():
            record = deleted.get(key)
            if record is None or made_at > record.until:
                continue
            if record.at < member_since:
                await self._own.renew(key)
                log.info("catalog.kept", model=key, deleted_at=record.at, member_since=member_since)
                continue
            with suppress(ModelNotFound, InvalidModel):  # what cannot be served is not loaded either
                await self._unload(key)
            if await self._own.clear(key, record.until):
                log.info("catalog.cleaned", model=key, by=record.by)
