"""`model export|import`: models in one file, for clusters that reach no registry."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from ollama_distributed.cli import humanize, output
from ollama_distributed.cli.bars import bars
from ollama_distributed.cli.completion import model_names
from ollama_distributed.cli.group import Command
from ollama_distributed.cli.problem import Problem
from ollama_distributed.cli.session import Session
from ollama_distributed.cli.terminal import clean_line

if TYPE_CHECKING:
    from ollama_distributed.client.blobs import OnProgress

_STDIO = "-"


def register(group: typer.Typer) -> None:
    group.command("export", cls=Command)(export)
    group.command("import", cls=Command)(import_file)


def export(
    ctx: typer.Context,
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", autocompletion=model_names)],
    file: Annotated[str, typer.Option("--file", "-o", metavar="FILE", help="Where to; - writes to stdout.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write models into one file: for a cluster that reaches no registry, or another node.

    The file is an OCI image layout in a tar, which oras reads too. What models share is in it
    once. A model that only another node holds is fetched through the one that is asked.

    \b
    Examples:
      ollama-distributed model export mymodel -o mymodel.tar
      ollama-distributed model export llama3.2 smollm2:135m -o models.tar
    """
    session: Session = ctx.obj
    if file == _STDIO:
        if output.is_terminal(sys.stdout):
            raise Problem("a bundle is no text; name a file, or lead stdout elsewhere")
        target: Path | BinaryIO = sys.stdout.buffer
    else:
        target = Path(file)
        if target.exists() and not force:
            raise Problem(f"{target} is there already; --force replaces it")
    with session.client() as client, _bar(f"writing {clean_line(file)}") as moved:
        size = client.models.export_bundle(models, target, on_progress=moved)
    if file != _STDIO and session.output != "table":
        told = {"file": file, "size": size, "models": models}
        output.write(output.structured(told, session.output))
    elif session.output == "table":
        output.note(f"wrote {humanize.size(size)} to {clean_line(file)}")


def import_file(
    ctx: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="- reads it from stdin.")],
    name: Annotated[
        str | None, typer.Option("--name", "-n", metavar="NAME", help="What its one model is to be called.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace other models of the same names.")
    ] = False,
) -> None:
    """Bring the models of a file that `model export` wrote: all of them, or none.

    Files that the server has already are not sent.

    \b
    Examples:
      ollama-distributed model import models.tar
      ollama-distributed model import mymodel.tar --name mymodel:v2
    """
    session: Session = ctx.obj
    source: Path | BinaryIO = sys.stdin.buffer if file == _STDIO else Path(file)
    with session.client() as client, _bar(f"sending {clean_line(file)}") as moved:
        done = client.models.import_bundle(source, name=name, replace=replace, on_progress=moved)
    if session.output != "table":
        output.write(output.structured(list(done), session.output))
        return
    for one in done:
        state = "is there already" if one.state == "unchanged" else one.state
        output.note(f"{clean_line(one.name)}: {state} ({humanize.size(one.size)})")


@contextmanager
def _bar(label: str) -> Iterator[OnProgress]:
    with bars() as progress:
        task = progress.add_task(label, total=None)

        def moved(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total or None)

        yield moved
