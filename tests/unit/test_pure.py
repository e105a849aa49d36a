"""What says that it is pure reaches no clock, chance, disk, loop or log by itself.

import-linter holds the planners to that through all that they import; here every module is held to the word
of its own first lines.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import ollama_distributed

ROOT = Path(ollama_distributed.__file__).parent
EFFECTS = frozenset(
    {"time", "random", "secrets", "os", "asyncio", "anyio", "logging", "structlog", "socket", "subprocess"}
)
SAYS_SO = re.compile(r"\bPure(?!,? but| rooms)\b|\(pure(?! but)\b")


def says_that_it_is_pure() -> list[Path]:
    texts = {path: path.read_text() for path in sorted(ROOT.rglob("*.py"))}
    near = [path for path, text in texts.items() if SAYS_SO.search(text, 0, 2000)]  # few need be parsed
    return [path for path in near if SAYS_SO.search(ast.get_docstring(ast.parse(texts[path])) or "")]


def imported(tree: ast.Module) -> set[str]:
    """First parts of what is imported to run: what is for type checkers only does nothing."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("path", says_that_it_is_pure(), ids=lambda path: str(path.relative_to(ROOT)))
def test_what_says_that_it_is_pure_is(path: Path) -> None:
    assert not imported(ast.parse(path.read_text())) & EFFECTS


def test_there_are_such_modules() -> None:
    assert len(says_that_it_is_pure()) > 80
