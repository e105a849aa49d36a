"""What `--help` says of every command."""

from __future__ import annotations

import functools
import re
from typing import Any

import typer

from ollama_distributed.cli.engine import app as engine_app
from ollama_distributed.cli.help import PlainCommand
from ollama_distributed.cli.join import join
from ollama_distributed.cli.main import app
from ollama_distributed.cli.serve import serve

WIDTH = 80


@functools.cache
def helps() -> dict[str, str]:
    """Of all commands but hidden ones, by name."""
    node = typer.Typer(rich_markup_mode=None)
    node.command("serve", cls=PlainCommand)(serve)
    node.command("join", cls=PlainCommand)(join)
    root = typer.main.get_command(app)
    with root.make_context("ollama-distributed", [], resilient_parsing=True) as parent:
        engine = typer.main.get_command(engine_app)
        with engine.make_context("engine", [], parent=parent, resilient_parsing=True) as inner:
            own = _helps(engine, "engine ", inner) | _helps(typer.main.get_command(node), "", parent)
        passed_on = {name: text for name, text in _helps(root, "", parent).items() if name != "engine"}
        return passed_on | own


def _helps(group: Any, prefix: str, context: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, command in group.commands.items():
        if command.hidden:
            continue
        with command.make_context(
            name, [], parent=context, resilient_parsing=True, terminal_width=WIDTH
        ) as inner:
            if hasattr(command, "commands"):
                found |= _helps(command, f"{prefix}{name} ", inner)
            else:
                found[prefix + name] = command.get_help(inner)
    return found


def test_every_command_has_examples_of_itself_and_no_words_of_python() -> None:
    found = helps()
    assert len(found) > 70
    for name, text in found.items():
        examples = text.partition("Examples:\n")[2].partition("\n\n")[0]
        assert re.search(rf"ollama-distributed( --host \S+)? {name}\b", examples), f"{name}: no examples"
        usage = text.partition("\n\n")[0]
        assert not any(mark in usage for mark in ("{", "[[", "......")), usage
        assert not any(word in text for word in ("<str>", "<list", "<int", "<path", "<file")), text


def test_what_a_command_shares_with_all_stands_apart() -> None:
    text = helps()["model distribute"]
    assert text.startswith("Usage: ollama-distributed model distribute [OPTIONS] MODEL [NODE]...\n")
    own, _, shared = text.partition("Global options:\n")
    assert "--wait / --no-wait" in own
    assert "--host" not in own
    assert "--host URL" in shared
