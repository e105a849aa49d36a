"""`queue`: who waits for a slot, and for how long."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ollama_distributed.cli import live, queue_view
from ollama_distributed.cli.cluster import PANEL
from ollama_distributed.cli.completion import node_names
from ollama_distributed.cli.group import Command
from ollama_distributed.cli.session import Session

if TYPE_CHECKING:
    from ollama_distributed.client.sync import SyncClient

Node = Annotated[
    str | None,
    typer.Argument(metavar="NODE", autocompletion=node_names, help="Its name or id. Default: all nodes."),
]


def register(app: typer.Typer) -> None:
    app.command("queue", cls=Command, rich_help_panel=PANEL)(queue)


def queue(
    ctx: typer.Context, node: Node = None, watch: live.Watch = False, every: live.Every = live.EVERY_S
) -> None:
    """Show which requests wait for a slot: at which model, of which class, and for how long.

    More urgent classes go first (interactive, normal, batch); inside a class keys take turns by tokens.
    ETA is the longest wait of a request of class normal that came now. A client asks for a class with the
    header X-Ollama-Priority, and for progress with X-Ollama-Progress: 1. Settings: max_queue, num_parallel,
    queue_per_model, queue_per_team, queue_per_key.

    \b
    Examples:
      ollama-distributed queue
      ollama-distributed queue gpu1 --watch
      ollama-distributed queue --output json
    """
    session: Session = ctx.obj
    with session.client(retries=0, timeout_s=live.PATIENCE_S) as client:
        if watch:
            live.watch(session, lambda: _shown(client, node or ""), every)
        else:
            live.show(session, _shown(client, node or ""))


def _shown(client: SyncClient, node: str) -> live.View:
    answer = client.queue(node)
    return live.View(
        data=answer,
        text=lambda look: queue_view.queue_text(answer, look),
        lines=queue_view.queue_lines(answer),
    )
