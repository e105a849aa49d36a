"""A node's disk as text. Pure: structs and the time in, text out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ollama_distributed.cli import humanize, tables
from ollama_distributed.cli.tables import Cell, Column, Look

if TYPE_CHECKING:
    from ollama_distributed.base.disk import DiskAnswer, ModelOnDisk, ScrubRow

_STAYS: Mapping[str, tuple[str, str]] = {
    "": ("may go", tables.GREEN),
    "loaded": ("loaded", tables.CYAN),
    "recent": ("just used", tables.CYAN),
    "moving": ("on its way", tables.CYAN),
    "pinned": ("pinned here", tables.BLUE),
    "placed": ("placed here", tables.BLUE),
    "last": ("last copy", tables.YELLOW),
}
_NAMED = 3
"""Nodes that a row names."""


def disk_text(answer: DiskAnswer, now: float, look: Look) -> str:
    quota = answer.quota_bytes
    leftovers = {
        "half-fetched": answer.partial_bytes,
        "damaged": answer.damaged_bytes,
        "named by no model": answer.other_bytes,
    }
    facts = [
        ("Node", Cell(answer.name, tables.BOLD)),
        ("Models", tables.share(answer.used_bytes / quota if quota else None, look) if quota else Cell("")),
        ("Used", Cell(humanize.size(answer.used_bytes) + (f" of {humanize.size(quota)}" if quota else ""))),
        (
            "Disk",
            Cell(
                f"{humanize.size(answer.free_bytes)} of {humanize.size(answer.total_bytes)} free, "
                f"{humanize.size(answer.low_water_bytes)} of it for others"
            ),
        ),
        ("Room", Cell(_room(answer))),
        (
            "Leftovers",
            Cell(", ".join(f"{humanize.size(size)} {what}" for what, size in leftovers.items() if size)),
        ),
        (
            "Asked for",
            Cell(f"{answer.hits} times a model that was here, {answer.misses} times one that was not"),
        ),
        (
            "Evicted",
            Cell(
                f"{answer.evictions} models, {humanize.size(answer.evicted_bytes)}"
                if answer.evictions
                else ""
            ),
        ),
        ("Refused", Cell(f"{answer.refused} times for want of room" if answer.refused else "", tables.RED)),
        ("Scrub", scrub_cell(answer.scrub, now)),
        ("Damaged", Cell(_damaged(answer), tables.RED)),
    ]
    text = tables.facts(facts, look)
    if answer.models:
        text += "\n" + _models(answer, now, look)
    return text + "".join(
        tables.note("! ", f"{row.model}: {row.damaged}", tables.RED, look)
        for row in answer.models
        if row.damaged
    )


def _room(answer: DiskAnswer) -> str:
    more = f", {humanize.size(answer.evictable_bytes)} more when models go" if answer.evictable_bytes else ""
    coming = f", besides {humanize.size(answer.coming_bytes)} that are coming" if answer.coming_bytes else ""
    return f"{humanize.size(answer.room_bytes)}{more}{coming}"


def _damaged(answer: DiskAnswer) -> str:
    return f"{answer.corrupt} files found, {answer.repaired} models fetched again" if answer.corrupt else ""


def scrub_cell(row: ScrubRow, now: float) -> Cell:
    if row.running:
        share = row.done_bytes / row.total_bytes if row.total_bytes else 0.0
        return Cell(f"{share:.0%} of {humanize.size(row.total_bytes)}", tables.CYAN)
    if row.ended_at is None or row.began_at is None:
        return Cell("")
    found = f"{row.corrupt} damaged" if row.corrupt else "all sound"
    return Cell(
        f"{row.files} files {humanize.age(now - row.ended_at)} ago, {found}",
        tables.RED if row.corrupt else "",
    )


def _models(answer: DiskAnswer, now: float, look: Look) -> str:
    rows = answer.models
    columns = [
        Column("MODEL", [Cell(row.model) for row in rows]),
        Column("SIZE", [Cell(humanize.size(row.size_bytes)) for row in rows]),
        Column("FREES", [Cell(humanize.size(row.frees_bytes)) for row in rows], 2),
        Column("LAST USED", [Cell(f"{humanize.age(now - row.last_used)} ago") for row in rows], 1),
        Column("STAYS", [_stays(row) for row in rows]),
        Column("ALSO ON", [Cell(_others(row)) for row in rows], 3),
    ]
    return tables.table(columns, look)


def _stays(row: ModelOnDisk) -> Cell:
    return Cell("damaged", tables.RED) if row.damaged else Cell(*_STAYS[row.kept])


def _others(row: ModelOnDisk) -> str:
    more = f" +{len(row.others) - _NAMED}" if len(row.others) > _NAMED else ""
    return ", ".join(row.others[:_NAMED]) + more or "-"


def disk_lines(answer: DiskAnswer) -> dict[str, list[str]]:
    """For a watch into a pipe."""
    row = answer.scrub
    tenths = 10 * (10 * row.done_bytes // row.total_bytes) if row.total_bytes else 0
    scrub = f"scrub={tenths}%" if row.running else "scrub=no"
    node = [f"used={humanize.size(answer.used_bytes)}", f"evicted={answer.evictions}", scrub]
    return {answer.name: node, **{row.model: [_stays(row).text, _others(row)] for row in answer.models}}
