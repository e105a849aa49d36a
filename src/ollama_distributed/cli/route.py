"""`route`: why a request goes where it goes, and what another policy would have done."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ollama_distributed.cli import output, route_view, tables
from ollama_distributed.cli.cluster import PANEL, make_group
from ollama_distributed.cli.completion import model_names
from ollama_distributed.cli.group import Command
from ollama_distributed.cli.problem import Problem
from ollama_distributed.cli.session import Session

if TYPE_CHECKING:
    from ollama_distributed.base.routing import Policy, RouteDecision

MOST = 1024
"""So many choices a node remembers."""


def register(app: typer.Typer) -> None:
    group = make_group("Which node answers a request, and why.")
    for command in (explain, decisions, replay):
        group.command(command.__name__, cls=Command)(command)
    app.add_typer(group, name="route", rich_help_panel=PANEL)


def explain(
    ctx: typer.Context,
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", autocompletion=model_names, help="Or --request-id.")
    ] = None,
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]")] = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="The system prompt.")] = None,
    request_id: Annotated[
        str | None, typer.Option("--request-id", metavar="ID", help="X-Request-Id of a recent answer.")
    ] = None,
) -> None:
    """Say which node would answer, what was expected of each one, and why not the others.

    Nothing is sent to any of them. With --request-id: what was chosen for a recent request, and where its
    time went. Ask the node that the client talked to: each one chooses for itself.

    \b
    Examples:
      ollama-distributed route explain mymodel "Why is the sky blue?"
      ollama-distributed route explain --request-id 4be0b1a7c2d93f10
    """
    if (model is None) == (request_id is None):
        raise typer.BadParameter("give a MODEL, or --request-id")
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        if request_id is not None:
            found = client.routes.explain(request_id=request_id)
        elif system is None:
            found = client.routes.explain(model or "", messages=[{"role": "user", "content": prompt or ""}])
        else:
            found = client.routes.explain(model or "", prompt=prompt or "", system=system)
    if session.output != "table":
        output.write(output.structured(found, session.output))
    else:
        output.write(route_view.decision_text(found, tables.look()))


def decisions(
    ctx: typer.Context,
    limit: Annotated[int, typer.Option("--limit", metavar="NUMBER", min=1, max=MOST)] = 20,
    save: Annotated[
        Path | None,
        typer.Option("--save", metavar="FILE", help="Write them as JSON lines, oldest first, for `replay`."),
    ] = None,
) -> None:
    """Show the choices that the node made last, newest first.

    \b
    Examples:
      ollama-distributed route decisions
      ollama-distributed route decisions --limit 1000 --save decisions.jsonl
    """
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        found = client.routes.decisions(limit=limit)
    if save is not None:
        import msgspec

        lines = [msgspec.json.encode(one) + b"\n" for one in reversed(found.decisions)]
        try:
            save.write_bytes(b"".join(lines))
        except OSError as exc:
            raise Problem(f"cannot write {save}: {exc.strerror}") from exc
        output.note(f"wrote {len(lines)} decisions to {save}")
    elif session.output != "table":
        output.write(output.structured(found, session.output))
    else:
        output.write(route_view.decisions_text(found, tables.look()))


def replay(
    ctx: typer.Context,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy", metavar="NAME", help="prefix, round-robin or least-connections; repeatable."
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", metavar="FILE", help="JSON lines of `decisions --save`. Default: the node's."),
    ] = None,
) -> None:
    """Say what other policies would have done with the same requests.

    Each one begins with empty caches; `recorded` is what happened. Without --policy: all of them.

    \b
    Examples:
      ollama-distributed route replay
      ollama-distributed route replay --policy round-robin --file decisions.jsonl
    """
    from ollama_distributed.base.routing import POLICIES
    from ollama_distributed.routing import replay as replaying

    policies: list[Policy] = []
    for name in policy or POLICIES:
        known = next((one for one in POLICIES if one == name), None)
        if known is None:
            raise typer.BadParameter(f"there is no policy {name!r}; there are {', '.join(POLICIES)}")
        policies.append(known)
    session: Session = ctx.obj
    found = replaying.usable(_read(file) if file is not None else _asked(session))
    if not found:
        raise Problem("no choice between several replicas is recorded: nothing to replay")
    rows = [replaying.recorded(found), *(replaying.replay(found, one) for one in policies)]
    if session.output != "table":
        output.write(output.structured(rows, session.output))
    else:
        output.write(route_view.replay_text(rows, tables.look()))


def _asked(session: Session) -> list[RouteDecision]:
    with session.client(retries=0) as client:
        return list(client.routes.decisions(limit=MOST).decisions)


def _read(file: Path) -> list[RouteDecision]:
    import msgspec

    from ollama_distributed.base.routing import RouteDecision

    try:
        lines = file.read_bytes().splitlines()
        return [msgspec.json.decode(line, type=RouteDecision) for line in lines if line.strip()]
    except OSError as exc:
        raise Problem(f"cannot read {file}: {exc.strerror}") from exc
    except msgspec.DecodeError as exc:
        raise Problem(f"{file} is not what `route decisions --save` writes: {exc}") from exc
