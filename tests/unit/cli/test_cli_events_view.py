"""What happens, as lines."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ollama_distributed.base.cluster import NodeRow
from ollama_distributed.base.events import Busy, QueuedRequest
from ollama_distributed.base.queue import QueueNode, QueueRow
from ollama_distributed.cli.events_view import event_line
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
        (Transfer(id="t", model="m", state="running", completed=500, total=1000), "m: 500 B of 1 KB"),
        (Transfer(id="t", model="m", state="failed", error="no disk"), "m: failed no disk"),
        (NodeRow(id="n1", name="\x1b[31mred", status="online", since=0.0), "␛[31mred: online"),
    ],
)
def test_a_line_for_each(data: Data, line: str) -> None:
    told = event_line(Event(channel="queue", what="changed", time=0.0, data=data))
    assert re.fullmatch(r"\d\d:\d\d:\d\d  queue      changed  .*\n", told)
    assert " ".join(told.split()[3:]) == line
