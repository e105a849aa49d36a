"""How busy a node is, as its beats and the leader's answers carry it. The API shows it in percent
(`base.cluster.NodeUsage`)."""

from __future__ import annotations

import msgspec


class Utilization(msgspec.Struct, frozen=True, kw_only=True):
    cpu: float = 0.0
    """0..1 of all its cores."""
    memory: float = 0.0
    """0..1 of its memory."""
    gpu: float | None = None
    """0..1, the mean of its GPUs; None: it has none."""
    gpu_memory: float | None = None
    """0..1 of all of theirs."""
    requests: int = 0
    """Answers that run now."""
    queued: int = 0
    overload: str = ""
    """What it gives up since its own memory is short: closing, refusing, dropping; empty: nothing."""
    age_s: float | None = None
    """How old these figures are; None: there are none."""
