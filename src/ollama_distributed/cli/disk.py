"""`node disk`, `node scrub`, `model evict`: the disks that models are on."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from ollama_distributed.cli import disk_view, humanize, live, output
from ollama_distributed.cli.bars import bars
from ollama_distributed.cli.completion import model_names, node_names
from ollama_distributed.cli.confirm import Yes, confirm
from ollama_distributed.cli.group import Command
from ollama_distributed.cli.problem import Problem
from ollama_distributed.cli.session import Session
from ollama_distributed.cli.terminal import clean_line

if TYPE_CHECKING:
    from ollama_distributed.base.disk import DiskAnswer
    from ollama_distributed.client.sync import SyncClient

LOOK_S = 0.3
"""Between two looks at a scrub that someone waits for."""
Node = Annotated[
    str | None,
    typer.Argument(metavar="NODE", autocompletion=node_names, help="Its name or id. Default: this one."),
]


def register_nodes(group: typer.Typer) -> None:
    group.command("disk", cls=Command)(disk)
    group.command("scrub", cls=Command)(scrub)


def register_models(group: typer.Typer) -> None:
    group.command("evict", cls=Command)(evict)


def disk(
    ctx: typer.Context, node: Node = None, watch: live.Watch = False, every: live.Every = live.EVERY_S
) -> None:
    """Show how full a node's disk is, and which models may go when room is needed.

    Models stand in the order in which they would go. One stays while it is loaded, on its way, pinned or
    placed there, and while no other node holds it. Settings: disk_quota, disk_low_water.

    \b
    Examples:
      ollama-distributed node disk
      ollama-distributed node disk gpu1 --watch
      ollama-distributed config set disk_quota=80%
    """
    session: Session = ctx.obj
    with session.client(retries=0, timeout_s=live.PATIENCE_S) as client:
        chosen = _node(client, node)
        if watch:
            live.watch(session, lambda: _shown(client, chosen), every)
        else:
            live.show(session, _shown(client, chosen))


def _shown(client: SyncClient, node: str) -> live.View:
    answer = client.nodes.disk(node)
    now = time.time()
    return live.View(
        data=answer,
        text=lambda look: disk_view.disk_text(answer, now, look),
        lines=disk_view.disk_lines(answer),
    )


def scrub(
    ctx: typer.Context,
    node: Node = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Until all was read.")] = True,
) -> None:
    """Read all files of a node's models again: are they still what they were?

    A damaged file is taken away and fetched again from nodes that hold it; until then its models cannot be
    used there. Answers to people come first. Nodes do this by themselves now and then (scrub_every).

    \b
    Examples:
      ollama-distributed node scrub
      ollama-distributed node scrub gpu1 --no-wait
    """
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        chosen = _node(client, node)
        client.nodes.scrub(chosen)
        answer = _followed(client, chosen) if wait else client.nodes.disk(chosen)
    row = answer.scrub
    if session.output != "table":
        output.write(output.structured(row, session.output))
    elif row.running:
        output.note(f"{clean_line(answer.name)} reads its files; see: ollama-distributed node disk")
    else:
        output.note(f"{row.files} files, {humanize.size(row.done_bytes)}, {row.corrupt} damaged")
    lost = [clean_line(model.model) for model in answer.models if model.damaged]
    if lost and not row.running:
        raise Problem(f"damaged, and no other node holds them: {', '.join(lost)}; fetch them again (pull)")


def _followed(client: SyncClient, node: str) -> DiskAnswer:
    """Show a bar until it has ended."""
    with bars() as progress:
        answer = client.nodes.disk(node)
        task = progress.add_task(clean_line(answer.name), total=None)
        while answer.scrub.running:
            time.sleep(LOOK_S)
            answer = client.nodes.disk(node)
            progress.update(task, total=answer.scrub.total_bytes or None, completed=answer.scrub.done_bytes)
    return answer


def evict(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", autocompletion=model_names)],
    node: Annotated[
        str | None,
        typer.Option(
            "--node", metavar="NODE", autocompletion=node_names, help="Its name or id. Default: this one."
        ),
    ] = None,
    last_copy: Annotated[
        bool, typer.Option("--last-copy", help="Even if no other node holds it: the model is lost then.")
    ] = False,
    yes: Yes = False,
) -> None:
    """Let a node's copy of a model go, to free its disk; other nodes keep theirs.

    Refused, with the reason, for the last copy and for one that is loaded, on its way, pinned or placed
    there. To remove a model everywhere: rm.

    \b
    Examples:
      ollama-distributed model evict mymodel --node gpu1
      ollama-distributed model evict mymodel --last-copy --yes
    """
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        if last_copy:
            confirm(f"Let '{model}' go even if no other node holds it?", yes=yes)
        done = client.models.evict(model, node or "", last_copy=last_copy)
    if session.output != "table":
        output.write(output.structured(done, session.output))
    else:
        freed = humanize.size(done.freed_bytes)
        output.note(f"{clean_line(model)} is gone from {clean_line(done.name)}, which freed {freed}")


def _node(client: SyncClient, node: str | None) -> str:
    return client.cluster.status().node if node is None else node
