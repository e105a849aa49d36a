"""`config`: the settings that hold in the whole cluster."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ollama_distributed.cli import config_view, output, tables
from ollama_distributed.cli.cluster import PANEL, make_group
from ollama_distributed.cli.completion import set_names
from ollama_distributed.cli.confirm import Yes, confirm
from ollama_distributed.cli.group import Command
from ollama_distributed.cli.problem import Problem
from ollama_distributed.cli.session import Session

if TYPE_CHECKING:
    from ollama_distributed.base.cluster import ConfigAnswer

AGAIN_S = 1.0
"""A watch whose server went away asks again after so long."""
SILENCE_S = 60.0
"""The server says something at least four times in this time."""

Comment = Annotated[str, typer.Option("--comment", "-m", help="Why; kept in the history.")]


def register(app: typer.Typer) -> None:
    group = make_group("Settings that hold in the whole cluster, at once, without a restart.")
    group.command("get", cls=Command)(get)
    group.command("set", cls=Command)(set_values)
    group.command("unset", cls=Command)(unset)
    group.command("watch", cls=Command)(watch)
    group.command("history", cls=Command)(history)
    group.command("rollback", cls=Command)(rollback)
    app.add_typer(group, name="config", rich_help_panel=PANEL)


def get(
    ctx: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", autocompletion=set_names, help="Only this one's value.")
    ] = None,
) -> None:
    """Print the cluster's settings. What is not there is each node's own (see: serve -h).

    \b
    Examples:
      ollama-distributed config get
      ollama-distributed config get keep_alive
    """
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        found = client.config.get()
    if name is not None:
        if name not in found.values:
            raise Problem(f"the cluster does not set {name}: each node uses its own setting")
        value = found.values[name]
        text = config_view.value_text(value) + "\n"
        output.write(text if session.output == "table" else output.structured(value, session.output))
    elif session.output != "table":
        output.write(output.structured(found, session.output))
    else:
        output.write(config_view.config_text(found, time.time(), tables.look()))


def set_values(
    ctx: typer.Context,
    values: Annotated[
        list[str],
        typer.Argument(metavar="NAME=VALUE...", help="VALUE as in a settings file: 10m, true, 4, [a, b]."),
    ],
    comment: Comment = "",
    version: Annotated[
        int | None, typer.Option("--if-version", metavar="N", help="Only while it stands at version N.")
    ] = None,
) -> None:
    """Change settings of all nodes at once. They are checked first; all apply or none.

    \b
    Examples:
      ollama-distributed config set keep_alive=10m
      ollama-distributed config set num_parallel=8 max_queue=1024 --comment "busy week"
    """
    wanted: dict[str, Any] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{text!r}: write NAME=VALUE")
        wanted[name] = config_view.value_of(value)
    _change(ctx.obj, wanted, version, comment)


def unset(
    ctx: typer.Context,
    names: Annotated[list[str], typer.Argument(metavar="NAME...", autocompletion=set_names)],
    comment: Comment = "",
) -> None:
    """Take settings out of the cluster's: each node uses its own again.

    \b
    Examples:
      ollama-distributed config unset keep_alive
    """
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        known = client.config.get()
    for name in names:
        if name not in known.values:
            raise Problem(f"the cluster does not set {name}; nothing was changed")
    _change(session, dict.fromkeys(names), known.version, comment)


def _change(session: Session, values: Mapping[str, Any], version: int | None, comment: str) -> None:
    with session.client(retries=0) as client:
        before = client.config.get()
        after = client.config.set(values, version=version, comment=comment)
    _told(session, before, after)


def history(ctx: typer.Context) -> None:
    """List every version of the settings, newest first, with what each changed.

    \b
    Examples:
      ollama-distributed config history
    """
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        versions = client.config.history()
    if session.output != "table":
        output.write(output.structured(versions, session.output))
    elif versions:
        output.write(config_view.history_text(versions, time.time(), tables.look()))
    else:
        output.note("the cluster never set anything")


def rollback(
    ctx: typer.Context,
    version: Annotated[int, typer.Argument(metavar="VERSION", help="From `config history`.")],
    comment: Comment = "",
    yes: Yes = False,
) -> None:
    """Put back what an older version held, as a new version.

    \b
    Examples:
      ollama-distributed config rollback 3
    """
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        versions = client.config.history()
        then = next((one for one in versions if one.version == version), None)
        if then is None:
            kept = ", ".join(str(one.version) for one in versions) or "none"
            raise Problem(f"there is no version {version}; there are: {kept}")
        changes = config_view.changes(versions[0].values, then.values)
        if not changes:
            output.note(f"version {version} holds what holds now: nothing was changed")
            return
        confirm(f"Put back version {version} ({'; '.join(changes)})?", yes=yes)
        after = client.config.rollback(version, comment=comment)
    _told(session, versions[0], after)


def _told(session: Session, before: ConfigAnswer, after: ConfigAnswer) -> None:
    if session.output != "table":
        output.write(output.structured(after, session.output))
        return
    for change in config_view.changes(before.values, after.values):
        output.note(change)
    output.note(f"version {after.version} holds on all nodes now")


def watch(ctx: typer.Context) -> None:
    """Print the settings now, then each change as it happens, until Ctrl-C.

    \b
    Examples:
      ollama-distributed config watch
      ollama-distributed config watch --output json
    """
    session: Session = ctx.obj
    try:
        _watch(session)
    except KeyboardInterrupt:
        return


def _watch(session: Session) -> None:
    import msgspec

    from ollama_distributed.client.errors import ClientError

    shown: ConfigAnswer | None = None
    away = False
    with session.client(retries=0, timeout_s=SILENCE_S) as client:
        while True:
            try:
                for config in client.config.watch():
                    away = False
                    if shown is not None and config.version == shown.version:
                        continue  # the watch began anew
                    match session.output:
                        case "json":
                            output.write(msgspec.json.encode(config).decode() + "\n")
                        case "yaml":
                            output.write("---\n" + output.structured(config, "yaml"))
                        case "table":
                            output.write(config_view.event_text(shown, config, tables.look()))
                    shown = config
            except ClientError as error:
                if shown is None or not error.retryable:
                    raise
                if not away:
                    output.note(f"{error}; waiting for it")
                away = True
                time.sleep(AGAIN_S)
