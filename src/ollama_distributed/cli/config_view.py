"""How the cluster's settings look to a person. Pure, but for YAML's reader."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ollama_distributed.cli import humanize, tables
from ollama_distributed.cli.problem import Problem
from ollama_distributed.cli.tables import Cell, Column, Look
from ollama_distributed.cli.terminal import clean_line

if TYPE_CHECKING:
    from ollama_distributed.base.cluster import ConfigAnswer


def value_of(text: str) -> Any:
    """A value as a settings file would hold it.

    Raises:
        Problem: it cannot be read.
    """
    import yaml

    try:
        return yaml.safe_load(text) if text else ""
    except yaml.YAMLError as exc:
        raise Problem(f"{text!r} is not a value: {clean_line(str(exc))}") from exc


def value_text(value: Any) -> str:
    if isinstance(value, str):
        return clean_line(value)
    import msgspec

    return msgspec.json.encode(value).decode()


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """`keep_alive: 5m -> 10m`, sorted by name."""
    found = []
    for name in sorted({*before, *after}):
        old = value_text(before[name]) if name in before else "(each node's own)"
        new = value_text(after[name]) if name in after else "(each node's own)"
        if old != new:
            found.append(f"{clean_line(name)}: {old} -> {new}")
    return found


def config_text(config: ConfigAnswer, now: float, look: Look) -> str:
    if not config.values:
        return "The cluster sets nothing: each node uses its own settings.\n"
    rows = [(name, Cell(value_text(value) or '""')) for name, value in sorted(config.values.items())]
    said = f"version {config.version}, {humanize.age(now - config.at)} ago by {clean_line(config.by)}"
    if config.comment:
        said += f": {clean_line(config.comment)}"
    return tables.facts(rows, look) + tables.painted(said, tables.DIM, look) + "\n"


def history_text(versions: Sequence[ConfigAnswer], now: float, look: Look) -> str:
    """`versions`: newest first."""
    older: list[Mapping[str, Any]] = [*(one.values for one in versions[1:]), {}]
    told = ["; ".join(changes(old, one.values)) or "-" for one, old in zip(versions, older, strict=True)]
    columns = [
        Column("VERSION", [Cell(str(one.version), tables.BOLD) for one in versions]),
        Column("WHEN", [Cell(f"{humanize.age(now - one.at)} ago" if one.at else "-") for one in versions]),
        Column("BY", [Cell(one.by or "-", tables.DIM) for one in versions], 2),
        Column("CHANGE", [Cell(text) for text in told]),
        Column("COMMENT", [Cell(one.comment) for one in versions], 1),
    ]
    return tables.table(columns, look)


def event_text(before: ConfigAnswer | None, config: ConfigAnswer, look: Look) -> str:
    """One version of a watch."""
    stamp = time.strftime("%H:%M:%S", time.localtime(config.at)) if config.at else "--:--:--"
    said = changes(before.values if before else {}, config.values)
    head = tables.painted(f"{stamp}  version {config.version}", tables.BOLD, look)
    by = f" by {clean_line(config.by)}" if config.by else ""
    note = f" ({clean_line(config.comment)})" if config.comment else ""
    return f"{head}{by}{note}\n" + "".join(f"          {line}\n" for line in said)
