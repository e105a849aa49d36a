"""Who waits, as text. Pure: structs in, text out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ollama_distributed.cli import tables
from ollama_distributed.cli.tables import Cell, Column, Look

if TYPE_CHECKING:
    from ollama_distributed.base.queue import QueueAnswer, QueueNode, QueueRow

_MINUTE_S = 60.0
_NEARLY_FULL = 0.9


def queue_text(answer: QueueAnswer, look: Look) -> str:
    rows = [(node, row) for node in answer.nodes for row in node.models]
    text = _table(rows, look) if rows else "nobody waits, and nothing runs\n"
    for node in answer.nodes:
        if node.error:
            text += tables.note("! ", f"{node.name or node.node}: {node.error}", tables.RED, look)
        elif node.most and node.waiting >= _NEARLY_FULL * node.most:
            full = f"{node.name}: {node.waiting} of {node.most} places are taken, {node.refused} refused"
            text += tables.note("! ", full, tables.YELLOW, look)
    return text


def _table(rows: list[tuple[QueueNode, QueueRow]], look: Look) -> str:
    return tables.table(
        [
            Column("NODE", [Cell(node.name or node.node) for node, _ in rows]),
            Column("MODEL", [Cell(row.model, tables.BOLD) for _, row in rows]),
            Column("RUNNING", [Cell(f"{row.running}/{row.slots}") for _, row in rows]),
            Column("WAITING", [Cell(str(row.waiting), _urgent(row)) for _, row in rows]),
            Column("CLASSES", [Cell(_classes(row)) for _, row in rows], 2),
            Column("KEYS", [Cell(str(row.keys) if row.keys else "-") for _, row in rows], 3),
            Column("OLDEST", [Cell(seconds(row.oldest_s) if row.waiting else "-") for _, row in rows], 1),
            Column("ETA", [Cell(_eta(row)) for _, row in rows]),
            Column("RATE", [Cell(_rate(row)) for _, row in rows], 4),
        ],
        look,
    )


def _urgent(row: QueueRow) -> str:
    return tables.YELLOW if row.waiting > row.slots else ""


def _classes(row: QueueRow) -> str:
    return ", ".join(f"{count} {name}" for name, count in row.classes.items()) or "-"


def _eta(row: QueueRow) -> str:
    return "-" if row.eta_s is None else "now" if row.eta_s <= 0.0 else seconds(row.eta_s)


def _rate(row: QueueRow) -> str:
    return "-" if row.requests_per_s is None else f"{row.requests_per_s:.2g}/s"


def seconds(value: float) -> str:
    if value < _MINUTE_S:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s"


def queue_lines(answer: QueueAnswer) -> dict[str, list[str]]:
    """For a watch into a pipe."""
    lines: dict[str, list[str]] = {}
    for node in answer.nodes:
        name = node.name or node.node
        if node.error:
            lines[name] = [node.error]
        for row in node.models:
            running = f"running={row.running}/{row.slots}"
            lines[f"{name} {row.model}"] = [running, f"waiting={row.waiting}", f"eta={_eta(row)}"]
    return lines
