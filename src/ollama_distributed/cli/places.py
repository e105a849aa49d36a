"""`model places|replicas|pin|unpin|place|fit`: where models are wanted, are, and would fit."""

from __future__ import annotations

from typing import Annotated

import typer

from ollama_distributed.cli import humanize, live, output, places_view, placing, tables
from ollama_distributed.cli.completion import model_names, node_names
from ollama_distributed.cli.group import Command
from ollama_distributed.cli.session import Session

Model = Annotated[str, typer.Argument(metavar="MODEL", autocompletion=model_names)]
Node = Annotated[str, typer.Argument(metavar="NODE", autocompletion=node_names, help="Its name or id.")]


def register(group: typer.Typer) -> None:
    for command in (places, fit, replicas, pin, unpin, place):
        group.command(command.__name__, cls=Command)(command)


def places(
    ctx: typer.Context,
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", autocompletion=model_names, help="Default: all.")
    ] = None,
    watch: live.Watch = False,
    every: live.Every = live.EVERY_S,
) -> None:
    """Show on which nodes models are wanted and are, what moves, and why something is not as wanted.

    \b
    Examples:
      ollama-distributed model places
      ollama-distributed model places mymodel --watch
    """
    session: Session = ctx.obj
    with session.client(retries=0, timeout_s=live.PATIENCE_S if watch else None) as client:

        def asked() -> live.View:
            if model is None:
                every_one = client.models.all_places().models
                return live.View(
                    data=list(every_one),
                    text=lambda look: places_view.all_text(every_one, look),
                    lines={one.model: places_view.summary(one) for one in every_one},
                )
            answer = client.models.places(model)
            return live.View(
                data=answer,
                text=lambda look: places_view.places_text(answer, look),
                lines=placing.rows_of(answer),
            )

        if watch:
            live.watch(session, asked, every)
        else:
            live.show(session, asked())


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
    count: Annotated[int | None, typer.Argument(metavar="[COUNT]", min=0, help="So many nodes.")] = None,
    least: Annotated[
        int | None, typer.Option("--min", metavar="COUNT", min=0, help="At least so many.")
    ] = None,
    most: Annotated[
        int | None, typer.Option("--max", metavar="COUNT", min=0, help="At most so many.")
    ] = None,
    wait: placing.Wait = True,
) -> None:
    """Say how many nodes hold a model: COUNT, or as many as demand asks for between --min and --max.

    Nodes copy it from each other. Without an order a model has `placement_copies` (3).

    \b
    Examples:
      ollama-distributed model replicas mymodel 3
      ollama-distributed model replicas mymodel --min 1 --max 5
    """
    if count is None and least is None and most is None:
        raise typer.BadParameter("give a COUNT, or --min and --max")
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        answer = client.models.replicas(model, count, least=least, most=most)
        placing.ordered(session, client, answer, wait=wait)


def pin(ctx: typer.Context, model: Model, node: Node, wait: placing.Wait = True) -> None:
    """Have a node hold a model in any case, whatever its labels and the number of copies.

    \b
    Examples:
      ollama-distributed model pin mymodel gpu1
    """
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        placing.ordered(session, client, client.models.pin(model, node), wait=wait)


def unpin(ctx: typer.Context, model: Model, node: Node, wait: placing.Wait = True) -> None:
    """Take a pin away: the node holds the model only if the number asks for it.

    \b
    Examples:
      ollama-distributed model unpin mymodel gpu1
    """
    session: Session = ctx.obj
    with session.client(retries=0) as client:
        placing.ordered(session, client, client.models.unpin(model, node), wait=wait)


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
    clear: Annotated[bool, typer.Option("--clear", help="As for models without an order.")] = False,
    wait: placing.Wait = True,
) -> None:
    """Say which nodes may hold a model, and how; without options, show it.

    A model with --preload stays loaded whatever keep-alive says; `stop` unloads it for a moment only.

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
            answer = client.models.places(model)
            live.show(session, live.View(answer, lambda look: places_view.places_text(answer, look), {}))
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
        placing.ordered(session, client, answer, wait=wait)


def _label(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise typer.BadParameter(f"{text!r}: write NAME=VALUE")
    return name, value
