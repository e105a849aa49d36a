"""Takes the place of `ServerProcess` in llama.cpp's tests: a plugin of pytest for `bench.llama_suite`.

Their tests choose a model and options, start a server and ask it. Here the node runs already; a start
gives it the model under the names that the test asks by, with the options as the model's parameters.
What changes on the way: `/v1` before the paths of OpenAI's that llama-server also answers without, `/healthz`
for `/health`, `model`, which llama-server does not need, the node's key for theirs, and the empty text that
opens OpenAI's streams, which is null there.
OpenAI's client, where a test uses it, talks to the node itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import re
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.models import Models

from bench import llama_cases, llama_judged

_FOLDER = Path(os.environ["LLAMA_SUITE_FOLDER"])
_KEY = os.environ["LLAMA_SUITE_KEY"]
_PREFIXED = ("/chat/completions", "/completions", "/responses", "/embeddings", "/models")
_ROUTES = re.compile(r"/v1/(chat/completions|completions|responses|embeddings|messages)|/(v1/)?rerank")
_NAMES = re.compile(r"""["']?model["']?\s*[=:]\s*["']([\w.:-]+)["']""")
_MODELS = Models(_FOLDER)
_test: list[pytest.Item] = []
"""The one that runs."""


def _install() -> None:
    """Before their `conftest` is read."""
    # One worker, and no downloads: what they have these for is not here.
    for name, field in (("filelock", "FileLock"), ("wget", "download")):
        module = types.ModuleType(name)
        setattr(module, field, contextlib.nullcontext)
        sys.modules[name] = module
    sys.path.insert(0, os.getcwd())  # noqa: PTH109 - a string for Python
    from utils import ServerPreset, ServerProcess

    asked, streamed = ServerProcess.make_request, ServerProcess.make_stream_request

    def make_request(
        self: Any, method: str, path: str, data: Any = None, headers: Any = None, *rest: Any, **more: Any
    ) -> Any:
        return asked(self, method, *_ours(self, path, data, headers), *rest, **more)

    def make_stream_request(
        self: Any, method: str, path: str, data: Any = None, headers: Any = None, *rest: Any, **more: Any
    ) -> Any:
        for chunk in streamed(self, method, *_ours(self, path, data, headers), *rest, **more):
            yield _theirs(chunk)

    ServerPreset.load_all = staticmethod(lambda: None)
    ServerProcess.start = _start
    ServerProcess.stop = _stop
    ServerProcess.make_request = make_request
    ServerProcess.make_stream_request = make_stream_request


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        name = item.nodeid.removeprefix("unit/")
        if reason := llama_judged.alone(name):
            item.add_marker(pytest.mark.skip(reason=reason))
        elif reason := llama_judged.otherwise(name):
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    told = terminalreporter.stats
    for title, reasons in (
        ("answered otherwise", [report.wasxfail for report in told.get("xfailed", [])]),
        ("not asked", [report.longrepr[2].removeprefix("Skipped: ") for report in told.get("skipped", [])]),
    ):
        terminalreporter.section(title)
        for reason, count in Counter(reasons).most_common():
            terminalreporter.line(f"{count:4} {reason}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    _test[:] = [item]


# ── the server ──────────────────────────────────────────────────────────────────────


def _stop(_self: Any) -> None:
    """The node stays; its models go when the next ones come."""


def _start(self: Any, **_timeout: int) -> None:
    self.url = os.environ["LLAMA_SUITE_CLOSED" if self.api_key else "LLAMA_SUITE_OPEN"]
    self.server_port = httpx.URL(self.url).port
    if self.model_hf_repo is None:  # theirs has no model either
        return
    test = _test[0]
    parameters = test.callspec.params if hasattr(test, "callspec") else {}
    names = _NAMES.findall(inspect.getsource(test.function))  # type: ignore[attr-defined]  # they have functions only
    self.name = (self.model_alias or "test").split(",")[0]
    names += [self.name, *(str(v) for k, v in parameters.items() if k == "model" and v)]
    options = {"num_predict": self.n_predict, "seed": self.seed, "temperature": self.temperature}
    if self.n_ctx and self.n_slots:
        options["num_ctx"] = self.n_ctx // self.n_slots
    fields = {"parameters": {name: value for name, value in options.items() if value is not None}}
    file = llama_cases.model(_MODELS, self, test.name.partition("[")[0], parameters)
    keys = {"Authorization": f"Bearer {_KEY}"} if self.api_key else {}
    with httpx.Client(base_url=self.url, headers=keys, timeout=60) as http:
        for name in {row["model"] for row in http.get("/api/tags").json()["models"]}:
            http.request("DELETE", "/api/delete", json={"model": name}).raise_for_status()
        digest = _upload(http, file)
        for name in set(names):
            body = {"model": name, "files": {file.name: digest}, "stream": False, **fields}
            http.post("/api/create", json=body).raise_for_status()


def _upload(http: httpx.Client, file: Path) -> str:
    content = file.read_bytes()
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    http.post(f"/api/blobs/{digest}", content=content).raise_for_status()
    return digest


def _ours(server: Any, path: str, data: Any, headers: Any) -> tuple[str, Any, Any]:
    if path.startswith(_PREFIXED):
        path = f"/v1{path}"
    elif path == "/health":
        path = "/healthz"
    if isinstance(data, dict) and data.get("model") is None and _ROUTES.match(path):
        data = {**data, "model": server.name}
    if headers and server.api_key:
        headers = {name: value and value.replace(server.api_key, _KEY) for name, value in headers.items()}
    return path, data, headers


def _theirs(chunk: dict[str, Any]) -> dict[str, Any]:
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta", {})
        if delta.get("role") and delta.get("content") == "":
            delta["content"] = None
    return chunk


_install()
