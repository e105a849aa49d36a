"""Commands on the models that the server has: list, ps, show, cp, rm, stop."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ollama_distributed.cli import humanize, output, tables
from ollama_distributed.cli.completion import loaded_names, model_names
from ollama_distributed.cli.group import Command
from ollama_distributed.cli.session import Session
from ollama_distributed.cli.terminal import clean, clean_line

if TYPE_CHECKING:
    from ollama_distributed.client.wire import ModelInfo, ShowResponse

PANEL = "Models"
NONE_YET = (
    "There are no models yet. Bring one:  ollama-distributed pull NAME, or import FILE.gguf --name NAME"
)
_ID_LENGTH = 12
_LICENSE_LINES = 2
"""`show` gives the first lines of a licence; `show --license` all of it."""

Model = Annotated[str, typer.Argument(metavar="MODEL", autocompletion=model_names)]


def register(app: typer.Typer) -> None:
    app.command("list", cls=Command, rich_help_panel=PANEL)(list_models)
    app.command("ls", cls=Command, hidden=True)(list_models)
    app.command(cls=Command, rich_help_panel=PANEL)(ps)
    app.command(cls=Command, rich_help_panel=PANEL)(show)
    app.command("cp", cls=Command, rich_help_panel=PANEL)(copy)
    app.command("rm", cls=Command, rich_help_panel=PANEL)(remove)
    app.command(cls=Command, rich_help_panel=PANEL)(stop)


def list_models(
    ctx: typer.Context,
    prefix: Annotated[str, typer.Argument(metavar="[PREFIX]", help="Only names that begin so.")] = "",
) -> None:
    """List the models (also: ls).

    \b
    Examples:
      ollama-distributed list
      ollama-distributed list llama --output json
    """
    session: Session = ctx.obj
    with session.client() as client:
        found = [model for model in client.models.list() if model.name.lower().startswith(prefix.lower())]
    found.sort(key=_modified, reverse=True)
    if session.output != "table":
        output.write(output.structured(found, session.output))
        return
    now = datetime.now(UTC)
    rows = [
        (
            model.name,
            model.digest[:_ID_LENGTH],
            humanize.size(model.size),
            humanize.ago(model.modified_at, now),
        )
        for model in found
    ]
    output.write(output.table(("NAME", "ID", "SIZE", "MODIFIED"), rows))
    if not found and not prefix:
        output.note(NONE_YET)


def _modified(model: ModelInfo) -> datetime:
    return model.modified_at or datetime.fromtimestamp(0, UTC)


def ps(ctx: typer.Context) -> None:
    """List the models in memory: size, CPU/GPU, context, until when, by which engine.

    \b
    Examples:
      ollama-distributed ps
    """
    session: Session = ctx.obj
    with session.client() as client:
        loaded = client.models.loaded()
    if session.output != "table":
        output.write(output.structured(loaded, session.output))
        return
    now = datetime.now(UTC)
    rows = [
        (
            model.name,
            model.digest[:_ID_LENGTH],
            humanize.size(model.size),
            humanize.processor(model.size, model.size_vram),
            str(model.context_length),
            humanize.until(model.expires_at, now),
            str(model.engine or ""),
        )
        for model in loaded
    ]
    ranks = {"CONTEXT": 1, "ID": 2, "ENGINE": 3}
    titles = ("NAME", "ID", "SIZE", "PROCESSOR", "CONTEXT", "UNTIL", "ENGINE")
    shown = [
        tables.Column(title, [tables.Cell(row[at]) for row in rows], ranks.get(title, 0))
        for at, title in enumerate(titles)
    ]
    output.write(tables.table(shown, tables.look()))


def show(
    ctx: typer.Context,
    model: Model,
    license_: Annotated[bool, typer.Option("--license", help="Only the licence.")] = False,
    modelfile: Annotated[bool, typer.Option("--modelfile", help="Only the Modelfile.")] = False,
    parameters: Annotated[bool, typer.Option("--parameters", help="Only the parameters.")] = False,
    template: Annotated[bool, typer.Option("--template", help="Only the chat template.")] = False,
    system: Annotated[bool, typer.Option("--system", help="Only the system message.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="All metadata and tensors.")] = False,
) -> None:
    """Show what a model is.

    \b
    Examples:
      ollama-distributed show mymodel
      ollama-distributed show mymodel --modelfile > Modelfile
    """
    parts = {
        "license": license_,
        "modelfile": modelfile,
        "parameters": parameters,
        "template": template,
        "system": system,
    }
    wanted = [name for name, asked in parts.items() if asked]
    if len(wanted) > 1:
        raise typer.BadParameter("choose one of " + ", ".join(f"--{name}" for name in wanted))
    session: Session = ctx.obj
    with session.client() as client:
        shown = client.models.show(model, verbose=verbose)
    if wanted:
        output.write(printable(getattr(shown, wanted[0]).rstrip("\n") + "\n"))
    elif session.output != "table":
        output.write(output.structured(shown, session.output))
    else:
        output.write(described(shown, verbose=verbose))


def printable(text: str) -> str:
    """Untrusted text as it may be printed: untouched into a file or pipe."""
    import sys

    return clean(text) if output.is_terminal(sys.stdout) else text


def described(shown: ShowResponse, *, verbose: bool = False) -> str:
    """The sections of `show`."""
    info = shown.model_info
    family = str(info.get("general.architecture") or shown.details.family)
    size = info.get("general.parameter_count")
    facts: list[tuple[str, Any]] = [
        ("architecture", family),
        ("parameters", humanize.count(size) if isinstance(size, int) else shown.details.parameter_size),
        ("context length", info.get(f"{family}.context_length") or shown.details.context_length),
        ("embedding length", info.get(f"{family}.embedding_length") or shown.details.embedding_length),
        ("quantization", shown.details.quantization_level),
        ("requires", shown.requires),
    ]
    sections = [
        ("Model", [f"{name:<20}{value}" for name, value in facts if value]),
        ("Capabilities", list(shown.capabilities)),
        ("Parameters", [_aligned(line) for line in shown.parameters.splitlines() if line.strip()]),
        ("System", [line for line in shown.system.splitlines() if line.strip()]),
        ("License", [line for line in shown.license.splitlines() if line.strip()][:_LICENSE_LINES]),
    ]
    if verbose:
        rows = [f"{name:<44}{_value_text(value)}" for name, value in sorted(info.items())]
        sections.append(("Metadata", rows))
        tensors = [
            f"{tensor.get('name', '')!s:<44}{tensor.get('type', '')!s:<10}{tensor.get('shape', '')}"
            for tensor in shown.tensors or ()
        ]
        sections.append(("Tensors", tensors))
    return "".join(
        f"  {title}\n" + "".join(f"    {clean(line)}\n" for line in lines) + "\n"
        for title, lines in sections
        if lines
    )


def _aligned(line: str) -> str:
    name, _, value = line.strip().partition(" ")
    return f"{name:<20}{value.strip()}"


def _value_text(value: Any) -> str:
    text = clean_line(str(value))
    return text if len(text) <= 60 else text[:57] + "..."


def copy(
    ctx: typer.Context,
    source: Model,
    destination: Annotated[str, typer.Argument(metavar="NAME")],
) -> None:
    """Give a model a second name; no file is copied.

    \b
    Examples:
      ollama-distributed cp mymodel mymodel:backup
    """
    session: Session = ctx.obj
    with session.client() as client:
        client.models.copy(source, destination)
    output.note(f"copied '{clean_line(source)}' to '{clean_line(destination)}'")


def remove(
    ctx: typer.Context,
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", autocompletion=model_names)],
) -> None:
    """Unload and delete models; files that no other model uses are deleted with them.

    \b
    Examples:
      ollama-distributed rm mymodel:backup
    """
    session: Session = ctx.obj
    with session.client() as client:
        for name in models:
            client.models.delete(name)
            output.note(f"deleted '{clean_line(name)}'")


def stop(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", autocompletion=loaded_names)],
) -> None:
    """Unload a model from memory.

    \b
    Examples:
      ollama-distributed stop mymodel
    """
    session: Session = ctx.obj
    with session.client() as client:
        client.models.unload(model)
