"""Where models fit and are wanted, as tables. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ollama_distributed.cli import humanize, tables
from ollama_distributed.cli.tables import Cell, Column, Look

if TYPE_CHECKING:
    from ollama_distributed.base.placement import FitAnswer, FitRow, PlacesAnswer, WhatIfAnswer

_VERDICTS: Mapping[str, tuple[str, str]] = {
    "fits": ("fits", tables.GREEN),
    "unload": ("after unloading", tables.YELLOW),
    "smaller": ("smaller", tables.YELLOW),
    "no": ("no", tables.RED),
}


def fit_text(answer: FitAnswer, look: Look) -> str:
    rows = answer.nodes

    def column(title: str, texts: Sequence[str], rank: int = 0) -> Column:
        return Column(title, [Cell(text) for text in texts], rank)

    head = (
        f"{answer.model}: {humanize.size(answer.size_bytes)}, asked for {answer.slots} x "
        f"{answer.context_tokens} tokens\n"
    )
    if answer.registry:
        head += (
            f"no node has it: looked at in {answer.registry}, {humanize.size(answer.bytes_read)} were read\n"
        )
    if not rows:
        return head + "no node is known yet\n"
    return head + tables.table(
        [
            column("NODE", [row.name for row in rows]),
            Column("FITS", [Cell(*_VERDICTS[row.verdict]) for row in rows]),
            column("ON", [(row.device or "-").upper() for row in rows]),
            column("CONTEXT", [str(row.context_tokens or "-") for row in rows]),
            column("SLOTS", [str(row.slots or "-") for row in rows]),
            column(
                "MEMORY", [humanize.memory(row.memory_bytes) if row.memory_bytes else "-" for row in rows]
            ),
            column("TOKENS/S", [_speed(row) for row in rows]),
            column("FETCH", [humanize.size(row.fetch_bytes) if row.fetch_bytes else "-" for row in rows], 2),
            column("NOTE", [_note(row) for row in rows], 1),
        ],
        look,
    )


def _speed(row: FitRow) -> str:
    if row.device is None:
        return "-"
    if row.tokens_per_s is None:
        return "unknown"
    return f"{row.tokens_per_s:.1f} {row.speed_from or ''}".rstrip()


def _note(row: FitRow) -> str:
    if row.reason:
        return row.reason
    gone = f"unload {', '.join(row.unload)}" if row.unload else ""
    return "; ".join(filter(None, ("it has the files" if row.holds else "", gone)))


def places_text(answer: PlacesAnswer, look: Look) -> str:
    if not answer.wanted:
        number = "it stays where it was put"
    elif answer.replicas is not None:
        number = f"on {answer.replicas} nodes"
    else:
        most = "as many as there are" if answer.max is None else str(answer.max)
        number = f"on {answer.min} to {most} nodes, as demand asks for"
    rows = [
        ("MODEL", Cell(answer.model)),
        ("WANTED", Cell(number)),
        ("LABELS", Cell(", ".join(f"{k}={v}" for k, v in sorted(answer.labels.items())) or "-")),
        ("PINNED", Cell(", ".join(answer.pins) or "-")),
        ("PRELOAD", Cell("yes" if answer.preload else "no")),
        ("KEEP ALIVE", Cell("-" if answer.keep_alive_s is None else humanize.duration(answer.keep_alive_s))),
        ("SURPLUS", Cell("kept while there is room" if answer.keep else "deleted")),
        ("NOW ON", Cell(", ".join(answer.nodes) or "no node")),
    ]
    return tables.facts(rows, look)


def what_if_text(answer: WhatIfAnswer, look: Look) -> str:
    parts = [f"without {', '.join(answer.lost)}:\n"]
    if answer.last_copies:
        parts.append(tables.painted("gone for good (no other copy): ", tables.RED, look))
        parts.append(", ".join(answer.last_copies) + "\n")
    if answer.moved:
        parts.append(
            tables.table(
                [
                    Column("MOVES", [Cell(row.model) for row in answer.moved]),
                    Column("FROM", [Cell(", ".join(row.gone) or "-") for row in answer.moved]),
                    Column("TO", [Cell(", ".join(row.new) or "nowhere") for row in answer.moved]),
                ],
                look,
            )
        )
    for row in answer.no_longer:
        missing = f"{row.copies} copies and {row.loaded} loaded missing"
        parts.append(f"no longer fits: {row.model} ({missing}): {'; '.join(row.reasons)}\n")
    if not answer.planned:
        parts.append("no model has places given (model replicas, place, pin), so nothing would move\n")
    elif not answer.moved and not answer.no_longer:
        parts.append("nothing would move\n")
    return "".join(parts)
