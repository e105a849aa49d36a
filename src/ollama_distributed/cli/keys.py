"""`key`, `whoami`: keys, and what the one in use may do."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from ollama_distributed.cli import access_view, humanize, output, tables
from ollama_distributed.cli.cluster import make_group
from ollama_distributed.cli.completion import key_ids, policy_names
from ollama_distributed.cli.confirm import Yes, confirm
from ollama_distributed.cli.group import Command
from ollama_distributed.cli.session import Session
from ollama_distributed.cli.terminal import clean_line

if TYPE_CHECKING:
    from ollama_distributed.base.access import NewKey

PANEL = "Access"
KEY_ROLES = ("admin", "operator", "user", "viewer", "plugin")

KeyId = Annotated[
    str, typer.Argument(metavar="ID", autocompletion=key_ids, help="From `key list`; never the key itself.")
]


def register(app: typer.Typer) -> None:
    key = make_group("API keys: one for each program or person, with a role and a policy.")
    key.command("create", cls=Command)(create_key)
    key.command("list", cls=Command)(list_keys)
    key.command("ls", cls=Command, hidden=True)(list_keys)
    key.command("show", cls=Command)(show_key)
    key.command("rotate", cls=Command)(rotate_key)
    key.command("revoke", cls=Command)(revoke_key)
    app.add_typer(key, name="key", rich_help_panel=PANEL)
    app.command(cls=Command, rich_help_panel=PANEL)(whoami)


def create_key(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="For people: which program uses it.")] = "",
    role: Annotated[str, typer.Option(metavar="|".join(KEY_ROLES), help="What it may do at most.")] = "user",
    team: Annotated[str, typer.Option(help="Whose it is; teams share nothing.")] = "default",
    policy: Annotated[
        str,
        typer.Option(
            metavar="NAME", autocompletion=policy_names, help="What it may do less; see: policy list."
        ),
    ] = "",
    ttl: Annotated[
        str | None, typer.Option(metavar="TIME", help="How long it is good: 2h, 30d. Default: until revoked.")
    ] = None,
) -> None:
    """Make a key and print it, this once: only its hash is kept.

    \b
    Examples:
      ollama-distributed key create ci --ttl 30d
      ollama-distributed key create dashboard --role viewer
      ollama-distributed key create shop --team red --policy small-models
      KEY=$(ollama-distributed key create ci)
    """
    if role not in KEY_ROLES:
        raise typer.BadParameter(f"choose one of {', '.join(KEY_ROLES)}", param_hint="--role")
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        made = client.keys.create(
            name=name,
            role=role,  # type: ignore[arg-type]  # one of KEY_ROLES
            team=team,
            policy=policy,
            ttl_s=None if ttl is None else _seconds(ttl, "--ttl"),
        )
    _tell(session, made, "kept nowhere: copy it now. Use it as OLLAMA_API_KEY or 'Authorization: Bearer …'")


def list_keys(
    ctx: typer.Context,
    everything: Annotated[bool, typer.Option("--all", help="Also those that are good no more.")] = False,
) -> None:
    """List the keys that are good, without their secrets: role, team, policy, when used last.

    \b
    Examples:
      ollama-distributed key list
      ollama-distributed key list --all --output json
    """
    session: Session = ctx.obj
    with session.client() as client:
        rows = [row for row in client.keys.list() if everything or row.status == "valid"]
    if session.output != "table":
        output.write(output.structured(rows, session.output))
    else:
        output.write(access_view.keys_text(rows, time.time(), tables.look()))


def show_key(ctx: typer.Context, id: KeyId) -> None:  # noqa: A002  # it is what people type
    """Show all about a key but its secret.

    \b
    Examples:
      ollama-distributed key show k3x9a2bc
    """
    session: Session = ctx.obj
    with session.client() as client:
        row = client.keys.get(id)
    if session.output != "table":
        output.write(output.structured(row, session.output))
    else:
        output.write(access_view.key_text(row, time.time(), tables.look()))


def rotate_key(
    ctx: typer.Context,
    id: KeyId,  # noqa: A002  # it is what people type
    overlap: Annotated[
        str, typer.Option(metavar="TIME", help="The old secret stays good so long; 0: void at once.")
    ] = "1d",
) -> None:
    """Give a key a new secret and print it. The old one stays good for a day, unless told otherwise.

    \b
    Examples:
      ollama-distributed key rotate k3x9a2bc
      ollama-distributed key rotate k3x9a2bc --overlap 0
    """
    overlap_s = 0.0 if overlap == "0" else _seconds(overlap, "--overlap")
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        made = client.keys.rotate(id, overlap_s=overlap_s)
    until = f"the old secret is good for {overlap} more" if overlap_s else "the old secret is void"
    _tell(session, made, until)


def revoke_key(
    ctx: typer.Context,
    ids: Annotated[
        list[str], typer.Argument(metavar="ID...", autocompletion=key_ids, help="From `key list`.")
    ],
    yes: Yes = False,
) -> None:
    """Revoke keys for ever: void on every node within seconds.

    \b
    Examples:
      ollama-distributed key revoke k3x9a2bc --yes
    """
    session: Session = ctx.obj
    rows = []
    with session.client(retries=0) as client:
        for id_ in ids:
            row = client.keys.get(id_)
            named = f" ({row.name})" if row.name else ""
            confirm(f"Revoke the key {row.id}{named} for ever?", yes=yes)
            rows.append(client.keys.revoke(row.id))
            output.note(f"revoked {clean_line(row.id + named)}")
    if session.output != "table":
        output.write(output.structured(rows, session.output))


def whoami(ctx: typer.Context) -> None:
    """Show who you are to the server, and what that may do.

    \b
    Examples:
      ollama-distributed whoami
      ollama-distributed whoami --api-key odk_… --output json
    """
    session: Session = ctx.obj
    with session.client() as client:
        who = client.keys.whoami()
    if session.output != "table":
        output.write(output.structured(who, session.output))
    else:
        output.write(access_view.whoami_text(who, time.time(), tables.look()))


def _tell(session: Session, made: NewKey, note: str) -> None:
    if session.output != "table":
        output.write(output.structured(made, session.output))
        return
    output.write(made.key + "\n")
    output.note(
        f"key {clean_line(made.row.id)}, role {made.row.role}, team {clean_line(made.row.team)}; {note}"
    )


def _seconds(text: str, option: str) -> float:
    try:
        return humanize.length_s(text)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint=option) from exc
