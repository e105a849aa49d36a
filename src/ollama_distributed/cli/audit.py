"""`audit list|verify`: who changed what, and whether that record is whole."""

from __future__ import annotations

import time
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from ollama_distributed.cli import humanize, live, output, tables
from ollama_distributed.cli.cluster import PANEL, make_group
from ollama_distributed.cli.group import Command
from ollama_distributed.cli.problem import Problem
from ollama_distributed.cli.session import Session
from ollama_distributed.cli.tables import Cell, Column, Look
from ollama_distributed.cli.terminal import clean_line

if TYPE_CHECKING:
    from ollama_distributed.base.audit import AuditPage, AuditRecord, VerifyAnswer

_STYLE = {"ok": tables.GREEN, "begun": tables.DIM}


def register(app: typer.Typer) -> None:
    group = make_group("Who changed what, and whether that record is whole.")
    group.command("list", cls=Command)(list_records)
    group.command("verify", cls=Command)(verify)
    app.add_typer(group, name="audit", rich_help_panel=PANEL)


def list_records(
    ctx: typer.Context,
    actor: Annotated[str, typer.Option("--actor", metavar="KEY|USER", help="Whose.")] = "",
    action: Annotated[str, typer.Option("--action", metavar="TEXT", help="A part of the action.")] = "",
    about: Annotated[
        str, typer.Option("--object", metavar="TEXT", help="A part of what it was done to.")
    ] = "",
    result: Annotated[
        str, typer.Option("--result", metavar="RESULT", help="ok, begun or an error code.")
    ] = "",
    node: Annotated[str, typer.Option("--node", metavar="NODE", help="Of one node only.")] = "",
    request: Annotated[str, typer.Option("--request", metavar="ID", help="Of one request only.")] = "",
    since: Annotated[
        str | None, typer.Option("--since", metavar="TIME", help="Not older: 90s, 10m, 2h, 7d.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="At most so many.")] = 50,
    watch: live.Watch = False,
    every: live.Every = live.EVERY_S,
) -> None:
    """List what was changed, tried and refused on all nodes, the newest first.

    A change has two records: `begun`, written before it was made, and its result. A change that could not
    be recorded was not made.

    \b
    Examples:
      ollama-distributed audit list
      ollama-distributed audit list --action key --since 7d
      ollama-distributed audit list --result forbidden --output json
    """
    session: Session = ctx.obj
    try:
        begin = time.time() - humanize.length_s(since) if since else 0.0
    except ValueError as wrong:
        raise Problem(f"--since: {wrong}") from wrong
    with session.client(retries=0) as client:

        def ask() -> live.View:
            page = client.audit.page(
                limit=limit,
                since=begin,
                actor=actor,
                action=action,
                object=about,
                result=result,
                node=node,
                request_id=request,
            )
            return live.View(
                data=page,
                text=lambda look: _table(page, look),
                lines={f"{one.node}/{one.seq}": [one.action, one.result] for one in page.records},
            )

        if watch:
            live.watch(session, ask, every)
        else:
            live.show(session, ask())


def verify(ctx: typer.Context) -> None:
    """Have every node read its records and its copies of others' from the first to the last.

    Finds any record that was changed, taken out, put elsewhere or cut off, and says which; exit code 1 then.
    RECORDS are the first and the last that are left: those before were older than the setting audit_kept.

    \b
    Examples:
      ollama-distributed audit verify
    """
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        found = client.audit.verify()
    if session.output == "table":
        output.write(_verified(found, tables.look()))
    else:
        output.write(output.structured(found, session.output))
    if not found.ok:
        raise Problem("the audit log is not whole; copies on other nodes tell what was there")


def _table(page: AuditPage, look: Look) -> str:
    rows = page.records
    columns = [
        Column("WHEN", [Cell(_when(row)) for row in rows]),
        Column("WHO", [Cell(clean_line(row.actor or "-")) for row in rows]),
        Column("WHAT", [Cell(clean_line(row.action)) for row in rows]),
        Column("ON", [Cell(clean_line(row.object)) for row in rows], 2),
        Column("RESULT", [Cell(_result(row), _STYLE.get(row.result, tables.YELLOW)) for row in rows]),
        Column("FROM", [Cell(clean_line(row.source)) for row in rows], 3),
        Column("REQUEST", [Cell(clean_line(row.request_id)) for row in rows], 4),
        Column("RECORD", [Cell(f"{row.node}/{row.seq}") for row in rows], 5),
    ]
    text = tables.table(columns, look)
    if page.next is not None:
        text += "older ones: --limit, --since\n"
    if page.away:
        text += f"not asked, as they are away: {', '.join(map(clean_line, page.away))}\n"
    return text


def _when(row: AuditRecord) -> str:
    return datetime.fromtimestamp(row.at).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _result(row: AuditRecord) -> str:
    times = f" x{row.count}" if row.count > 1 else ""
    return f"{clean_line(row.result)}{times}{' !' if row.alarm else ''}"


def _verified(found: VerifyAnswer, look: Look) -> str:
    rows = found.chains
    columns = [
        Column("NODE", [Cell(clean_line(row.name)) for row in rows]),
        Column("AT", [Cell("its own disk" if row.at == row.name else clean_line(row.at)) for row in rows]),
        Column("RECORDS", [Cell(f"{row.first}-{row.records}" if row.records else "0") for row in rows]),
        Column(
            "", [Cell("damaged", tables.RED) if row.fault else Cell("whole", tables.GREEN) for row in rows]
        ),
        Column("HEAD", [Cell(row.head[:16]) for row in rows], 1),
    ]
    text = tables.table(columns, look)
    for row in rows:
        if row.fault:
            where = f"node {row.name}, record {row.fault_seq}, on the disk of {row.at}: {row.fault}"
            text += tables.note("! ", where, tables.RED, look)
    if found.away:
        text += f"not looked at, as they are away: {', '.join(map(clean_line, found.away))}\n"
    return text
