"""`engine`: compile llama-server for this machine's CPU, list and test what can run models here.

Needs the node's extra; `cli/node.py` imports it when the command runs.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ollama_distributed.adapters.engines.build.plan import Progress as BuildProgress
from ollama_distributed.adapters.engines.build.service import build, find_built, this_cpu
from ollama_distributed.adapters.engines.llamacpp.discover import BINARY_NAME, examine, proven, wheel
from ollama_distributed.adapters.engines.llamacpp.program import Program
from ollama_distributed.adapters.engines.llamacpp.sandbox.plan import Sandbox
from ollama_distributed.base.errors import EngineError, Unsupported
from ollama_distributed.cli import output
from ollama_distributed.cli.cluster import make_group
from ollama_distributed.cli.group import Command
from ollama_distributed.cli.session import Session
from ollama_distributed.cli.terminal import clean_line
from ollama_distributed.node.settings import default_cache_dir

app = make_group("Build and test the inference engine for this machine's CPU.")

CacheDir = Annotated[
    str | None,
    typer.Option(
        metavar="DIR", help="The node's cache folder. Default: OLLAMA_DISTRIBUTED_CACHE_DIR, else ~/.cache."
    ),
]


@app.command("build", cls=Command)
def build_command(
    force: Annotated[bool, typer.Option("--force", help="Build again what is there.")] = False,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", "-j", min=1, help="Compilers at once. Default: by cores and memory."),
    ] = None,
    archive: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", exists=True, dir_okay=False, help="The source, for machines without an index."
        ),
    ] = None,
    cache_dir: CacheDir = None,
) -> None:
    """Compile llama-server for this CPU: minutes once, then up to 2.5 times the speed.

    Safe to interrupt: the next call goes on. Nodes take it from their next start.

    \b
    The compiler comes with an extra:
      pip install 'ollama-distributed[node,engine-build]'

    \b
    Examples:
      ollama-distributed engine build
      ollama-distributed engine build --jobs 2
    """
    with _bar() as report:
        built = asyncio.run(
            build(_engines(cache_dir), report=report, archive=archive, jobs=jobs, force=force)
        )
    done = "built" if report.worked else "already there:"
    output.note(f"{done} {built.version} for {built.instruction_set}")
    output.write(f"{built.path}\n")


@app.command("list", cls=Command)
def list_command(ctx: typer.Context, cache_dir: CacheDir = None) -> None:
    """List the llama.cpp programs that this machine has, the preferred first.

    \b
    Examples:
      ollama-distributed engine list
      ollama-distributed engine list --output json
    """
    programs, problems = asyncio.run(_programs(_engines(cache_dir)))
    session: Session = ctx.obj
    rows = [
        {
            "variant": program.variant,
            "version": program.version,
            "instruction_set": program.instruction_set,
            "devices": list(program.devices),
            "path": program.path or "",
        }
        for program in programs
    ]
    if session.output != "table":
        output.write(output.structured(rows, session.output))
    else:
        header = ("VARIANT", "VERSION", "INSTRUCTION SET", "DEVICES", "PATH")
        cells = [
            (
                program.variant,
                program.version,
                program.instruction_set or "-",
                ", ".join(program.devices) or "CPU",
                program.path or "-",
            )
            for program in programs
        ]
        output.write(output.table(header, cells))
    for problem in problems:
        output.note(clean_line(problem))


@app.command("test", cls=Command)
def check_command(
    path: Annotated[
        Path | None,
        typer.Argument(metavar="[PATH]", exists=True, dir_okay=False, help="A llama-server to test."),
    ] = None,
    cache_dir: CacheDir = None,
) -> None:
    """Run the self-test: load a tiny model, want an exact answer. Exit code 1 when one fails.

    Says in which sandbox it works: `none` when its libraries lie where a sandbox lets nobody look.

    \b
    Examples:
      ollama-distributed engine test
      ollama-distributed engine test /usr/local/bin/llama-server
    """
    if path is not None:
        programs, problems = [asyncio.run(examine("binary", path.absolute()))], list[str]()
    else:
        programs, problems = asyncio.run(_programs(_engines(cache_dir)))
    for program in programs:
        name = " ".join(
            filter(None, (program.variant, program.version, program.instruction_set, program.path))
        )
        try:
            works = asyncio.run(proven(program))
        except EngineError as error:
            problems.append(f"{name}: {error.message}")
        else:
            sandbox = Sandbox("auto" if works.caged else "off").kept
            output.write(f"ok  {clean_line(name)}  (sandbox: {sandbox})\n")
    for problem in problems:
        output.error(problem)
    if problems or not programs:
        raise typer.Exit(1)


def _engines(cache_dir: str | None) -> Path:
    named = cache_dir or os.environ.get("OLLAMA_DISTRIBUTED_CACHE_DIR")
    return (Path(named).expanduser() if named else default_cache_dir()) / "engines"


async def _programs(engines: Path) -> tuple[list[Program], list[str]]:
    """What can run, in the order in which a node prefers it; and what cannot, and why."""
    found: list[Program] = []
    problems: list[str] = []
    try:
        built = await asyncio.to_thread(find_built, engines, this_cpu())
    except Unsupported:
        built = None  # `engine build` does not work on this kind of machine
    if built is not None:
        found.append(await examine("built", Path(built.path)))
    on_path = shutil.which(BINARY_NAME)
    try:
        if on_path:
            found.append(await examine("binary", Path(on_path)))
    except EngineError as error:
        problems.append(f"{on_path}: {error.message}")
    try:
        found.append(await wheel())
    except EngineError as error:
        problems.append(error.message)
    return found, problems


class _Report:
    """Shows the build's progress: a bar on a terminal, else a line for each step."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.table import Column

        # Compilers and paths are wordy: the text gives way, so that bar and time keep their place.
        wordy = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        self.bar = Progress(
            TextColumn("{task.description}", markup=False, table_column=wordy),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f}%", markup=False),
            TimeElapsedColumn(),
            expand=True,
            console=output.progress_console(),
            disable=not output.is_terminal(sys.stderr),
        )
        self._task = self.bar.add_task("engine build", total=1.0)
        self._step = ""
        self.worked = False
        """Something was built: it was not there already."""

    def __call__(self, progress: BuildProgress) -> None:
        if progress.step == "done":  # the command's last lines say it
            self.bar.update(self._task, completed=1.0, description="engine build: done")
            return
        self.worked = True
        text = clean_line(f"{progress.step}: {progress.message}")
        if self.bar.disable:
            if progress.step != self._step:
                output.note(text)
        else:
            self.bar.update(self._task, description=text, completed=progress.share)
        self._step = progress.step


@contextmanager
def _bar() -> Iterator[_Report]:
    report = _Report()
    with report.bar:
        yield report
