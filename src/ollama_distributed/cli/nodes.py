"""`node`: the machines of the cluster."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from ollama_distributed.cli import cluster_view, disk, live, output, placing
from ollama_distributed.cli.cluster import PANEL, make_group
from ollama_distributed.cli.completion import node_names
from ollama_distributed.cli.confirm import Yes, confirm
from ollama_distributed.cli.group import Command
from ollama_distributed.cli.session import Session
from ollama_distributed.cli.terminal import clean_line

if TYPE_CHECKING:
    from ollama_distributed.base.cluster import NodeRow
    from ollama_distributed.client.sync import SyncClient

Node = Annotated[str, typer.Argument(metavar="NODE", autocompletion=node_names, help="Its name or id.")]
Nodes = Annotated[
    list[str], typer.Argument(metavar="NODE...", autocompletion=node_names, help="Their names or ids.")
]


def register(app: typer.Typer) -> None:
    group = make_group("The machines of the cluster.")
    group.command("list", cls=Command)(list_nodes)
    group.command("ls", cls=Command, hidden=True)(list_nodes)
    group.command("show", cls=Command)(show)
    group.command("drain", cls=Command)(drain)
    group.command("undrain", cls=Command)(undrain)
    group.command("label", cls=Command)(label)
    group.command("remove", cls=Command)(remove)
    disk.register_nodes(group)
    app.add_typer(group, name="node", rich_help_panel=PANEL)


def list_nodes(ctx: typer.Context, watch: live.Watch = False, every: live.Every = live.EVERY_S) -> None:
    """List the nodes: status, role, CPU and memory in use, requests, models.

    \b
    Examples:
      ollama-distributed node list
      ollama-distributed node list --watch
      ollama-distributed node list --output json
    """
    session: Session = ctx.obj
    with session.client(retries=0, timeout_s=live.PATIENCE_S) as client:
        if watch:
            live.watch(session, lambda: _listed(client), every)
        else:
            live.show(session, _listed(client))


def _listed(client: SyncClient) -> live.View:
    rows = client.nodes.list()
    now = time.time()
    return live.View(
        data=rows,
        text=lambda look: cluster_view.nodes_text(rows, now, look),
        lines={row.name: cluster_view.node_line(row) for row in rows},
    )


def show(ctx: typer.Context, node: Node, watch: live.Watch = False, every: live.Every = live.EVERY_S) -> None:
    """Show all about one node: hardware, engines, labels, models, usage.

    \b
    Examples:
      ollama-distributed node show gpu1
    """
    session: Session = ctx.obj
    with session.client(retries=0, timeout_s=live.PATIENCE_S) as client:
        if watch:
            live.watch(session, lambda: _shown(client, node), every)
        else:
            live.show(session, _shown(client, node))


def _shown(client: SyncClient, node: str) -> live.View:
    row = client.nodes.get(node)
    now = time.time()
    return live.View(
        data=row,
        text=lambda look: cluster_view.node_text(row, now, look),
        lines={row.name: cluster_view.node_line(row)},
    )


def drain(
    ctx: typer.Context,
    nodes: Nodes,
    wait: Annotated[
        bool,
        typer.Option("--wait/--no-wait", help="Until its models are elsewhere; Ctrl-C leaves it to them."),
    ] = False,
) -> None:
    """Give nodes no new work and bring what they have elsewhere. Do it before you stop a machine.

    Running answers may end within `drain_timeout`; then other nodes go on with them, unseen by their
    clients, and the node's models are unloaded. A node may also rest by itself, while its owner needs the
    machine (settings `polite_*`); `node list` says why, and what is said by hand stands above it.

    \b
    Examples:
      ollama-distributed node drain gpu1 --wait
    """
    told = "drains: it gets no new requests, and its models move (model places)"
    _each(ctx, nodes, lambda client, node: client.nodes.drain(node), told)
    if wait:
        session: Session = ctx.obj
        with session.client() as client:
            placing.until_in_place(client)


def undrain(ctx: typer.Context, nodes: Nodes) -> None:
    """Give nodes work again. One that rests by its own policy works until its next rest.

    \b
    Examples:
      ollama-distributed node undrain gpu1
    """
    _each(ctx, nodes, lambda client, node: client.nodes.undrain(node), "gets requests again")


def label(
    ctx: typer.Context,
    node: Node,
    labels: Annotated[list[str], typer.Argument(metavar="NAME=VALUE...", help="NAME- takes a label away.")],
) -> None:
    """Set or take away labels of a node.

    \b
    Examples:
      ollama-distributed node label gpu1 zone=a rack=7
      ollama-distributed node label gpu1 rack-
    """
    wanted: dict[str, str | None] = {}
    for text in labels:
        name, equals, value = text.partition("=")
        if equals and name:
            wanted[name] = value
        elif name.endswith("-") and len(name) > 1:
            wanted[name[:-1]] = None
        else:
            raise typer.BadParameter(f"{text!r}: write NAME=VALUE, or NAME- to take it away")
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        row = client.nodes.label(node, wanted)
    _told(session, [row])
    shown = ", ".join(f"{name}={value}" for name, value in sorted(row.labels.items())) or "none"
    output.note(f"labels of {clean_line(row.name)}: {clean_line(shown)}")


def remove(
    ctx: typer.Context,
    nodes: Nodes,
    force: Annotated[bool, typer.Option("--force", help="Even a node that is online.")] = False,
    yes: Yes = False,
) -> None:
    """Remove nodes for ever: their certificates are revoked everywhere within seconds.

    A removed machine can only come back with a new join token.

    \b
    Examples:
      ollama-distributed node remove gpu1
      ollama-distributed node remove gpu1 --force --yes
    """
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        rows = [client.nodes.get(node) for node in nodes]
        for row in rows:
            confirm(f"Remove {row.name} from the cluster (it is {row.status})?", yes=yes)
            client.nodes.remove(row.id, force=force)
            output.note(f"removed {clean_line(row.name)}")


def _each(
    ctx: typer.Context, nodes: list[str], change: Callable[[SyncClient, str], NodeRow], done: str
) -> None:
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        rows = [change(client, node) for node in nodes]
    _told(session, rows)
    for row in rows:
        output.note(f"{clean_line(row.name)} {done}")


def _told(session: Session, rows: list[NodeRow]) -> None:
    """The changed nodes as data, where data is wanted."""
    if session.output != "table":
        output.write(output.structured(rows[0] if len(rows) == 1 else rows, session.output))
