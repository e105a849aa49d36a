"""Remembers, for a moment, which replicas were full for whom. State only.

A node that has no place for one request of a key has none for the next: the key that floods it holds most
places there and gives way to nobody. A gateway that asked all of them again for each request of a flood
would keep every node busy with refusals, and the first words of other keys would wait behind that work. So
after a refusal it tries one request of that key and class at a time, after `FULL_S` or when it hears that
one of theirs was taken or had its turn, and more of them the more are taken; what comes meanwhile does not
go there. For others it asks as ever: they may have a place where this one has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import msgspec

from ollama_distributed.base.errors import QueueFull
from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.inference import EmbedRequest, InferenceRequest, RerankRequest
from ollama_distributed.base.priority import Priority
from ollama_distributed.base.queue import key_of

FULL_S = 0.1
"""Little enough that the places of a short queue are not long empty."""
KEPT_S = 1.0
"""Without a refusal nothing is remembered longer: who was refused was told to come back after that."""
LOST_S = 5.0
"""A request that was tried and of which nothing is heard is waited for so long."""
ENOUGH = 16
"""Of a key's requests that may be tried at once: it is not full any more."""
MOST = 1024
"""Replicas, and askers of each; all are forgotten when so many came together."""

Asker: TypeAlias = tuple[str, Priority]
"""Key and class: those who take turns together."""


class _Full(msgspec.Struct):
    message: str
    """Not the error: with it all would be kept that the request was."""
    retry_after_s: float
    refused_s: float
    asked_s: float = 0.0
    asked: int = 0
    """Requests that were tried and not heard of yet."""
    may: int = 1
    """Be tried."""


def asker_of(request: InferenceRequest | EmbedRequest | RerankRequest) -> Asker | None:
    """None: it does not wait as long as others would."""
    return (key_of(request.identity), request.priority) if request.within_s is None else None


class Refusals:
    """Of one gateway. Times are a monotonic clock's, in seconds; models by their canonical names."""

    def __init__(self) -> None:
        self._full: dict[tuple[NodeId, str], dict[Asker, _Full]] = {}

    def __len__(self) -> int:
        """Replicas."""
        return len(self._full)

    def refused(self, node: NodeId, model: str, asker: Asker, error: QueueFull, now: float) -> None:
        if len(self._full) >= MOST:
            self._full.clear()
        askers = self._full.setdefault((node, model), {})
        if len(askers) >= MOST:
            askers.clear()
        before = askers.get(asker)
        asked_s, asked = (before.asked_s, max(before.asked - 1, 0)) if before is not None else (0.0, 0)
        askers[asker] = _Full(error.message, error.retry_after_s, now, asked_s, asked)

    def asked(self, node: NodeId, model: str, asker: Asker | None, now: float) -> None:
        """A request of theirs goes there."""
        if asker is not None and (known := self._of(node, model, asker)) is not None:
            known.asked, known.asked_s, known.may = known.asked + 1, now, known.may - 1

    def taken(self, node: NodeId, model: str, asker: Asker | None) -> None:
        """One of theirs found a place there, or left it for its turn."""
        if asker is not None and (known := self._of(node, model, asker)) is not None:
            known.asked, known.may = max(known.asked - 1, 0), known.may + 1
            if known.may > ENOUGH:
                self._forget(node, model, asker)

    def left(
        self, order: Sequence[NodeId], model: str, asker: Asker | None, now: float
    ) -> tuple[tuple[NodeId, ...], QueueFull | None]:
        """Those of `order` to ask, and what one of the others said."""
        if asker is None or not self._full:
            return tuple(order), None
        left, said = [], None
        for node in order:
            known = self._of(node, model, asker)
            if known is not None and _over(known, now):
                self._forget(node, model, asker)
                known = None
            if known is None or known.may > 1 or (known.may == 1 and now - known.refused_s >= FULL_S):
                left.append(node)
            else:
                said = QueueFull(known.message, retry_after_s=known.retry_after_s)
        return tuple(left), said

    def _of(self, node: NodeId, model: str, asker: Asker) -> _Full | None:
        if not self._full:
            return None
        askers = self._full.get((node, model))
        return None if askers is None else askers.get(asker)

    def _forget(self, node: NodeId, model: str, asker: Asker) -> None:
        askers = self._full[node, model]
        del askers[asker]
        if not askers:
            del self._full[node, model]


def _over(known: _Full, now: float) -> bool:
    awaited = known.asked > 0 and now - known.asked_s <= LOST_S
    return now - known.refused_s > KEPT_S and not awaited
