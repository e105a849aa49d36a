"""`/metrics`: the part of usage and limits. Never by key: there may be any number of them."""

from __future__ import annotations

from ollama_distributed.base.usage import UsageFigures


def usage_lines(prefix: str, figures: UsageFigures) -> list[str]:
    lines: list[str] = []
    for name, kind, text, number in (
        ("usage_rows", "gauge", "Rows of this node's ledger of usage.", figures.rows),
        ("usage_copies", "gauge", "Ledgers of other nodes that this one keeps.", figures.copies),
        (
            "usage_not_written",
            "gauge",
            "1 while the disk refuses what was counted.",
            int(figures.failing),
        ),
        ("limited", "gauge", "Keys and teams with limits that were here lately.", figures.limited),
        (
            "limits_borrowed_total",
            "counter",
            "Times that another gateway handed over a part of its share.",
            figures.borrowed,
        ),
    ):
        lines += [
            f"# HELP {prefix}_{name} {text}",
            f"# TYPE {prefix}_{name} {kind}",
            f"{prefix}_{name} {number}",
        ]
    name = f"{prefix}_limits_refused_total"
    lines += [f"# HELP {name} Requests that were refused for a limit.", f"# TYPE {name} counter"]
    return lines + [f'{name}{{limit="{what}"}} {count}' for what, count in sorted(figures.refused.items())]
