"""The documentation against the program: links, routes, commands, error codes, make targets."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer.main
from tests.gateway_bench import gateway

from ollama_distributed.adapters.engines.remote import OllamaEngine, OpenAIEngine
from ollama_distributed.cli.engine import app as engine_app
from ollama_distributed.cli.main import app
from ollama_distributed.client.errors import BY_CODE, ClientError
from ollama_distributed.gateway.errors import OLLAMA_STATUS, STATUS
from ollama_distributed.gateway.metrics import GatewayMetrics
from ollama_distributed.node.settings import read_settings
from ollama_distributed.testing.echo import EchoEngine
from ollama_distributed.testing.fake_cluster import FakeCluster
from ollama_distributed.testing.inference import ScriptedInference

ROOT = Path(__file__).parents[2]
PAGES = {
    str(page.relative_to(ROOT)): page.read_text()
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}
API = PAGES["docs/api.md"]
EVERYTHING: dict[str, Any] = {
    "cluster": FakeCluster(),
    "moves": object(),
    "places": object(),
    "bundles": object(),
    "disks": object(),
    "batches": object(),
    "audit": object(),
    "people": object(),
    "access": object(),
    "routing": object(),
    "usage": object(),
    "queues": SimpleNamespace(shed=None),
}
"""What has routes of its own."""
_LINK = re.compile(r"\]\((?P<target>[^)#\s]*)(?:#(?P<anchor>[^)\s]*))?\)")
_HEADING = re.compile(r"^#+ (?P<text>.+)$", re.MULTILINE)
_WAY_THERE = {"connection_failed", "connection_lost", "timed_out", "bad_answer"}
"""Codes that only the SDK has: no server answered them."""


def anchors(page: str) -> set[str]:
    """As GitHub makes them of headings."""
    texts = (match["text"].lower() for match in _HEADING.finditer(page))
    return {re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-") for text in texts}


def documented(code: str) -> list[str]:
    """The row of an error code in the table of docs/api.md, as its cells."""
    (row,) = (line for line in API.splitlines() if line.startswith("| `") and f"`{code}`" in line)
    return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for match in _LINK.finditer(PAGES[name]):
        target, anchor = match["target"], match["anchor"]
        if "://" in target:
            continue
        file = (ROOT / name).parent / target if target else ROOT / name
        assert file.exists(), f"{name} links to {target}"
        if anchor:
            assert anchor in anchors(file.read_text()), f"{name} links to {target}#{anchor}"


def test_every_route_is_in_the_api_page() -> None:
    app = gateway(ScriptedInference([]), **EVERYTHING)
    hot = [(route.method, route.path) for route in app.hot.routes()]
    cold = [(route.method, route.path) for route in app.cold_routes if not route.hidden]
    assert len(hot) > 10
    assert len(cold) > 20
    for method, path in hot + cold:
        written = f"`{method} {path.replace(':path', '')}`"
        assert written in API, f"docs/api.md lacks {written}"


def test_no_route_is_invented() -> None:
    app = gateway(ScriptedInference([]), **EVERYTHING)
    routes = {(route.method, route.path) for route in app.hot.routes()}
    routes |= {(route.method, route.path.replace(":path", "")) for route in app.cold_routes}
    written = re.findall(r"`(GET|HEAD|POST|PUT|PATCH|DELETE) (/[^`\s]*)`", API)
    assert set(written) <= routes


@pytest.mark.parametrize("error", STATUS, ids=lambda error: error.__name__)
def test_every_error_has_its_row(error: type) -> None:
    _, status, ollama, retryable = documented(error.code)  # type: ignore[attr-defined]
    assert status == str(STATUS[error])
    assert ollama == str(OLLAMA_STATUS[error])
    assert (retryable == "yes") == error.retryable  # type: ignore[attr-defined]


def test_the_codes_that_only_the_sdk_has_are_in_its_page() -> None:
    codes = {error.code for error in STATUS}
    assert BY_CODE.keys() - codes == _WAY_THERE
    for code in _WAY_THERE:
        name: type[ClientError] = BY_CODE[code]
        assert f"`{name.__name__}`" in PAGES["docs/sdk.md"]


def test_every_metric_is_in_the_api_page() -> None:
    names = set(re.findall(r"^# TYPE (\S+)", GatewayMetrics().render([]), re.MULTILINE))
    assert names
    for name in names:
        assert f"`{name}`" in API


def test_every_command_is_in_the_cli_page() -> None:
    page = PAGES["docs/cli.md"]
    commands = names_of(typer.main.get_command(app), "")
    commands += names_of(typer.main.get_command(engine_app), "engine ")
    assert len(commands) > 30
    for name in commands:
        *group, last = name.split()
        # `cluster token create`, `list`: a row names the group once.
        rows = [line for line in page.splitlines() if group and f"`{' '.join(group)} " in line]
        assert any(
            re.search(rf"`{word}[ `]", text) for word, text in [(name, page), (last, "".join(rows))]
        ), f"docs/cli.md lacks {name}"


def names_of(command: object, prefix: str) -> list[str]:
    """Of all commands that do something, with the groups that they are in."""
    found = []
    for name, inner in getattr(command, "commands", {}).items():
        if not inner.hidden:
            found += names_of(inner, f"{prefix}{name} ") or [f"{prefix}{name}"]
    return found


def test_the_engines_of_the_settings_examples_can_be_made(tmp_path: Path) -> None:
    makers = {"openai": OpenAIEngine, "ollama": OllamaEngine, "echo": EchoEngine}
    examples = re.findall(r"^```yaml\n(.*?)^```$", PAGES["docs/engines.md"], re.MULTILINE | re.DOTALL)
    assert examples
    for example in examples:
        file = tmp_path / "node.yaml"
        file.write_text(example)
        engines = read_settings(file).engines
        assert engines
        for one in engines:
            server = {"name": one.name, "url": one.url, "api_key": one.api_key.get_secret_value()}
            makers[one.kind]({**one.options, **(server if one.url else {})})


@pytest.mark.parametrize("name", PAGES)
def test_make_targets_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    said = re.findall(r"(?:`|^)make ([a-z][a-z0-9-]*)(?=[`\s])", PAGES[name], re.MULTILINE)
    assert set(said) <= targets
