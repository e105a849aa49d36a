"""What happens, as lines."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ollama_distributed.base.alerts import Alert
from ollama_distributed.base.cluster import NodeRow
from ollama_distributed.base.events import Busy, QueuedRequest
from ollama_distributed.base.queue import QueueNode, QueueRow
from ollama_distributed.cli.events import _show
from ollama_distributed.cli.events_view import event_line
from ollama_distributed.cli.session import Session
from ollama_distributed.client.following import Data, Event
from ollama_distributed.client.wire import Transfer


def waiting(**told: Any) -> QueuedRequest:
    return QueuedRequest(request_id="r", model="m", node="n", **told)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (waiting(position=2, eta_s=4.2), "r m at n: position 2, about 4.2 s"),
        (waiting(state="started"), "r m at n: started"),
        (
            QueueNode(node="n1", name="n", waiting=3, models=(QueueRow(model="m", running=2),)),
            "n: 3 wait, 2 run",
        ),
        (QueueNode(node="n1", error="no answer"), "n1: no answer"),
        (NodeRow(id="n1", name="n", status="offline", since=0.0, reason="it went"), "n: offline (it went)"),
        (Busy(node="n1", name="n", cpu_usage=12.0, memory_usage=50.0), "n: CPU 12 %, memory 50 %"),
        (Busy(node="n1", name="n", gpu_usage=7.0), "n: CPU 0 %, memory 0 %, GPU 7 %"),
        (Alert(level="warning", code="c", message="it is full: delete"), "warning: it is full: delete"),
        (Transfer(id="t", model="m", state="running", completed=500, total=1000), "m: 500 B of 1 KB"),
        (Transfer(id="t", model="m", state="failed", error="no disk"), "m: failed no disk"),
        (NodeRow(id="n1", name="\x1b[31mred", status="online", since=0.0), "␛[31mred: online"),
    ],
)
def test_a_line_for_each(data: Data, line: str) -> None:
    told = event_line(Event(channel="queue", what="changed", time=0.0, data=data))
    assert re.fullmatch(r"\d\d:\d\d:\d\d  queue      changed  .*\n", told)
    assert " ".join(told.split()[3:]) == line


def test_what_looks_the_same_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    shown: dict[tuple[str, str], str] = {}
    for what, waiting_s in (("now", 1.0), ("changed", 2.0), ("changed", 3.0), ("gone", 3.0), ("now", 1.0)):
        queue = QueueNode(node="n", waiting=1, models=(QueueRow(model="m", running=2, oldest_s=waiting_s),))
        _show(Session(), Event(channel="queues", what=what, id="n", data=queue), shown)  # type: ignore[arg-type]  # of `What`
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()] == ["now", "gone", "now"]
