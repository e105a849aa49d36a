"""Logs: whole lines, bounded, never in the way."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterator

import pytest
import structlog
from tests.limits import SOON_S

from ollama_distributed.base.inference import Usage
from ollama_distributed.gateway.summary import Summary
from ollama_distributed.node import logs
from ollama_distributed.node.logs import FIELD_BOUND, LineWriter, ascii_json, configure


@pytest.fixture
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    logs.requests.use(None)
    root.handlers[:] = handlers
    root.setLevel(level)


def test_lines_come_whole_and_in_order() -> None:
    out = io.StringIO()
    writer = LineWriter(out)
    lines = [f"line {i}" for i in range(5000)]
    for line in lines:
        writer.write(line)
    writer.close(5.0)
    assert out.getvalue().splitlines() == lines


class Stalled(io.StringIO):
    """A pipe whose reader sleeps."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.reached = threading.Event()

    def write(self, text: str) -> int:
        self.reached.set()
        self.go.wait(SOON_S)
        return super().write(text)


def test_a_stalled_reader_costs_lines_not_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "LINES_BOUND", 10)
    out = Stalled()
    writer = LineWriter(out)
    writer.write("first")
    assert out.reached.wait(SOON_S)
    for i in range(25):
        writer.write(f"line {i}")
    out.go.set()
    writer.close(5.0)
    assert out.getvalue().splitlines() == [
        "first",
        *(f"line {i}" for i in range(10)),
        "15 log lines were dropped: the reader was too slow",
    ]


@pytest.mark.usefixtures("_restored")
def test_what_a_client_sends_cannot_forge_a_line() -> None:
    out = io.StringIO()
    writer = configure("info", "json", out)
    evil = 'x"}\n{"event": "forged"}\x1b[2J\u202e\u2028'
    structlog.get_logger("t").info("real", model=evil, long="a" * (FIELD_BOUND + 9))
    structlog.get_logger("t").debug("hidden")
    logging.getLogger("library").warning("of %s", evil)
    writer.close(5.0)
    lines = out.getvalue().splitlines()
    assert out.getvalue().isascii()
    events = [json.loads(line) for line in lines]
    assert [event["event"] for event in events] == ["real", f"of {evil}"]
    assert events[0]["model"] == evil
    assert len(events[0]["long"]) == FIELD_BOUND + 1


def test_unusual_values_still_become_a_line() -> None:
    assert json.loads(ascii_json({"error": ValueError("ü"), "n": 1})) == {"error": "ü", "n": 1}


def _summary(model: str) -> Summary:
    return Summary(
        request_id="r1",
        method="POST",
        route="/api/chat",
        status=200,
        outcome="ok",
        took_s=1.23456789,
        first_byte_s=0.5,
        bytes_out=7,
        model=model,
        role="admin",
        key_id="k1",
        usage=Usage(prompt_tokens=3, completion_tokens=4),
    )


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("model", ["m", "m\u2028ü", "x" * (FIELD_BOUND + 1)])
def test_the_line_of_a_request_is_what_structlog_would_make_of_it(model: str) -> None:
    out = io.StringIO()
    writer = configure("info", "json", out)
    logs.requests(_summary(model))
    logs.requests.use(None)
    logs.requests(_summary(model))
    writer.close(5.0)
    assert out.getvalue().isascii()
    fast, slow = (json.loads(line) for line in out.getvalue().splitlines())
    assert len(fast.pop("timestamp")) == len(slow.pop("timestamp"))
    assert fast["model"].rstrip("…") == slow["model"].rstrip("…") == model[:FIELD_BOUND]
    fast["model"] = slow["model"]
    assert fast == slow
    assert (fast["took_s"], fast["completion_tokens"], fast["event"]) == (1.234568, 4, "gateway.request")


@pytest.mark.usefixtures("_restored")
def test_the_line_of_a_request_heeds_the_level() -> None:
    out = io.StringIO()
    writer = configure("warning", "json", out)
    logs.requests(_summary("m"))
    writer.close(5.0)
    assert not out.getvalue()
