"""`login` and `logout`: a person's session with a server, kept for the next commands."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ollama_distributed.cli import credentials, humanize, output
from ollama_distributed.cli.group import Command
from ollama_distributed.cli.problem import Problem
from ollama_distributed.cli.session import Session, Target
from ollama_distributed.cli.terminal import clean_line
from ollama_distributed.client import address

if TYPE_CHECKING:
    from ollama_distributed.base.users import LoginAnswer
    from ollama_distributed.client.sync import SyncClient

PANEL = "Access"

PasswordStdin = Annotated[
    bool, typer.Option("--password-stdin", help="Read the password from stdin, for scripts.")
]


def register(app: typer.Typer) -> None:
    app.command("login", cls=Command, rich_help_panel=PANEL)(login)
    app.command("logout", cls=Command, rich_help_panel=PANEL)(logout)


def login(
    ctx: typer.Context,
    user: Annotated[str | None, typer.Option("--user", metavar="NAME", help="Else it asks.")] = None,
    browser: Annotated[
        bool, typer.Option("--browser", help="Through the server's OIDC provider, in a browser.")
    ] = False,
    password_stdin: PasswordStdin = False,
    ca: Annotated[
        str | None,
        typer.Option(
            "--ca",
            metavar="FILE",
            help="PEM file of the authority that signed the server's certificate: `ca` of its admin.json, "
            "where it has none of its own.",
        ),
    ] = None,
) -> None:
    """Sign in to a server; later commands for it need no key.

    The session is kept in ~/.config/ollama-distributed/credentials.json, readable by you only.

    \b
    Examples:
      ollama-distributed --host https://models.example:8443 login
      ollama-distributed login --user ann --password-stdin < password.txt
      ollama-distributed login --browser
    """
    session: Session = ctx.obj
    target = session.target(signed_in=False)
    if ca is not None:
        target = target._replace(ca=Path(ca).expanduser().read_text(encoding="ascii"))
    _check_way(target)
    with _client(target, "") as client:
        if browser:
            from ollama_distributed.cli.browser import sign_in_by_browser

            answer = sign_in_by_browser(client, target)
        else:
            name = user or _asked("Name: ")
            answer = _signed_in(client, name, read_password(stdin=password_stdin))
    saved = credentials.Saved(answer.token, answer.user.name, target.ca, answer.expires_at)
    path = credentials.keep(target.url, saved, os.environ)
    _tell(session, target, answer, path)


def _signed_in(client: SyncClient, name: str, password: str) -> LoginAnswer:
    """
    Raises:
        Problem: the server knows no such name and password.
    """
    from ollama_distributed.client.errors import Unauthenticated

    try:
        return client.auth.login(name, password)
    except Unauthenticated as refused:
        raise Problem(str(refused)) from refused


def _tell(session: Session, target: Target, answer: LoginAnswer, path: Path) -> None:
    if session.output != "table":
        shown = {"server": target.url, "user": answer.user, "expires_at": answer.expires_at}
        output.write(output.structured(shown, session.output))
    left = humanize.duration(answer.expires_at - time.time())
    output.note(
        f"signed in as {clean_line(answer.user.name)} ({answer.user.role}) at {target.url}, "
        f"for {left} at most; kept in {path}"
    )
    if session.api_key or address.api_key(None, os.environ):
        output.note("a key is given by --api-key or the environment: it counts more than the session")


def logout(ctx: typer.Context) -> None:
    """Sign out: the session ends on every node and is forgotten here.

    \b
    Examples:
      ollama-distributed --host https://models.example:8443 logout
    """
    from ollama_distributed.client.errors import Unauthenticated

    session: Session = ctx.obj
    target = session.target(signed_in=False)
    saved = credentials.find(target.url, os.environ)
    if saved is None:
        credentials.forget(target.url, os.environ)
        output.note(f"you are not signed in at {target.url}")
        return
    known = target._replace(ca=saved.ca or target.ca)
    with contextlib.suppress(Unauthenticated), _client(known, saved.token) as client:  # else it is over
        client.auth.logout()
    credentials.forget(target.url, os.environ)
    output.note(f"signed out at {target.url}")


def read_password(*, stdin: bool, twice: bool = False) -> str:
    """A password from the terminal, without showing it, or one line of stdin.

    Raises:
        Problem: nobody is there to type it, or the two differ.
    """
    if stdin:
        return sys.stdin.readline().rstrip("\r\n")
    if not output.is_terminal(sys.stdin):
        raise Problem("nobody is here to type the password: give it with --password-stdin")
    import getpass

    password = getpass.getpass("Password: ")
    if twice and getpass.getpass("The same again: ") != password:
        raise Problem("the two passwords differ; nothing was changed")
    return password


def _asked(prompt: str) -> str:
    if not output.is_terminal(sys.stdin):
        raise Problem("nobody is here to type the name: give it with --user")
    print(prompt, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip()


def _check_way(target: Target) -> None:
    if not target.url.startswith("https://") and not address.is_loopback(target.url):
        raise Problem(
            f"{target.url} has no TLS: a password would cross the network in the open; use https://"
        )


def _client(target: Target, token: str) -> SyncClient:
    from ollama_distributed.client.sync import SyncClient

    return SyncClient(
        target.url, token, retries=0, timeout=30.0, verify=True if target.ca is None else target.tls()
    )
