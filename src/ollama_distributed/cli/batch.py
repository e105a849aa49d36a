"""`batch submit|list|show|cancel|results`: many requests at once, answered in idle slots."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from ollama_distributed.cli import humanize, live, output, tables
from ollama_distributed.cli.bars import bars
from ollama_distributed.cli.cluster import make_group
from ollama_distributed.cli.confirm import Yes, confirm
from ollama_distributed.cli.group import Command
from ollama_distributed.cli.library import PANEL
from ollama_distributed.cli.problem import Problem
from ollama_distributed.cli.session import Session
from ollama_distributed.cli.tables import Cell, Column, Look
from ollama_distributed.cli.terminal import clean_line

if TYPE_CHECKING:
    from ollama_distributed.base.batches import Batch, BatchList
    from ollama_distributed.client.sync import SyncClient

_STDIO = "-"
_LOOK_S = 0.5
"""Between two looks at a batch that someone waits for."""
_STYLE = {"completed": tables.GREEN, "failed": tables.RED, "expired": tables.RED, "cancelled": tables.YELLOW}

Name = Annotated[str, typer.Argument(metavar="BATCH", help="Its id, from `batch list`.")]
Wait = Annotated[bool, typer.Option("--wait", help="Show a bar until it is over; Ctrl-C leaves it running.")]


def register(app: typer.Typer) -> None:
    group = make_group("Many requests that nobody waits for, answered in idle slots.")
    for command in (submit, list_batches, show, cancel, results):
        name = "list" if command is list_batches else command.__name__
        group.command(name, cls=Command)(command)
    app.add_typer(group, name="batch", rich_help_panel=PANEL)


def submit(
    ctx: typer.Context,
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="One JSON object a line; - reads it from stdin.")
    ],
    endpoint: Annotated[
        str, typer.Option("--endpoint", metavar="PATH", help="The `url` of every line.")
    ] = "/v1/chat/completions",
    window: Annotated[
        str, typer.Option("--window", metavar="TIME", help="Until when: 30m, 24h, 7d. Then it expires.")
    ] = "24h",
    metadata: Annotated[
        list[str] | None,
        typer.Option("--metadata", metavar="NAME=VALUE", help="Kept with it; several times."),
    ] = None,
    wait: Wait = False,
) -> None:
    """Send a file of requests, as OpenAI's batches have it, and have them answered in idle slots.

    A line is {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": …}}.
    Requests of people come first; a batch takes what they leave. It goes on when the node starts again.

    \b
    Examples:
      ollama-distributed batch submit requests.jsonl
      ollama-distributed batch submit requests.jsonl --window 7d --metadata run=3 --wait
      ollama-distributed batch results BATCH -o results.jsonl
    """
    session: Session = ctx.obj
    said = dict(_pair(one) for one in metadata or ())
    source: bytes | Path = sys.stdin.buffer.read() if file == _STDIO else Path(file)
    with session.client() as client:
        with bars() as progress:
            task = progress.add_task(f"sending {clean_line(file)}", total=None)
            sent = client.files.upload(
                source, on_progress=lambda done, total: progress.update(task, completed=done, total=total)
            )
        batch = client.batches.create(sent.id, endpoint, completion_window=window, metadata=said or None)
        _shown(session, _waited(client, batch) if wait else batch, wait=wait)


def list_batches(ctx: typer.Context, watch: live.Watch = False, every: live.Every = live.EVERY_S) -> None:
    """List your batches of all nodes, newest first.

    \b
    Examples:
      ollama-distributed batch list
      ollama-distributed batch list --watch
    """
    session: Session = ctx.obj
    with session.client(retries=0, timeout_s=live.PATIENCE_S) as client:

        def ask() -> live.View:
            found = client.batches.list()
            return live.View(
                data=found,
                text=lambda look: _table(found, look),
                lines={batch.id: [batch.status, _done(batch)] for batch in found.data},
            )

        if watch:
            live.watch(session, ask, every)
        else:
            live.show(session, ask())


def show(ctx: typer.Context, batch: Name, wait: Wait = False) -> None:
    """Show how far a batch is, and what is wrong with its file if it failed.

    \b
    Examples:
      ollama-distributed batch show BATCH
      ollama-distributed batch show BATCH --wait
    """
    session: Session = ctx.obj
    with session.client() as client:
        found = client.batches.get(batch)
        _shown(session, _waited(client, found) if wait else found, wait=wait)


def cancel(ctx: typer.Context, batch: Name, yes: Yes = False) -> None:
    """End a batch. The results that are there stay.

    \b
    Examples:
      ollama-distributed batch cancel BATCH
    """
    session: Session = ctx.obj
    with session.client() as client:
        confirm(f"Cancel {batch}?", yes=yes)
        _shown(session, client.batches.cancel(batch))


def results(
    ctx: typer.Context,
    batch: Name,
    file: Annotated[
        str, typer.Option("--file", "-o", metavar="FILE", help="Where to; - writes to stdout.")
    ] = _STDIO,
    errors: Annotated[bool, typer.Option("--errors", help="The lines that failed instead.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write the results of a batch: one JSON object a line, in the order in which they were done.

    \b
    Examples:
      ollama-distributed batch results BATCH -o results.jsonl
      ollama-distributed batch results BATCH | jq -r '.response.body.choices[0].message.content'
      ollama-distributed batch results BATCH --errors
    """
    session: Session = ctx.obj
    target: Path | BinaryIO = sys.stdout.buffer if file == _STDIO else Path(file)
    if isinstance(target, Path) and target.exists() and not force:
        raise Problem(f"{target} is there already; --force replaces it")
    with session.client() as client:
        found = client.batches.get(batch)
        file_id = found.error_file_id if errors else found.output_file_id
        if file_id is None:
            what = "no line that failed" if errors else "no results"
            raise Problem(f"{clean_line(batch)} is {found.status} and has {what}")
        size = client.files.save(file_id, target)
    if file != _STDIO:
        output.note(f"wrote {humanize.size(size)} to {clean_line(file)}")


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise Problem(f"--metadata is NAME=VALUE, not {text!r}")
    return name, value


def _waited(client: SyncClient, batch: Batch) -> Batch:
    from ollama_distributed.base.batches import FINAL

    with bars(count=True) as progress:
        task = progress.add_task(batch.status, total=None)
        while batch.status not in FINAL:
            time.sleep(_LOOK_S)
            batch = client.batches.get(batch.id)
            counts = batch.request_counts
            done = counts.completed + counts.failed
            progress.update(task, description=batch.status, completed=done, total=counts.total or None)
    return batch


def _shown(session: Session, batch: Batch, *, wait: bool = False) -> None:
    if session.output == "table":
        output.write(_facts(batch))
    else:
        output.write(output.structured(batch, session.output))
    if wait and batch.status != "completed":
        raise Problem(f"the batch is {batch.status}")


def _facts(batch: Batch) -> str:
    facts = [
        ("batch", Cell(batch.id)),
        ("status", Cell(batch.status, _STYLE.get(batch.status, ""))),
        ("requests", Cell(_done(batch))),
        ("endpoint", Cell(batch.endpoint)),
        ("node", Cell(batch.node)),
        ("input", Cell(batch.input_file_id)),
        ("results", Cell(batch.output_file_id or "")),
        ("errors", Cell(batch.error_file_id or "")),
        *((clean_line(name), Cell(value)) for name, value in (batch.metadata or {}).items()),
    ]
    text = tables.facts(facts, tables.look())
    for fault in batch.errors.data if batch.errors else ():
        where = f"line {fault.line}: " if fault.line else ""
        text += f"! {where}{clean_line(fault.message)}\n"
    return text


def _done(batch: Batch) -> str:
    counts = batch.request_counts
    failed = f", {counts.failed} failed" if counts.failed else ""
    return f"{counts.completed + counts.failed}/{counts.total}{failed}"


def _table(found: BatchList, look: Look) -> str:
    now = time.time()
    rows = found.data
    columns = [
        Column("BATCH", [Cell(row.id) for row in rows]),
        Column("STATUS", [Cell(row.status, _STYLE.get(row.status, "")) for row in rows]),
        Column("REQUESTS", [Cell(_done(row)) for row in rows]),
        Column("ENDPOINT", [Cell(row.endpoint) for row in rows], 3),
        Column("NODE", [Cell(clean_line(row.node)) for row in rows], 2),
        Column("CREATED", [Cell(f"{humanize.age(now - row.created_at)} ago") for row in rows], 1),
    ]
    text = tables.table(columns, look)
    if found.away:
        text += f"not asked, as they are away: {', '.join(map(clean_line, found.away))}\n"
    return text
