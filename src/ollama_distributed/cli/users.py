"""`user`: who may sign in, and with which role."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from ollama_distributed.cli import humanize, output
from ollama_distributed.cli.cluster import make_group
from ollama_distributed.cli.completion import user_names
from ollama_distributed.cli.confirm import Yes, confirm
from ollama_distributed.cli.group import Command
from ollama_distributed.cli.login import PANEL, PasswordStdin, read_password
from ollama_distributed.cli.session import Session
from ollama_distributed.cli.terminal import clean_line

if TYPE_CHECKING:
    from ollama_distributed.base.users import SessionRow, UserRole, UserRow

Name = Annotated[str, typer.Argument(metavar="NAME", autocompletion=user_names, help="The user's name.")]
Names = Annotated[
    list[str], typer.Argument(metavar="NAME...", autocompletion=user_names, help="The users' names.")
]


def register(app: typer.Typer) -> None:
    group = make_group("Who may sign in, and with which role. Needs the admin role.")
    group.command("create", cls=Command)(create)
    group.command("list", cls=Command)(list_users)
    group.command("ls", cls=Command, hidden=True)(list_users)
    group.command("show", cls=Command)(show)
    group.command("role", cls=Command)(role)
    group.command("passwd", cls=Command)(passwd)
    group.command("disable", cls=Command)(disable)
    group.command("enable", cls=Command)(enable)
    group.command("logout", cls=Command)(sign_out)
    group.command("delete", cls=Command)(delete)
    app.add_typer(group, name="user", rich_help_panel=PANEL)


def create(
    ctx: typer.Context,
    name: Name,
    role: Annotated[str, typer.Option(metavar="ROLE", help="admin, operator, user or viewer.")] = "user",
    team: Annotated[
        str, typer.Option(metavar="TEAM", help="Whose models and limits they share.")
    ] = "default",
    password_stdin: PasswordStdin = False,
) -> None:
    """Make a user, with a password of 10 to 256 characters.

    \b
    Examples:
      ollama-distributed user create ann --role operator
      pwgen 20 1 | tee ann.txt | ollama-distributed user create ann --password-stdin
    """
    session: Session = ctx.obj
    checked = _role(role)
    password = read_password(stdin=password_stdin, twice=True)
    with session.client(retries=0) as client:
        row = client.users.create(name, password, role=checked, team=team)
    _print(session, row)
    output.note(f"made {clean_line(row.name)} ({row.role}); to sign in:  ollama-distributed login")


def list_users(ctx: typer.Context) -> None:
    """List all users.

    \b
    Examples:
      ollama-distributed user list
      ollama-distributed user list --output json
    """
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        rows = client.users.list()
    if session.output != "table":
        output.write(output.structured(rows, session.output))
    else:
        output.write(_table(rows))


def show(ctx: typer.Context, name: Name) -> None:
    """Show a user, and where they are signed in.

    \b
    Examples:
      ollama-distributed user show ann
    """
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        row, sessions = client.users.get(name), client.users.sessions(name)
    if session.output != "table":
        output.write(output.structured({"user": row, "sessions": sessions}, session.output))
        return
    output.write(_table([row]))
    if sessions:
        output.write("\n" + _sessions(sessions))


def role(
    ctx: typer.Context,
    name: Name,
    role: Annotated[str, typer.Argument(metavar="ROLE", help="admin, operator, user or viewer.")],
    team: Annotated[str | None, typer.Option(metavar="TEAM", help="And another team.")] = None,
) -> None:
    """Give a user another role, and perhaps another team. It holds at once, everywhere.

    \b
    Examples:
      ollama-distributed user role ann viewer
    """
    session: Session = ctx.obj
    checked = _role(role)
    with session.client(retries=0) as client:
        row = client.users.change(name, role=checked, team=team)
    _print(session, row)
    output.note(f"{clean_line(row.name)} is {row.role} in the team {clean_line(row.team)}")


def passwd(ctx: typer.Context, name: Name, password_stdin: PasswordStdin = False) -> None:
    """Set a user's password; they are signed out everywhere.

    \b
    Examples:
      ollama-distributed user passwd ann
    """
    session: Session = ctx.obj
    password = read_password(stdin=password_stdin, twice=True)
    with session.client(retries=0) as client:
        row = client.users.set_password(name, password)
    _print(session, row)
    output.note(f"set the password of {clean_line(row.name)}, who is signed out everywhere")


def disable(ctx: typer.Context, names: Names) -> None:
    """Lock users out: nobody signs in as them, and their sessions and tokens end within seconds.

    \b
    Examples:
      ollama-distributed user disable ann
    """
    _lock(ctx, names, disabled=True, done="is locked out")


def enable(ctx: typer.Context, names: Names) -> None:
    """Let users in again.

    \b
    Examples:
      ollama-distributed user enable ann
    """
    _lock(ctx, names, disabled=False, done="may sign in again")


def _lock(ctx: typer.Context, names: list[str], *, disabled: bool, done: str) -> None:
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        for name in names:
            row = client.users.change(name, disabled=disabled)
            _print(session, row)
            output.note(f"{clean_line(row.name)} {done}")


def sign_out(ctx: typer.Context, names: Names) -> None:
    """Sign users out everywhere. They may sign in again.

    \b
    Examples:
      ollama-distributed user logout ann
    """
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        for name in names:
            client.users.end_sessions(name)
            output.note(f"signed {clean_line(name)} out everywhere")


def delete(ctx: typer.Context, names: Names, yes: Yes = False) -> None:
    """Delete users for ever.

    \b
    Examples:
      ollama-distributed user delete ann --yes
    """
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        for name in names:
            confirm(f"Delete the user {name}?", yes=yes)
            client.users.delete(name)
            output.note(f"deleted {clean_line(name)}")


def _role(text: str) -> UserRole:
    from ollama_distributed.base.users import UserRole

    for known in get_args(UserRole):
        if text == known:
            found: UserRole = known
            return found
    raise typer.BadParameter(f"choose one of {', '.join(get_args(UserRole))}", param_hint="ROLE")


def _print(session: Session, row: UserRow) -> None:
    if session.output != "table":
        output.write(output.structured(row, session.output))


def _table(rows: Sequence[UserRow]) -> str:
    return output.table(
        ("NAME", "ROLE", "TEAM", "SIGNS IN BY", "SESSIONS", "CREATED"),
        [
            (
                row.name,
                row.role,
                row.team,
                "nothing: locked" if row.disabled else row.source,
                str(row.sessions),
                _ago(row.created_at),
            )
            for row in rows
        ],
    )


def _sessions(rows: Sequence[SessionRow]) -> str:
    return output.table(
        ("SESSION", "FROM", "SINCE", "LAST USED", "WITH"),
        [(row.id, row.address, _ago(row.created_at), _ago(row.seen_at), row.agent) for row in rows],
    )


def _ago(then: float) -> str:
    now = time.time()
    return humanize.ago(datetime.fromtimestamp(min(then, now), UTC), datetime.fromtimestamp(now, UTC))
