"""Progress of what takes its time: a bar for each file, a line for each step."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ollama_distributed.cli import output
from ollama_distributed.cli.terminal import clean_line

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from ollama_distributed.client.wire import Progress as Line


@contextmanager
def bars(*, count: bool = False) -> Iterator[Progress]:
    """Bars on stderr; only the steps when stderr is no terminal. `count`: of things, not of bytes."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *((MofNCompleteColumn(),) if count else (DownloadColumn(), TransferSpeedColumn())),
        TimeRemainingColumn(compact=True),
        console=output.progress_console(),
        disable=not output.is_terminal(sys.stderr),
    ) as progress:
        yield progress


def follow(lines: Iterable[Line], progress: Progress) -> None:
    """Show the server's lines as they come."""
    tasks: dict[str, TaskID] = {}
    last = ""
    for line in lines:
        if line.digest and line.total:
            label = clean_line(line.status)
            task = tasks.get(label)
            if task is None:
                task = tasks[label] = progress.add_task(label, total=line.total)
            progress.update(task, completed=line.completed or 0)
        elif line.status != last:
            progress.console.print(clean_line(line.status), soft_wrap=True)
            last = line.status
