"""Asks before what cannot be taken back."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ollama_distributed.cli import output
from ollama_distributed.cli.problem import Problem
from ollama_distributed.cli.terminal import clean_line

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def confirm(question: str, *, yes: bool) -> None:
    """Returns when the answer is yes.

    Raises:
        Problem: nobody is there to answer.
        typer.Exit: the answer is no.
    """
    if yes:
        return
    if not output.is_terminal(sys.stdin):
        raise Problem(f"{clean_line(question)} Nobody is here to answer: add --yes to do it")
    if not typer.confirm(clean_line(question), err=True):
        output.note("nothing was changed")
        raise typer.Exit(1)
