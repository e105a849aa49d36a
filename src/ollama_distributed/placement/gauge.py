"""What is asked of each model in the cluster, from the load reports of nodes that run it.

The leader's. Work is smoothed: it rises within seconds, so that help comes before queues are
long, and falls within a minute, so that a pause unloads nothing. When a model was used last is
seen by changes, never by comparing two nodes' clocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.load import MAX_INTEREST, ModelLoad
from ollama_distributed.placement.demand import Demand
from ollama_distributed.placement.ports import Reports

UP_S, DOWN_S = 5.0, 60.0
"""Time constants of work that rises and falls."""
STALE_S = 15.0
"""A report that is older says nothing."""


class _Model(msgspec.Struct):
    nodes: set[NodeId]
    work: float = 0.0
    slots: int = 1
    used_there: float = 0.0
    """The latest use, by the clock of its node."""
    used_at: float = 0.0
    """When that was learned, or work was seen, by ours."""


class Gauge:
    def __init__(self, reports: Reports, clock: Clock) -> None:
        self._reports = reports
        self._clock = clock
        self._models: dict[str, _Model] = {}
        self._of: dict[NodeId, frozenset[str]] = {}
        self._looked_at = clock.monotonic()

    def put(self, node: NodeId, loaded: Iterable[str]) -> None:
        """These models are in a node's memory."""
        before, after = self._of.get(node, frozenset()), frozenset(loaded)
        for model in before - after:
            self._models[model].nodes.discard(node)
            if not self._models[model].nodes:
                del self._models[model]
        for model in after - before:
            known = self._models.get(model)
            if known is None:
                known = self._models[model] = _Model(set(), used_at=self._clock.monotonic())
            known.nodes.add(node)
        if after:
            self._of[node] = after
        else:
            self._of.pop(node, None)

    def look(self) -> None:
        """Take in what was reported since the last look."""
        now = self._clock.monotonic()
        past_s, self._looked_at = now - self._looked_at, now
        self._reports.interest(sorted(self._of)[:MAX_INTEREST])
        heard: dict[str, list[ModelLoad]] = {}
        for node in self._of:
            report = self._reports.report(node)
            if report is not None and (report.age_s or 0.0) <= STALE_S:
                for row in report.models:
                    heard.setdefault(row.name, []).append(row)
        for name, known in self._models.items():
            if rows := heard.get(name):
                _take(known, rows, now, past_s)

    def models(self) -> list[str]:
        """Those that are loaded anywhere."""
        return sorted(self._models)

    def demand(self, model: str) -> Demand:
        known = self._models.get(model)
        if known is None:
            return Demand()
        return Demand(
            work=known.work,
            slots=known.slots,
            loaded=len(known.nodes),
            idle_s=self._clock.monotonic() - known.used_at,
        )


def _take(known: _Model, rows: list[ModelLoad], now: float, past_s: float) -> None:
    said = float(sum(row.busy + row.queued for row in rows))
    # Replicas that are not heard work as much as those that are.
    work = said * len(known.nodes) / len(rows)
    weight = 1.0 - math.exp(-past_s / (UP_S if work > known.work else DOWN_S))
    known.work += weight * (work - known.work)
    known.slots = max(1, round(sum(row.slots for row in rows) / len(rows)))
    used = max(row.used_at for row in rows)
    if said or used > known.used_there:
        known.used_at, known.used_there = now, max(used, known.used_there)
