"""`events`: what happens, as it happens."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Annotated, cast

import typer

from ollama_distributed.cli import output
from ollama_distributed.cli.cluster import PANEL
from ollama_distributed.cli.group import Command
from ollama_distributed.cli.session import Session

if TYPE_CHECKING:
    from ollama_distributed.base.events import Channel
    from ollama_distributed.client.following import Event


def _channels() -> list[str]:
    from ollama_distributed.base.events import CHANNELS

    return list(CHANNELS)


Named = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CHANNEL...",
        autocompletion=_channels,
        help="queue, queues, nodes, metrics, alerts, transfers. Default: all that one may follow.",
    ),
]
Of = Annotated[str, typer.Option("--of", metavar="ID", help="Only of that request, node or transfer.")]


def register(app: typer.Typer) -> None:
    app.command("events", cls=Command, rich_help_panel=PANEL)(events)


def events(ctx: typer.Context, channels: Named = None, of: Of = "") -> None:
    """Follow what happens, until Ctrl-C: first what there is, then each change.

    queue: your requests that wait, with position and ETA (all requests, with an operator's key).
    queues: how many wait, by node and model. nodes: nodes that come, go or change. metrics: how busy they
    are. alerts: what somebody should see to, until it is over (a node that is away, no majority, a full
    disk, a model that keeps crashing). transfers: models on their way.

    \b
    Examples:
      ollama-distributed events
      ollama-distributed events queue transfers
      ollama-distributed events alerts
      ollama-distributed events nodes --of gpu1
      ollama-distributed events queue --output json
    """
    session: Session = ctx.obj
    known = _channels()
    for name in channels or ():
        if name not in known:
            raise typer.BadParameter(f"choose of {', '.join(known)}", param_hint="CHANNEL")
    with session.client() as client:
        wanted = channels or [row.name for row in client.channels().channels if row.name in known]
        try:
            with closing(client.events(*cast("list[Channel]", wanted), of=of)) as following:
                shown: dict[tuple[str, str], str] = {}
                for event in following:
                    _show(session, event, shown)
        except KeyboardInterrupt:
            return


def _show(session: Session, event: Event, shown: dict[tuple[str, str], str]) -> None:
    """`shown`: what was told last of each thing; what looks the same is not told to people again."""
    import msgspec

    from ollama_distributed.cli.events_view import event_line, told

    match session.output:
        case "json":
            output.write(msgspec.json.encode(event).decode() + "\n")
        case "yaml":
            output.write("---\n" + output.structured(event, "yaml"))
        case "table":
            name, text = (event.channel, event.id), told(event)
            if event.what == "ready" or (event.what == "changed" and shown.get(name) == text):
                return
            shown[name] = text
            if event.what == "gone":
                del shown[name]
            output.write(event_line(event))
