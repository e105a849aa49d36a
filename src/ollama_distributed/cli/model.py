"""`model`: where models are in the cluster; `transfers`: those on their way."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from ollama_distributed.cli import bundles, copies, disk, humanize, live, output, places, tables
from ollama_distributed.cli.bars import bars
from ollama_distributed.cli.cluster import make_group
from ollama_distributed.cli.completion import model_names, node_names
from ollama_distributed.cli.group import Command
from ollama_distributed.cli.library import PANEL
from ollama_distributed.cli.problem import Problem
from ollama_distributed.cli.session import Session
from ollama_distributed.cli.tables import Cell, Column, Look
from ollama_distributed.cli.terminal import clean_line

if TYPE_CHECKING:
    from rich.progress import TaskID

    from ollama_distributed.client.sync import SyncClient
    from ollama_distributed.client.wire import Transfer

LOOK_S = 0.3
"""Between two looks at transfers that someone waits for."""
_STYLES: Mapping[str, str] = {
    "running": tables.CYAN,
    "done": tables.GREEN,
    "failed": tables.RED,
    "cancelled": tables.YELLOW,
}


def register(app: typer.Typer) -> None:
    group = make_group("Where models are in the cluster.")
    group.command("distribute", cls=Command)(distribute)
    bundles.register(group)
    copies.register(group)
    places.register(group)
    disk.register_models(group)
    app.add_typer(group, name="model", rich_help_panel=PANEL)
    app.command("transfers", cls=Command, rich_help_panel=PANEL)(transfers)


def distribute(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", autocompletion=model_names)],
    nodes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NODE]...",
            autocompletion=node_names,
            help="Their names or ids. Default: all that lack it.",
        ),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Until it is there.")] = True,
) -> None:
    """Copy a model to nodes; they fetch it from those that have it and from each other.

    Ctrl-C leaves the copies to themselves: see `transfers`.

    \b
    Examples:
      ollama-distributed model distribute mymodel
      ollama-distributed model distribute mymodel gpu1 gpu2 --no-wait
    """
    session: Session = ctx.obj
    with session.client() as client:
        begun = client.models.distribute(model, nodes or ())
        if wait:
            begun = _followed(client, begun, _names(client))
        names = _names(client)
    if session.output != "table":
        output.write(output.structured(list(begun), session.output))
    elif not begun:
        output.note(f"every node has '{clean_line(model)}' already")
    for one in begun:
        if session.output == "table":
            output.note(_told(one, names))
    if any(one.state in ("failed", "cancelled") for one in begun):
        raise Problem(f"'{model}' did not get to every node")


def transfers(
    ctx: typer.Context,
    watch: live.Watch = False,
    every: live.Every = live.EVERY_S,
    cancel: Annotated[
        str | None, typer.Option("--cancel", metavar="ID", help="End this one; what came is kept.")
    ] = None,
) -> None:
    """List the models on their way: how far, how fast, from where.

    \b
    Examples:
      ollama-distributed transfers --watch
      ollama-distributed transfers --cancel ID
    """
    session: Session = ctx.obj
    with session.client(retries=0, timeout_s=live.PATIENCE_S) as client:
        if cancel is not None:
            client.models.cancel_transfer(cancel)
            output.note(f"cancelled {clean_line(cancel)}")
        elif watch:
            live.watch(session, lambda: _listed(client), every)
        else:
            live.show(session, _listed(client))


def _listed(client: SyncClient) -> live.View:
    found = client.models.transfers()
    names = _names(client)
    return live.View(
        data=list(found),
        text=lambda look: _text(found, names, look),
        lines={one.id: _cells(one, names) for one in found},
    )


def _text(found: Sequence[Transfer], names: Mapping[str, str], look: Look) -> str:
    if not found:
        return "no models are on their way\n"
    columns = [
        Column("MODEL", [Cell(one.model) for one in found]),
        Column("TO", [Cell(names.get(one.node, one.node)) for one in found]),
        Column("STATE", [Cell(one.state, _STYLES.get(one.state, "")) for one in found]),
        Column(
            "DONE", [tables.share(one.completed / one.total if one.total else None, look) for one in found]
        ),
        Column("SIZE", [Cell(humanize.size(one.total)) for one in found], 2),
        Column("RATE", [Cell(_rate(one)) for one in found], 1),
        Column("LEFT", [Cell(_left(one)) for one in found], 3),
        Column("FROM", [Cell(_from(one, names)) for one in found], 5),
        Column("ID", [Cell(one.id, tables.DIM) for one in found], 4),
    ]
    errors = [
        tables.note("! ", f"{one.model} to {names.get(one.node, one.node)}: {one.error}", tables.RED, look)
        for one in found
        if one.error
    ]
    return tables.table(columns, look) + "".join(errors)


def _cells(one: Transfer, names: Mapping[str, str]) -> list[str]:
    """Of a watch into a pipe: what changes with each tenth, not with each byte."""
    tenths = 10 * (10 * one.completed // one.total) if one.total else 0
    return [one.model, names.get(one.node, one.node), one.state, f"{tenths}%", one.error]


def _rate(one: Transfer) -> str:
    return f"{humanize.size(int(one.rate))}/s" if one.state == "running" and one.rate else ""


def _left(one: Transfer) -> str:
    return humanize.age(one.eta_s) if one.state == "running" and one.eta_s is not None else ""


def _from(one: Transfer, names: Mapping[str, str]) -> str:
    if one.kind == "download":
        return "registry"
    givers = sorted(one.peers, key=lambda node: -one.peers[node])
    shown = ", ".join(names.get(node, node) for node in givers[:3])
    more = f" +{len(givers) - 3}" if len(givers) > 3 else ""
    lied = f" (wrong bytes from {', '.join(names.get(node, node) for node in one.dropped)})"
    return shown + more + (lied if one.dropped else "")


def _told(one: Transfer, names: Mapping[str, str]) -> str:
    where = clean_line(names.get(one.node, one.node))
    match one.state:
        case "done":
            came = sum(one.peers.values())
            return f"{where} has it ({humanize.size(came)} came from {len(one.peers)} nodes)"
        case "running":
            return f"{where} fetches it: {one.id}"
        case _:
            return f"{where}: {one.state} {clean_line(one.error)}".rstrip()


def _names(client: SyncClient) -> Mapping[str, str]:
    return {row.id: row.name for row in client.nodes.list()}


def _followed(client: SyncClient, begun: Sequence[Transfer], names: Mapping[str, str]) -> list[Transfer]:
    """Show a bar for each until all have ended."""
    known = {one.id: one for one in begun}
    with bars() as progress:
        tasks: dict[str, TaskID] = {
            one.id: progress.add_task(clean_line(names.get(one.node, one.node)), total=None) for one in begun
        }
        while running := [one for one in known.values() if one.state == "running"]:
            time.sleep(LOOK_S)
            for one in running:
                now = known[one.id] = client.models.transfer(one.id)
                progress.update(tasks[one.id], total=now.total or None, completed=now.completed)
    return list(known.values())
