"""The lines of `/metrics` about models on their way."""

from __future__ import annotations

from ollama_distributed.base.pieces import PieceFigures
from ollama_distributed.base.transfers import TransferFigures

_KINDS = ("pull", "push", "copy")
_OUTCOMES = ("done", "failed", "cancelled")
"""A series of each is there from the start."""


def transfer_lines(prefix: str, moving: TransferFigures, pieces: PieceFigures) -> list[str]:
    """From and to registries; of other nodes' pieces how fast they come and go."""
    received, sent = f"{prefix}_registry_received_bytes_total", f"{prefix}_registry_sent_bytes_total"
    running, ended = f"{prefix}_transfers_running", f"{prefix}_transfers_total"
    speed = f"{prefix}_transfer_bytes_per_second"
    return [
        f"# HELP {received} Bytes of models that came from registries.",
        f"# TYPE {received} counter",
        f"{received} {moving.received_bytes}",
        f"# HELP {sent} Bytes of models that went to registries, also for the second time.",
        f"# TYPE {sent} counter",
        f"{sent} {moving.sent_bytes}",
        f"# HELP {running} Pulls, pushes and copies that run now.",
        f"# TYPE {running} gauge",
        *(f'{running}{{kind="{kind}"}} {moving.running.get(kind, 0)}' for kind in _KINDS),
        f"# HELP {ended} Pulls, pushes and copies that ended.",
        f"# TYPE {ended} counter",
        *(
            f'{ended}{{kind="{kind}",outcome="{outcome}"}} {moving.ended.get((kind, outcome), 0)}'
            for kind in _KINDS
            for outcome in _OUTCOMES
        ),
        f"# HELP {speed} Mean of about a minute, or since the last look.",
        f"# TYPE {speed} gauge",
        *(
            f'{speed}{{kind="{whom}",direction="{way}"}} {rate:.0f}'
            for whom, figures in (("registry", moving), ("peer", pieces))
            for way, rate in (("in", figures.received_per_s), ("out", figures.sent_per_s))
        ),
    ]
