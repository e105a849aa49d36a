"""Modelfiles: read with Ollama's quoting rules, printed as `show --modelfile` does.

A command is a word, an argument follows on its line; an argument that opens with `"`
or a triple quote goes on until a line ends with the same. `#` starts a comment where a
command could stand. Source: Ollama `parser/parser.go`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from ollama_distributed.base.errors import Invalid, InvalidModel
from ollama_distributed.models import parameters
from ollama_distributed.models.spec import StoredMessage

MAX_BYTES = 16 << 20
"""Licenses and templates are text of people; 16 MiB is far beyond them."""

Role = Literal["system", "user", "assistant"]
_ROLES: tuple[Role, ...] = ("system", "user", "assistant")
_COMMANDS = frozenset(
    {
        "from", "license", "template", "system", "adapter", "draft", "renderer", "parser", "parameter",
        "message", "requires",
    }
)  # fmt: skip
_ENDS = re.compile(r'(?<=""")(?=[ \t]*\n)')
_KEEPS_OPEN = "\u200b"
"""Quotes at a line's end would close the argument, and what follows would be read as commands. The
reader drops this zero-width space, and sees no end there because of it."""
_UNKNOWN_COMMAND = (
    'command must be one of "from", "license", "template", "system", "adapter", "draft", "renderer", '
    '"parser", "parameter", "message", or "requires"'
)


class Command(msgspec.Struct, frozen=True):
    """One command. `option` names the PARAMETER or the MESSAGE's role; else empty."""

    name: str
    """Lower case."""
    argument: str
    option: str = ""


class Modelfile(msgspec.Struct, frozen=True, kw_only=True):
    """What a Modelfile asks for, ready to become a create request."""

    sources: tuple[str, ...]
    """Arguments of FROM: a model's name or files; more than one for model and projector."""
    adapters: tuple[str, ...] = ()
    drafts: tuple[str, ...] = ()
    template: str | None = None
    system: str | None = None
    renderer: str = ""
    parser: str = ""
    requires: str = ""
    license: tuple[str, ...] = ()
    messages: tuple[StoredMessage, ...] = ()
    parameters: Mapping[str, Any] = {}


def parse(source: str) -> Modelfile:
    """Read a Modelfile.

    Raises:
        InvalidModel: with the line and what is wrong there.
    """
    commands = parse_commands(source)

    def every(name: str) -> tuple[str, ...]:
        return tuple(command.argument for command in commands if command.name == name)

    def last(name: str) -> str | None:
        return every(name)[-1] if every(name) else None

    try:
        typed = parameters.from_text(
            [(command.option, command.argument) for command in commands if command.name == "parameter"]
        )
    except Invalid as exc:
        raise InvalidModel(exc.message) from exc
    return Modelfile(
        sources=every("from"),
        adapters=every("adapter"),
        drafts=every("draft"),
        template=last("template"),
        system=last("system"),
        renderer=last("renderer") or "",
        parser=last("parser") or "",
        requires=(last("requires") or "").removeprefix("v"),
        license=every("license"),
        messages=tuple(
            StoredMessage(role, command.argument)
            for command in commands
            for role in _ROLES
            if command.name == "message" and command.option == role
        ),
        parameters=typed,
    )


def parse_commands(source: str) -> list[Command]:
    """The commands in their order; there is at least one FROM."""
    if len(source) > MAX_BYTES:
        raise InvalidModel(f"Modelfile is over {MAX_BYTES >> 20} MiB")
    lines = source.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    commands: list[Command] = []
    row = 0
    while row < len(lines):
        line = lines[row].lstrip(" \t")
        row += 1
        if not line or line.startswith("#"):
            continue
        name, rest = _command(line, row)
        option = ""
        if name in ("parameter", "message"):
            option, rest = _option(name, rest, row)
        argument, row = _argument(rest, lines, row)
        commands.append(Command(name, argument, option))
    if not any(command.name == "from" for command in commands):
        raise InvalidModel("no FROM line")
    return commands


