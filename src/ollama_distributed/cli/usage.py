"""`usage`: who used what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, cast

import typer

from ollama_distributed.cli import live, output, usage_view
from ollama_distributed.cli.group import Command
from ollama_distributed.cli.keys import PANEL
from ollama_distributed.cli.problem import Problem
from ollama_distributed.cli.session import Session

if TYPE_CHECKING:
    from ollama_distributed.base.usage import By
    from ollama_distributed.client.sync import SyncClient

GROUPS: tuple[By, ...] = ("key", "team", "model", "node", "day", "hour")
"""As `base.usage.GROUPS`; what a command's help needs must not import what its work does."""


def register(app: typer.Typer) -> None:
    app.command("usage", cls=Command, rich_help_panel=PANEL)(usage)


def usage(
    ctx: typer.Context,
    by: Annotated[
        str,
        typer.Option(
            "--by", metavar="WHAT,...", help=f"What the rows are: {', '.join(GROUPS)}, or several of them."
        ),
    ] = "day",
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="DAY", help="First day, e.g. 2026-11-23, UTC. Default: 30 days ago."),
    ] = None,
    end: Annotated[
        str | None, typer.Option("--to", metavar="DAY", help="Last day, included. Default: today.")
    ] = None,
    key: Annotated[str, typer.Option("--key", metavar="ID", help="Only of this key.")] = "",
    team: Annotated[str, typer.Option("--team", metavar="NAME", help="Only of this team.")] = "",
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    watch: live.Watch = False,
    every: live.Every = live.EVERY_S,
) -> None:
    """Show tokens, requests, time, energy and money: who used what, in the whole cluster.

    Requests without a key stand under their role (local). Prices, the price of a kilowatt-hour and what a
    node draws are settings: prices, currency, kwh_price, power_watts. Limits belong to policies.

    \b
    Examples:
      ollama-distributed usage
      ollama-distributed usage --by key,model --from 2026-11-01
      ollama-distributed usage --by team --csv > november.csv
      ollama-distributed usage --by key --output json
    """
    session: Session = ctx.obj
    names = tuple(part.strip() for part in by.split(",") if part.strip())
    if any(name not in GROUPS for name in names) or len(set(names)) != len(names):
        raise Problem(f"--by takes each of {', '.join(GROUPS)} once, with commas between")
    groups = cast("tuple[By, ...]", names)
    with session.client(retries=0, timeout_s=30.0) as client:
        if csv:
            output.write(client.usage.csv(by=groups, start=start, end=end, key=key, team=team))
        elif watch:
            live.watch(session, lambda: _shown(client, groups, start, end, key, team), every)
        else:
            live.show(session, _shown(client, groups, start, end, key, team))


def _shown(
    client: SyncClient, by: tuple[By, ...], start: str | None, end: str | None, key: str, team: str
) -> live.View:
    answer = client.usage.get(by=by, start=start, end=end, key=key, team=team)
    return live.View(
        data=answer,
        text=lambda look: usage_view.usage_text(answer, look),
        lines=usage_view.usage_lines(answer),
    )
