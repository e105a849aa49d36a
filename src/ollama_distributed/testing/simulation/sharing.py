"""A thousand mirrors fold the same events: each step is computed once and shared.

The fold is pure and its states never change in place, so nothing but time and memory can tell
the difference; a mirror that sees another event, or in another order, computes its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import msgspec

from ollama_distributed.cluster import mirror
from ollama_distributed.state.cluster import ClusterState, apply

MAX_STEPS = 50_000
"""Remembered; the oldest go first. A first load of 2,000 nodes is 10,000."""


@contextmanager
def sharing_steps() -> Iterator[None]:
    """Inside, `cluster.mirror` folds through the memory of what was folded already."""
    with mock.patch.object(mirror, "apply", _Steps().apply):
        yield


class _Steps:
    def __init__(self) -> None:
        self._empty = ClusterState()
        # With the state before, whose identity the key names: so it is not collected.
        self._known: OrderedDict[tuple[int, str, int], tuple[ClusterState, bytes | None, ClusterState]]
        self._known = OrderedDict()

    def apply(
        self, state: ClusterState, key: str, value: bytes | None, revision: int, *, at: float = 0.0
    ) -> ClusterState:
        if not state.raw:
            state = msgspec.structs.replace(self._empty, revision=state.revision)
        step = (id(state.raw), key, revision)
        known = self._known.get(step)
        if known is None or known[1] != value:
            if len(self._known) >= MAX_STEPS:
                self._known.popitem(last=False)
            after = apply(state, key, value, revision, at=at)
            self._known[step] = (state, value, after)
            return after
        return msgspec.structs.replace(known[2], timestamp=at)