def print_commands(commands: Sequence[Command]) -> str:
    """The text of a Modelfile; reading it gives the same commands."""
    return "".join(_printed(command) + "\n" for command in commands)


def generated(
    *,
    display: str,
    weights: Sequence[str],
    adapters: Sequence[str] = (),
    template: str = "",
    system: str = "",
    renderer: str = "",
    parser: str = "",
    options: Mapping[str, Any] | None = None,
    licenses: Sequence[str] = (),
    messages: Sequence[StoredMessage] = (),
) -> str:
    """The Modelfile of a stored model, as `show --modelfile` prints it."""
    commands = [
        *(Command("from", path) for path in weights[:1]),
        *(Command("adapter", path) for path in adapters),
        *(Command("from", path) for path in weights[1:]),
        *(Command(name, value) for name, value in (("template", template), ("system", system)) if value),
        *(Command(name, value) for name, value in (("renderer", renderer), ("parser", parser)) if value),
        *(
            Command("parameter", parameters.text(value), name)
            for name, value in parameters.rows(options or {})
        ),
        *(Command("license", text) for text in licenses),
        *(Command("message", message.content, message.role) for message in messages),
    ]
    return (
        '# Modelfile generated by "ollama show"\n'
        "# To build a new Modelfile based on this, replace FROM with:\n"
        f"# FROM {display}\n\n" + print_commands(commands)
    )


def _command(line: str, row: int) -> tuple[str, str]:
    word, blank, rest = _cut(line)
    name = word.lower()
    if name not in _COMMANDS:
        raise InvalidModel(f"(line {row}): {_UNKNOWN_COMMAND}")
    if not blank:
        raise InvalidModel(f"(line {row}): {name.upper()} has no argument")
    return name, rest


def _option(name: str, rest: str, row: int) -> tuple[str, str]:
    option, blank, argument = _cut(rest.lstrip(" \t"))
    if name == "message" and option not in _ROLES:
        raise InvalidModel(f'(line {row}): message role must be one of "system", "user", or "assistant"')
    if not blank or not option.replace("_", "").isalnum() or not option.isascii():
        raise InvalidModel(f"(line {row}): {name.upper()} takes a name and a value")
    return option, argument


def _cut(text: str) -> tuple[str, str, str]:
    """The first word, the blank after it, and the rest."""
    for index, character in enumerate(text):
        if character in " \t":
            return text[:index], character, text[index + 1 :]
    return text, "", ""


def _argument(first: str, lines: Sequence[str], row: int) -> tuple[str, int]:
    """The argument that starts with `first`, and the row after it."""
    text = first.strip(" \t")
    quotes = next((some for some in ('"""', '"') if text.startswith(some)), "")
    if not quotes:
        return _printable(text), row
    if len(text) >= 2 * len(quotes) and text.endswith(quotes):
        return _printable(text[len(quotes) : -len(quotes)]), row
    # Line by line: looking at all that was collected each time takes hours for a million lines.
    collected = [first.lstrip(" \t")[len(quotes) :]]
    for end in range(row, len(lines)):
        line = lines[end].rstrip(" \t")
        if line.endswith(quotes):
            return _printable("\n".join([*collected, line[: -len(quotes)]])), end + 1
        collected.append(lines[end])
    raise InvalidModel(f"(line {row}): quotes are opened and never closed")


def _printable(text: str) -> str:
    """Ollama drops what cannot be printed, such as control characters and zero-width spaces."""
    return "".join(character for character in text if character.isprintable() or character in "\n\t")


def _printed(command: Command) -> str:
    option = f" {command.option}" if command.option else ""
    return f"{command.name.upper()}{option} {_quoted(command.argument)}"


def _quoted(text: str) -> str:
    """Quotes where the reader needs them: it trims ends and stops at a line's end."""
    text = _printable(text.replace("\r\n", "\n").replace("\r", "\n"))
    if "\n" in text or text != text.strip(" \t") or text.startswith('"') or not text:
        return f'"""{_ENDS.sub(_KEEPS_OPEN, text)}"""' if '"' in text or not text else f'"{text}"'
    return text
