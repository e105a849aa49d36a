"""Secrets that are given to a command: from stdin, or taken off this process's command line, which
everyone on the machine may read (`ps`).

The kernel shows the arguments from the process's own memory (proc(5): `cmdline`, and `arg_start` in
`stat`), so that whoever overwrites them there has taken them back. Until then, some hundred milliseconds,
they could be read; a shell's history has them still.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import typer

from ollama_distributed.cli import output

BEGINS = "odj_"
"""With which every join token begins."""
_STAT, _LINE = Path("/proc/self/stat"), Path("/proc/self/cmdline")
_ARG_START, _ARG_END = 48 - 3, 49 - 3
"""Fields of `stat` by their number in proc(5), behind the name of the program."""


def token_of(argument: str) -> str:
    """A join token; `-`: from stdin, typed in unseen where somebody is there."""
    if argument == "-":
        if output.is_terminal(sys.stdin):
            return str(typer.prompt(f"Token ({BEGINS}…)", hide_input=True, err=True)).strip()
        return sys.stdin.readline().strip()
    if not wiped(argument):
        output.note("Everyone on this machine can see this token among the processes; `join -` reads stdin.")
    return argument


def wiped(secret: str) -> bool:
    """Overwrite it; whether it is there no more."""
    if not sys.platform.startswith("linux"):
        return False
    hidden = secret.encode()
    try:
        fields = _STAT.read_bytes().rpartition(b") ")[2].split()
        start, end = int(fields[_ARG_START]), int(fields[_ARG_END])
        at = ctypes.string_at(start, end - start).find(hidden) if start else -1
        if at >= 0:
            ctypes.memset(start + at, ord("*"), len(hidden))
        return hidden not in _LINE.read_bytes()
    except (OSError, ValueError, IndexError):  # no /proc, or one that hides it
        return False
