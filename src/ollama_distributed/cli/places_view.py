"""Where models fit and are wanted, as tables. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ollama_distributed.cli import humanize, tables
from ollama_distributed.cli.tables import Cell, Column, Look
from ollama_distributed.cli.terminal import clean_line

if TYPE_CHECKING:
    from ollama_distributed.base.placement import FitAnswer, FitRow, PlaceRow, PlacesAnswer, WhatIfAnswer

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


def all_text(models: Sequence[PlacesAnswer], look: Look) -> str:
    if not models:
        return "no models\n"
    rows = [summary(one) for one in models]
    styles = [_style(one) for one in models]
    titles = ("MODEL", "ORDER", "WANTED", "HAVE", "LOADED", "STATE")
    return tables.table(
        [
            Column(
                title,
                [
                    Cell(row[at], style if title == "STATE" else "")
                    for row, style in zip(rows, styles, strict=True)
                ],
                1 if title == "ORDER" else 0,
            )
            for at, title in enumerate(titles)
        ],
        look,
    )


def summary(one: PlacesAnswer) -> list[str]:
    if not one.wanted:
        return [one.model, "-", "-", str(len(one.nodes)), str(one.running), "stays where it was put"]
    loaded = f"{one.running}" if one.running == one.loaded else f"{one.running} of {one.loaded}"
    return [one.model, _order(one), str(one.copies), str(one.have), loaded, standing(one)]


def standing(one: PlacesAnswer) -> str:
    """In a few words."""
    if one.missing:
        return f"short: {'; '.join(one.missing)}"
    return "in place" if one.settled else "moving"


def _style(one: PlacesAnswer) -> str:
    if one.missing:
        return tables.YELLOW
    return "" if one.settled else tables.CYAN


def _order(one: PlacesAnswer) -> str:
    if one.by_default:
        return "default"
    if one.replicas is not None:
        return str(one.replicas)
    return f"{one.min} to {'all' if one.max is None else one.max}"


def places_text(answer: PlacesAnswer, look: Look) -> str:
    if not answer.wanted:
        number = "it stays where it was put"
    elif answer.replicas is not None:
        number = f"on {answer.replicas} nodes"
    else:
        most = "as many as there are" if answer.max is None else str(answer.max)
        number = f"on {answer.min} to {most} nodes, as demand asks for"
    facts = [
        ("MODEL", Cell(answer.model)),
        ("WANTED", Cell(number + (" (by default)" if answer.by_default else ""))),
        ("LABELS", Cell(", ".join(f"{k}={v}" for k, v in sorted(answer.labels.items())) or "-")),
        ("PINNED", Cell(", ".join(answer.pins) or "-")),
        ("PRELOAD", Cell("yes" if answer.preload else "no")),
        ("KEEP ALIVE", Cell("-" if answer.keep_alive_s is None else humanize.duration(answer.keep_alive_s))),
        ("SURPLUS", Cell("kept while there is room" if answer.keep else "deleted")),
        ("NOW ON", Cell(", ".join(answer.nodes) or "no node")),
    ]
    if answer.wanted:
        facts.append(("STATE", Cell(standing(answer), _style(answer))))
    text = tables.facts(facts, look)
    if not answer.rows:
        return text
    rows = [cells(row) for row in answer.rows]
    columns = [
        Column(title, [Cell(row[at]) for row in rows], rank)
        for at, (title, rank) in enumerate((("NODE", 0), ("WANTED", 0), ("HAS", 0), ("NOW", 0), ("NOTE", 1)))
    ]
    return text + "\n" + tables.table(columns, look)


def cells(row: PlaceRow) -> list[str]:
    wanted = ("loaded" if row.warm else "on disk") if row.copy else "-"
    has = "other version" if row.stale else ("on disk" if row.has else "-")
    return [row.name, wanted, "loaded" if row.loaded else has, _DOING.get(row.doing, "-"), row.note]


_DOING: Mapping[str, str] = {"fetch": "copies", "load": "loads", "unload": "unloads", "delete": "deletes"}


def ahead(answer: PlacesAnswer) -> list[str]:
    """What follows from an order, a line for each node."""
    lines = [
        f"{clean_line(row.name)} {_DOING[row.doing]} it" + (f" ({clean_line(row.note)})" if row.note else "")
        for row in answer.rows
        if row.doing
    ]
    return lines or ["nothing has to move"]


def step(before: PlaceRow | None, row: PlaceRow) -> str:
    """What has come of it since; empty: nothing that is worth a line."""
    if row.note != (before.note if before else "") and " failed " in row.note:
        return f"{row.name}: {row.note}"
    if before is None or before.doing == row.doing or not before.doing:
        return ""
    if row.loaded and not before.loaded:
        return f"{row.name} has it loaded"
    if row.has and not before.has:
        return f"{row.name} has it"
    if before.loaded and not row.loaded:
        return f"{row.name} has unloaded it"
    return f"{row.name} has deleted it" if before.has and not row.has else ""


def _nodes(nodes: Sequence[str], without: Sequence[str] = ()) -> Cell:
    return Cell(", ".join(node for node in nodes if node not in without) or "-")


def what_if_text(answer: WhatIfAnswer, look: Look) -> str:
    parts = [f"without {', '.join(answer.lost)}:\n"]
    if answer.last_copies:
        parts.append(tables.painted("gone for good (no other copy): ", tables.RED, look))
        parts.append(", ".join(answer.last_copies) + "\n")
    if answer.moved:
        parts.append(
            tables.table(
                [
                    Column("MODEL", [Cell(row.model) for row in answer.moved]),
                    Column("GOES FROM", [_nodes(row.gone, row.new) for row in answer.moved]),
                    Column("COMES TO", [_nodes(row.new, row.gone) for row in answer.moved]),
                    Column("LOADED AT", [_nodes(row.loads) for row in answer.moved]),
                ],
                look,
            )
        )
    for row in answer.no_longer:
        lacks = [("copies", "copy", row.copies), ("loaded copies", "loaded copy", row.loaded)]
        fewer = " and ".join(f"{n} {one if n == 1 else many}" for many, one, n in lacks if n)
        reasons = clean_line("; ".join(row.reasons))
        parts.append(f"fewer than wanted: {clean_line(row.model)} lacks {fewer or 'a pin'}: {reasons}\n")
    if not answer.planned:
        parts.append("no model is to be on any number of nodes, so nothing would move\n")
    elif not answer.moved and not answer.no_longer:
        parts.append("nothing would move\n")
    return "".join(parts)
