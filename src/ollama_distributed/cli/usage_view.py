"""Usage as text. Pure: structs in, text out."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ollama_distributed.cli import tables
from ollama_distributed.cli.tables import Cell, Column, Look

if TYPE_CHECKING:
    from ollama_distributed.base.usage import UsageAnswer, UsageRow

_BAR = 16
_EIGHTHS = " ▏▎▍▌▋▊▉"


def usage_text(answer: UsageAnswer, look: Look) -> str:
    rows, total = answer.rows, answer.total
    shown = [*rows, *((total,) if len(rows) != 1 else ())]
    labels: list[Column] = []
    for by in answer.by:
        names = [Cell(_label(getattr(row, by))) for row in rows]
        if len(rows) != 1:
            names.append(Cell("all" if by == answer.by[0] else "", tables.BOLD))
        labels.append(Column(by.upper(), names))
    most = max((_tokens(row) for row in rows), default=0)
    bars = [Cell(bar(_tokens(row), most), tables.CYAN) for row in rows]
    if len(rows) != 1:
        bars.append(Cell(""))
    columns = [
        *labels,
        *([Column("", bars)] if look.bars and rows else []),
        Column("REQUESTS", [Cell(_number(row.requests)) for row in shown]),
        Column("ERRORS", [_errors(row) for row in shown], 4),
        Column("TOKENS IN", [Cell(_number(row.prompt_tokens)) for row in shown]),
        Column("CACHED", [Cell(_part(row.cached_tokens, row.prompt_tokens)) for row in shown], 3),
        Column("TOKENS OUT", [Cell(_number(row.completion_tokens)) for row in shown]),
        Column("WAIT", [Cell(_each(row.wait_s, row)) for row in shown], 6),
        Column("LOAD", [Cell(_each(row.load_s, row)) for row in shown], 7),
        Column("PROMPT", [Cell(_each(row.prompt_s, row)) for row in shown], 8),
        Column("ANSWER", [Cell(_each(row.completion_s, row)) for row in shown], 5),
    ]
    if total.energy_wh:
        columns.append(Column("ENERGY", [Cell(energy(row.energy_wh)) for row in shown], 2))
    if total.cost or total.energy_cost:
        title = f"COST {answer.currency}".strip()
        columns.append(Column(title, [Cell(money(row.cost + row.energy_cost)) for row in shown], 1))
    return tables.table(columns, look) + "".join(_notes(answer, look))


def _notes(answer: UsageAnswer, look: Look) -> Sequence[str]:
    found = [tables.note("", f"{answer.start} to {answer.end}, UTC; times are per request", tables.DIM, look)]
    if answer.missing:
        text = f"did not answer, shown as last copied: {', '.join(answer.missing)}"
        found.append(tables.note("! ", text, tables.YELLOW, look))
    ends: dict[str, list[float]] = {}
    for doubt in answer.in_doubt:
        ends.setdefault(doubt.node, []).append(doubt.at)
    for node, times in ends.items():
        last = datetime.fromtimestamp(max(times), UTC).strftime("%Y-%m-%d %H:%M")
        text = f"{node} ended without closing its ledger at {last}"
        text += f" (and {len(times) - 1} more)" if len(times) > 1 else ""
        text += ": of the last second something may be missing"
        found.append(tables.note("! ", text, tables.YELLOW, look))
    return found


def usage_lines(answer: UsageAnswer) -> dict[str, list[str]]:
    """For a watch into a pipe."""
    rows = answer.rows or (answer.total,)
    return {
        " ".join(_label(getattr(row, by)) for by in answer.by) or "all": [
            f"requests={row.requests}",
            f"in={row.prompt_tokens}",
            f"out={row.completion_tokens}",
        ]
        for row in rows
    }


def bar(value: float, most: float) -> str:
    """A bar of block characters, to an eighth of one."""
    if most <= 0 or value <= 0:
        return ""
    eighths = max(1, round(_BAR * 8 * value / most))
    return "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")


def energy(wh: float) -> str:
    return f"{wh / 1000:.2f} kWh" if wh >= 1000 else f"{wh:.2f} Wh"


def money(amount: float) -> str:
    return f"{amount:.2f}" if amount >= 1 or not amount else f"{amount:.4f}"


def _tokens(row: UsageRow) -> int:
    return row.prompt_tokens + row.completion_tokens


def _label(name: str | None) -> str:
    return name or "-"


def _number(number: int) -> str:
    return f"{number:,}"


def _errors(row: UsageRow) -> Cell:
    return Cell(_number(row.errors), tables.RED) if row.errors else Cell("-", tables.DIM)


def _part(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if part and whole else "-"


def _each(seconds: float, row: UsageRow) -> str:
    each_s = seconds / row.requests if row.requests else 0.0
    if each_s < 0.0005:
        return "-"
    return f"{each_s * 1000:.0f} ms" if each_s < 1 else f"{each_s:.1f} s"
