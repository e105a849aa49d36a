"""Commands that bring models: create (from a Modelfile) and import (a GGUF file)."""

from __future__ import annotations

import glob
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ollama_distributed.cli.bars import bars, follow
from ollama_distributed.cli.completion import model_names
from ollama_distributed.cli.group import Command
from ollama_distributed.cli.library import PANEL
from ollama_distributed.cli.problem import Problem
from ollama_distributed.cli.session import Session
from ollama_distributed.cli.terminal import clean_line

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from ollama_distributed.client.sync import SyncClient
    from ollama_distributed.client.wire import CreateRequest
    from ollama_distributed.models.modelfile import Modelfile

_GGUF = b"GGUF"
QUANTIZE = "As in Ollama; servers here refuse it, and say what to do instead."


def register(app: typer.Typer) -> None:
    app.command(cls=Command, rich_help_panel=PANEL)(create)
    app.command("import", cls=Command, rich_help_panel=PANEL)(import_file)


def create(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", autocompletion=model_names)],
    file: Annotated[
        Path, typer.Option("--file", "-f", metavar="FILE", help="The Modelfile; - reads it from stdin.")
    ] = Path("Modelfile"),
    quantize: Annotated[str | None, typer.Option("--quantize", "-q", metavar="TYPE", help=QUANTIZE)] = None,
) -> None:
    """Make a model from a Modelfile.

    \b
    Examples:
      ollama-distributed create mymodel -f Modelfile
      printf 'FROM ./model.gguf\\nSYSTEM Be brief.' | ollama-distributed create mymodel -f -
    """
    from ollama_distributed.models import modelfile

    try:
        if str(file) == "-":
            text, folder = sys.stdin.read(), Path.cwd()
        else:
            text, folder = file.read_text(encoding="utf-8"), file.absolute().parent
    except UnicodeDecodeError as failure:
        raise Problem(f"{file} is no Modelfile: it is not UTF-8 text") from failure
    _make(ctx.obj, name, modelfile.parse(text), folder, quantize)


def import_file(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE.gguf", exists=True, dir_okay=False, readable=True)],
    name: Annotated[
        str | None, typer.Option("--name", "-n", metavar="NAME", help="Default: the file's.")
    ] = None,
    projector: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.gguf", help="The projector of a vision model.", exists=True, dir_okay=False
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message of the model.")] = None,
    quantize: Annotated[str | None, typer.Option("--quantize", "-q", metavar="TYPE", help=QUANTIZE)] = None,
) -> None:
    """Bring a GGUF file into the server's store.

    \b
    Examples:
      ollama-distributed import SmolLM2-135M-Instruct.Q4_1.gguf --name smollm2:135m
    """
    from ollama_distributed.models.modelfile import Modelfile

    sources = tuple(str(path.absolute()) for path in (file, projector) if path is not None)
    _make(ctx.obj, name or file.stem, Modelfile(sources=sources, system=system), Path.cwd(), quantize)


def _make(session: Session, name: str, asked: Modelfile, folder: Path, quantize: str | None) -> None:
    """Send the files that the Modelfile names, then have the server make the model."""
    weights = [found for source in asked.sources for found in _files(source, folder)]
    adapters = [found for source in asked.adapters for found in _required(source, folder)]
    if asked.drafts:
        raise Problem("DRAFT is not supported by this version's server")
    if weights and len(weights) < len(asked.sources):
        raise Problem("FROM names a model and a file; a model is made of one or the other")
    with session.client() as client, bars() as progress:
        files = _sent(client, weights, progress)
        request = _request(name, asked, files, _sent(client, adapters, progress), quantize)
        follow(client.models.create(request), progress)


def _request(
    name: str,
    asked: Modelfile,
    files: Mapping[str, str],
    adapters: Mapping[str, str],
    quantize: str | None,
) -> CreateRequest:
    from ollama_distributed.client.wire import CreateRequest, Message

    return CreateRequest(
        model=name,
        from_=None if files else asked.sources[0],
        files=files or None,
        adapters=adapters or None,
        template=asked.template,
        system=asked.system,
        renderer=asked.renderer or None,
        parser=asked.parser or None,
        requires=asked.requires or None,
        license=list(asked.license) or None,
        messages=[Message(role=said.role, content=said.content) for said in asked.messages] or None,
        parameters=asked.parameters or None,
        quantize=quantize,
    )


def _files(source: str, folder: Path) -> list[Path]:
    """The local files that FROM means; none when it means a model's name."""
    path = (folder / Path(source).expanduser()).absolute()
    if path.is_dir():
        found = sorted(path.glob("*.gguf"))
        if not found:
            raise Problem(f"{path} holds no GGUF file; convert the model to GGUF first")
        return found
    if path.is_file():
        return [_gguf(path)]
    if glob.has_magic(source):
        return [_gguf(Path(found)) for found in sorted(glob.glob(str(path)))] or _missing(path)  # noqa: PTH207 - the pattern is the user's and may be absolute
    looks_like_a_path = source.startswith(("/", "./", "../", "~")) or source.lower().endswith(".gguf")
    return _missing(path) if looks_like_a_path else []


def _required(source: str, folder: Path) -> list[Path]:
    return _files(source, folder) or _missing((folder / source).absolute())


def _missing(path: Path) -> list[Path]:
    raise Problem(f"{path}: no such file (paths in a Modelfile start at the Modelfile's folder)")


def _gguf(path: Path) -> Path:
    """Refuse another format before it is sent."""
    with path.open("rb") as file:
        if file.read(len(_GGUF)) != _GGUF:
            raise Problem(f"{path} is not a GGUF file; convert the model to GGUF first")
    return path


def _sent(client: SyncClient, paths: Sequence[Path], progress: Progress) -> dict[str, str]:
    """Send the files that the server lacks; their names and digests."""
    sent: dict[str, str] = {}
    for path in paths:
        task = progress.add_task(f"sending {clean_line(path.name)}", total=path.stat().st_size)

        def moved(done: int, total: int, task: TaskID = task) -> None:
            progress.update(task, completed=done, total=total)

        name = path.name if path.name not in sent else f"{len(sent)}-{path.name}"
        sent[name] = client.models.create_blob(path, on_progress=moved)
        progress.update(task, completed=path.stat().st_size)
    return sent
