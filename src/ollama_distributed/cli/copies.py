"""`model status|remove`: on which nodes models lie, and off some of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from ollama_distributed.cli import humanize, live, output, tables
from ollama_distributed.cli.completion import model_names, node_names
from ollama_distributed.cli.confirm import Yes, confirm
from ollama_distributed.cli.group import Command
from ollama_distributed.cli.session import Session
from ollama_distributed.cli.tables import Cell, Column, Look
from ollama_distributed.cli.terminal import clean_line

if TYPE_CHECKING:
    from ollama_distributed.client.sync import SyncClient
    from ollama_distributed.client.wire import ModelStatus, Transfer

_ID_LENGTH = 12


def register(group: typer.Typer) -> None:
    for command in (status, remove):
        group.command(command.__name__, cls=Command)(command)


def status(
    ctx: typer.Context,
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", autocompletion=model_names, help="Default: all.")
    ] = None,
    watch: live.Watch = False,
    every: live.Every = live.EVERY_S,
) -> None:
    """Show on which nodes a model's files are, in which versions, and what is on its way.

    \b
    Examples:
      ollama-distributed model status
      ollama-distributed model status mymodel --watch
    """
    session: Session = ctx.obj
    with session.client(retries=0, timeout_s=live.PATIENCE_S) as client:
        if watch:
            live.watch(session, lambda: _view(client, model), every)
        else:
            live.show(session, _view(client, model))


def _view(client: SyncClient, model: str | None) -> live.View:
    if model is None:
        found = client.models.copies()
        return live.View(
            data=list(found),
            text=lambda look: _all_text(found, look),
            lines={one.model: [_nodes(one)] for one in found},
        )
    one = client.models.status(model)
    moving = [each for each in one.transfers if each.state == "running"]
    return live.View(
        data=one,
        text=lambda look: _text(one, moving, look),
        lines={place.name: [place.status, place.digest] for place in one.nodes}
        | {each.id: [each.state, _share(each)] for each in moving},
    )


def _all_text(found: Sequence[ModelStatus], look: Look) -> str:
    if not found:
        return "no node has a model\n"
    columns = [
        Column("MODEL", [Cell(one.model) for one in found]),
        Column("SIZE", [Cell(humanize.size(max(place.size for place in one.nodes))) for one in found], 1),
        Column("NODES", [Cell(str(len(one.nodes))) for one in found]),
        Column("ON", [Cell(_nodes(one)) for one in found], 2),
    ]
    return tables.table(columns, look)


def _nodes(one: ModelStatus) -> str:
    return ", ".join(place.name + ("" if place.current else " (another version)") for place in one.nodes)


def _text(one: ModelStatus, moving: Sequence[Transfer], look: Look) -> str:
    rows = [(place.name, place.status, place.digest[:_ID_LENGTH], place) for place in one.nodes]
    columns = [
        Column("NODE", [Cell(name) for name, *_ in rows]),
        Column("STATUS", [Cell(state) for _, state, *_ in rows]),
        Column("VERSION", [Cell(digest) for *_, digest, _ in rows]),
        Column("SIZE", [Cell(humanize.size(place.size)) for *_, place in rows]),
        Column("NOTE", [Cell("" if place.current else "another version") for *_, place in rows], 1),
    ]
    names = {place.node: place.name for place in one.nodes}
    lines = [
        f"on its way to {names.get(each.node, each.node)}: {_share(each)}, {each.id}\n" for each in moving
    ]
    return f"{one.model}\n" + tables.table(columns, look) + "".join(map(_plain, lines))


def _share(each: Transfer) -> str:
    return f"{100 * each.completed // each.total} %" if each.total else "0 %"


def _plain(line: str) -> str:
    return clean_line(line) + "\n"


def remove(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", autocompletion=model_names)],
    nodes: Annotated[list[str], typer.Argument(metavar="NODE...", autocompletion=node_names)],
    last_copy: Annotated[
        bool, typer.Option("--last-copy", help="Even if no other node holds it: the model is lost then.")
    ] = False,
    yes: Yes = False,
) -> None:
    """Delete a model on some nodes; others keep theirs. To remove it everywhere: rm.

    Refused, with the reason, for the last copy and for one that is loaded, on its way, pinned or placed
    there.

    \b
    Examples:
      ollama-distributed model remove mymodel gpu1 gpu2
    """
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        if last_copy:
            confirm(f"Remove '{model}' even if no other node holds it?", yes=yes)
        gone = client.models.remove(model, nodes, last_copy=last_copy)
    if session.output != "table":
        output.write(output.structured(list(gone), session.output))
        return
    for one in gone:
        freed = humanize.size(one.freed_bytes)
        output.note(f"{clean_line(model)} is gone from {clean_line(one.name)}, which freed {freed}")
