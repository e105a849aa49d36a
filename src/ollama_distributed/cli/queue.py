"""`queue`: who waits for a slot, and for how long."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, cast

import typer

from ollama_distributed.cli import live, queue_view
from ollama_distributed.cli.cluster import PANEL
from ollama_distributed.cli.completion import node_names
from ollama_distributed.cli.group import Command
from ollama_distributed.cli.session import Session

if TYPE_CHECKING:
    from collections.abc import Generator

    from ollama_distributed.base.queue import QueueAnswer, QueueNode
    from ollama_distributed.client.following import Event
    from ollama_distributed.client.sync import SyncClient

SETTLED_S = 0.1
"""What changed at several nodes comes together; then it is shown."""

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
            live.watch(session, _Followed(client, node or ""), every)
        else:
            live.show(session, _shown(client, node or ""))


class _Followed:
    """The queues as they are told: called again, it waits until something changed."""

    def __init__(self, client: SyncClient, node: str) -> None:
        self._client = client
        self._node = node
        self._rows: dict[str, QueueNode] = {}
        self._events: Generator[Event, None, None] | None = None

    def __call__(self) -> live.View:
        from ollama_distributed.base.queue import QueueAnswer
        from ollama_distributed.client.errors import ClientError

        changed = False
        try:
            if self._events is None:
                self._events = self._begun()
            for event in self._events:
                if event.what in ("idle", "ready"):
                    if changed or event.what == "ready":
                        break
                    continue
                changed = True
                if event.what == "gone":
                    self._rows.pop(event.id, None)
                else:
                    self._rows[event.id] = cast("QueueNode", event.data)
        except ClientError:
            self._events = None
            raise
        return _view(QueueAnswer(nodes=tuple(self._rows.values())))

    def _begun(self) -> Generator[Event, None, None]:
        self._rows.clear()
        # A name that no node has is refused here, with those that there are.
        of = self._client.queue(self._node).nodes[0].node if self._node else ""
        return self._client.events("queues", of=of, idle_s=SETTLED_S)


def _shown(client: SyncClient, node: str) -> live.View:
    return _view(client.queue(node))


def _view(answer: QueueAnswer) -> live.View:
    return live.View(
        data=answer,
        text=lambda look: queue_view.queue_text(answer, look),
        lines=queue_view.queue_lines(answer),
    )
