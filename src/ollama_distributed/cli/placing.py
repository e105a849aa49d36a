"""What an order of a model's places sets off, told and followed until all is in place."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from ollama_distributed.cli import output, places_view, tables
from ollama_distributed.cli.bars import bars
from ollama_distributed.cli.problem import Problem
from ollama_distributed.cli.session import Session
from ollama_distributed.cli.terminal import clean_line

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from ollama_distributed.base.placement import PlaceRow, PlacesAnswer
    from ollama_distributed.client.sync import SyncClient

LOOK_S = 0.3
"""Between two looks; longer where an answer takes long, as in a cluster of thousands."""
SHARE = 4.0
"""Of the time that an answer took, so long nobody asks again."""

Wait = Annotated[
    bool, typer.Option("--wait/--no-wait", help="Until all is in place; Ctrl-C leaves it to itself.")
]


def ordered(session: Session, client: SyncClient, answer: PlacesAnswer, *, wait: bool) -> None:
    """Say what follows from an order, and follow it."""
    if session.output == "table":
        output.write(places_view.places_text(answer, tables.look()))
        for line in places_view.ahead(answer):
            output.note(line)
    if wait and not answer.settled:
        answer = _followed(client, answer)
        if session.output == "table":
            output.note(places_view.standing(answer))
    if session.output != "table":
        output.write(output.structured(answer, session.output))
    if wait and answer.missing:
        raise Problem(f"not all of it can be: {'; '.join(answer.missing)}")


def until_in_place(client: SyncClient) -> None:
    """Until no model moves any more. Says which are on fewer nodes than is wanted.

    Raises:
        Problem: some are on no node that is to have them; says which, and why.
    """
    from ollama_distributed.client.errors import ClientError

    left = ""
    while True:
        began = time.monotonic()
        try:
            models = client.models.all_places().models
        except ClientError as error:
            if not error.retryable:
                raise
        else:
            moving = ", ".join(clean_line(one.model) for one in models if not one.settled)
            if not moving:
                break
            if moving != left:
                output.note(f"on its way: {moving}")
            left = moving
        time.sleep(max(LOOK_S, SHARE * (time.monotonic() - began)))
    nowhere = []
    for one in models:
        if not one.missing:
            continue
        why = f"{clean_line(one.model)}: {clean_line('; '.join(one.missing))}"
        if any(row.copy and row.has for row in client.models.places(one.model).rows):
            output.note(f"on fewer nodes than is wanted: {why}")
        else:
            nowhere.append(why)
    if nowhere:
        raise Problem(f"not all of it can be elsewhere: {', '.join(nowhere)}")
    output.note("in place")


def _followed(client: SyncClient, answer: PlacesAnswer) -> PlacesAnswer:
    from ollama_distributed.client.errors import ClientError

    told = {row.node: row for row in answer.rows}
    with bars() as progress:
        tasks: dict[str, TaskID] = {}
        while not answer.settled:
            _show_copies(client, answer, progress, tasks)
            began = time.monotonic()
            try:
                answer = client.models.places(answer.model)
            except ClientError as error:
                if not error.retryable:
                    raise
            for line in _news(told, answer):
                progress.console.print(line, soft_wrap=True)
            time.sleep(max(LOOK_S, SHARE * (time.monotonic() - began)))
    return answer


def _show_copies(
    client: SyncClient, answer: PlacesAnswer, progress: Progress, tasks: dict[str, TaskID]
) -> None:
    """A bar for each copy on its way. Only on a terminal: asking every node costs."""
    coming = {row.node: row.name for row in answer.rows if row.doing == "fetch"}
    if progress.disable or not (coming or tasks):
        return
    for one in client.models.transfers():
        if one.model != answer.model or one.node not in (coming.keys() | tasks.keys()) or not one.total:
            continue
        if one.node not in tasks:
            tasks[one.node] = progress.add_task(clean_line(coming[one.node]), total=one.total)
        progress.update(tasks[one.node], total=one.total, completed=one.completed)


def _news(told: dict[str, PlaceRow], answer: PlacesAnswer) -> Iterator[str]:
    """A line for each node at which something ended, or failed once more."""
    for row in answer.rows:
        before = told.get(row.node)
        told[row.node] = row
        line = places_view.step(before, row)
        if line:
            yield clean_line(line)


def rows_of(answer: PlacesAnswer) -> Mapping[str, list[str]]:
    """For a watch into a pipe."""
    return {row.node: [answer.model, *places_view.cells(row)] for row in answer.rows}
