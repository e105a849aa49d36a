"""`model replicas|pin|unpin|place|fit`: where models are wanted, and where they would fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ollama_distributed.cli import humanize, output, places_view, tables
from ollama_distributed.cli.completion import model_names, node_names
from ollama_distributed.cli.group import Command
from ollama_distributed.cli.session import Session

if TYPE_CHECKING:
    from ollama_distributed.base.placement import PlacesAnswer

Model = Annotated[str, typer.Argument(metavar="MODEL", autocompletion=model_names)]
Node = Annotated[str, typer.Argument(metavar="NODE", autocompletion=node_names, help="Its name or id.")]


def register(group: typer.Typer) -> None:
    for command in (fit, replicas, pin, unpin, place):
        group.command(command.__name__, cls=Command)(command)


def fit(
    ctx: typer.Context,
    model: Model,
    context: Annotated[
        int | None, typer.Option("--context", metavar="TOKENS", min=1, help="Of one slot.")
    ] = None,
    slots: Annotated[
        int | None, typer.Option("--slots", metavar="NUMBER", min=1, help="Requests at once.")
    ] = None,
) -> None:
    """Say where a model would fit, with which context, how fast, and what would have to go.

    A model that no node has is looked at in its registry: a few KB of it are read.

    \b
    Examples:
      ollama-distributed model fit mymodel
      ollama-distributed model fit hf.co/bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M
      ollama-distributed model fit mymodel --context 32768 --slots 2
    """
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        answer = client.models.fit(model, context_tokens=context, slots=slots)
    if session.output != "table":
        output.write(output.structured(answer, session.output))
    else:
        output.write(places_view.fit_text(answer, tables.look()))


def replicas(
    ctx: typer.Context,
    model: Model,
    count: Annotated[int | None, typer.Argument(metavar="[COUNT]", min=0)] = None,
    least: Annotated[int | None, typer.Option("--min", metavar="COUNT", min=0)] = None,
    most: Annotated[int | None, typer.Option("--max", metavar="COUNT", min=0)] = None,
) -> None:
    """Say how many nodes hold a model: COUNT, or as many as demand asks for between --min and --max.

    Recorded only: no node acts on it in this version. Copy with `model distribute`.

    \b
    Examples:
      ollama-distributed model replicas mymodel 3
      ollama-distributed model replicas mymodel --min 1 --max 5
    """
    if count is None and least is None and most is None:
        raise typer.BadParameter("give a COUNT, or --min and --max")
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        _recorded(session, client.models.replicas(model, count, least=least, most=most))


def pin(ctx: typer.Context, model: Model, node: Node) -> None:
    """Have a node hold a model in any case.

    Recorded only: no node acts on it in this version. Copy with `model distribute`.

    \b
    Examples:
      ollama-distributed model pin mymodel gpu1
    """
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        _recorded(session, client.models.pin(model, node))


def unpin(ctx: typer.Context, model: Model, node: Node) -> None:
    """Take a pin away.

    \b
    Examples:
      ollama-distributed model unpin mymodel gpu1
    """
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        _recorded(session, client.models.unpin(model, node))


def place(
    ctx: typer.Context,
    model: Model,
    labels: Annotated[
        list[str] | None,
        typer.Option("--label", metavar="NAME=VALUE", help="Only nodes that have it; repeatable."),
    ] = None,
    preload: Annotated[
        bool | None, typer.Option("--preload/--no-preload", help="Loaded though nobody asks for it.")
    ] = None,
    keep_alive: Annotated[
        str | None, typer.Option("--keep-alive", metavar="TIME", help="Loaded so long after use: 10m, 2h.")
    ] = None,
    keep: Annotated[
        bool | None, typer.Option("--keep/--no-keep", help="Keep surplus copies while there is room.")
    ] = None,
    priority: Annotated[
        int | None,
        typer.Option("--priority", metavar="NUMBER", help="Higher goes first where room is short."),
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Nothing is wanted any more.")] = False,
) -> None:
    """Say which nodes may hold a model, and how; without options, show it.

    Recorded only: no node acts on it in this version. Copy with `model distribute`.

    \b
    Examples:
      ollama-distributed model place mymodel
      ollama-distributed model place mymodel --label zone=a --preload
      ollama-distributed model place mymodel --clear
    """
    wanted = None if labels is None else dict(_label(text) for text in labels)
    keep_alive_s = None if keep_alive is None else humanize.length_s(keep_alive)
    said = (wanted, preload, keep_alive_s, keep, priority)
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        if not clear and all(value is None for value in said):
            _show(session, client.models.places(model))
            return
        answer = client.models.place(
            model,
            labels=wanted,
            preload=preload,
            keep_alive_s=keep_alive_s,
            keep=keep,
            priority=priority,
            clear=clear,
        )
        _recorded(session, answer)


def _label(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise typer.BadParameter(f"{text!r}: write NAME=VALUE")
    return name, value


def _recorded(session: Session, answer: PlacesAnswer) -> None:
    _show(session, answer)
    output.note("recorded; no node acts on it in this version, copy it with: model distribute MODEL NODE")


def _show(session: Session, answer: PlacesAnswer) -> None:
    if session.output != "table":
        output.write(output.structured(answer, session.output))
    else:
        output.write(places_view.places_text(answer, tables.look()))
