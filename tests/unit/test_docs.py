"""The documentation against the program: links, routes, commands, error codes, make targets."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer.main
from tests.gateway_bench import gateway

from ollama_distributed.adapters.engines.remote import OllamaEngine, OpenAIEngine
from ollama_distributed.base.disk import DiskFigures
from ollama_distributed.base.pieces import PieceFigures
from ollama_distributed.base.placement import PlacementFigures
from ollama_distributed.base.queue import Histogram, QueueFigures
from ollama_distributed.base.transfers import TransferFigures
from ollama_distributed.base.usage import UsageFigures
from ollama_distributed.cli.engine import app as engine_app
from ollama_distributed.cli.join import join
from ollama_distributed.cli.main import app
from ollama_distributed.cli.serve import serve
from ollama_distributed.client.errors import BY_CODE, ClientError
from ollama_distributed.gateway import openapi
from ollama_distributed.gateway.errors import OLLAMA_STATUS, STATUS
from ollama_distributed.gateway.metrics import GatewayMetrics
from ollama_distributed.gateway.overload import MemoryFigures
from ollama_distributed.node.settings import read_settings
from ollama_distributed.testing.echo import EchoEngine
from ollama_distributed.testing.fake_cluster import FakeCluster
from ollama_distributed.testing.inference import ScriptedInference

ROOT = Path(__file__).parents[2]
PAGES = {
    str(page.relative_to(ROOT)): page.read_text()
    for page in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "SECURITY.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    )
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


def test_statuses_and_parameters_of_a_route_are_in_its_row() -> None:
    app = gateway(ScriptedInference([]), **EVERYTHING)
    document = openapi.document(app.hot.routes(), app.cold_routes, version="1")
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            rows = "".join(line for line in API.splitlines() if f"`{method.upper()} {path}`" in line)
            statuses = operation["responses"].keys() - {"200", "default"}
            named = {one["name"] for one in operation.get("parameters", ()) if one.get("in") == "query"}
            lacking = {word for word in statuses | named if word not in rows}
            assert not lacking, f"the row of {method.upper()} {path} lacks {lacking}"


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


def test_the_metrics_of_the_api_page_are_those_that_there_are() -> None:
    nothing = Histogram(bounds=(1.0,), counts=(0, 0), total=0.0)
    rendered = GatewayMetrics().render(
        [],
        DiskFigures(quota_bytes=1),
        PieceFigures(),
        PlacementFigures(waiting=0, short=0),
        TransferFigures(),
        QueueFigures(waited=nothing, eta_error=nothing),
        UsageFigures(),
        MemoryFigures(),
    )
    names = set(re.findall(r"^# TYPE (\S+)", rendered, re.MULTILINE))
    assert set(re.findall(r"`(ollama_distributed_\w+)`", API)) == names


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


@pytest.mark.parametrize("name", PAGES)
def test_examples_name_commands_and_options_that_there_are(name: str) -> None:
    """Of lines such as `ollama-distributed key create --role user`, in text and in fences."""
    known = all_options()
    for line in re.findall(r"ollama-distributed ([a-z][^`\n#|]*)", PAGES[name]):
        words = line.split()
        command = next((c for i in (3, 2, 1) if (c := " ".join(words[:i])) in known), None)
        assert command is not None, f"{name}: there is no command of `{line}`"
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", line):
            assert option in known[command], f"{name}: `{command}` has no {option}"


@functools.cache
def all_options() -> dict[str, set[str]]:
    """Of all commands by their names, hidden ones too; `Command` adds the program's own options."""
    node = typer.Typer()
    node.command("serve")(serve)
    node.command("join")(join)
    root = typer.main.get_command(app)
    with root.make_context("ollama-distributed", [], resilient_parsing=True) as parent:
        return options_of(root, "", parent) | {
            name: found
            for command, prefix in ((node, ""), (engine_app, "engine "))
            for name, found in options_of(typer.main.get_command(command), prefix, parent).items()
        }


def options_of(command: Any, prefix: str, parent: Any) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, inner in getattr(command, "commands", {}).items():
        context = inner.make_context(name, [], parent=parent, resilient_parsing=True)
        taken = {text for one in inner.get_params(context) for text in (*one.opts, *one.secondary_opts)}
        found |= options_of(inner, f"{prefix}{name} ", context) or {f"{prefix}{name}": taken}
    return found


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


def test_every_decision_is_in_the_list_of_them() -> None:
    folder = ROOT / "docs/adr"
    listed = (folder / "README.md").read_text()
    for page in sorted(folder.glob("0*.md")):
        number, _, title = page.read_text().splitlines()[0].removeprefix("# ").partition(". ")
        assert f"| {number} | [{title}]({page.name}) |" in listed
