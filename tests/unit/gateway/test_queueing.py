"""What a request says of its turn, and what its client is told while it waits."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from tests.gateway_bench import HELLO, Bench

from ollama_distributed.base.errors import Forbidden, Invalid, QueueFull
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.inference import Queued
from ollama_distributed.base.policies import Policy
from ollama_distributed.base.priority import Priority
from ollama_distributed.gateway.dialects import openai
from ollama_distributed.gateway.queueing import PRIORITY, PROGRESS, TIMEOUT, USUAL, Turn, turn_of
from ollama_distributed.testing.inference import ScriptedInference

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
WAITS = (Queued(position=3, eta_s=4.25), *HELLO)


def key(highest: Priority) -> Identity:
    return Identity(role="user", policy=Policy(name="p", priority=highest))


def test_a_request_that_asks_for_nothing_costs_nothing() -> None:
    assert turn_of({}, key("interactive")) is USUAL
    assert turn_of({}, key("normal")) is USUAL
    assert turn_of({}, Identity("local")) is USUAL


def test_a_class_up_to_that_of_the_key() -> None:
    assert turn_of({PRIORITY: "batch"}, key("normal")) == Turn("batch")
    assert turn_of({PRIORITY: " Interactive"}, key("interactive")) == Turn("interactive")
    assert turn_of({}, key("batch")) == Turn("batch")
    with pytest.raises(Forbidden, match="may have the class 'normal' at most, not 'interactive'"):
        turn_of({PRIORITY: "interactive"}, key("normal"))
    with pytest.raises(Invalid, match="one of interactive, normal, batch"):
        turn_of({PRIORITY: "now"}, key("interactive"))


def test_a_deadline_is_a_number_of_seconds() -> None:
    assert turn_of({TIMEOUT: "2.5"}, key("normal")) == Turn("normal", 2.5)
    assert turn_of({TIMEOUT: "20s", PROGRESS: "1"}, key("normal")) == Turn("normal", 20.0, True)
    for wrong in ("soon", "0", "-1", "nan", "inf", "1e9"):
        with pytest.raises(Invalid, match="number of seconds"):
            turn_of({TIMEOUT: wrong}, key("normal"))


def test_requests_carry_it() -> None:
    bench = Bench(ScriptedInference(HELLO))
    told = {"x-ollama-priority": "batch", "x-request-timeout": "9", "x-ollama-progress": "1"}
    bench.post("/api/chat", CHAT, **told)
    bench.post("/api/embed", {"model": "m", "input": "x"}, **told)
    chat, embed = bench.inference.requests
    assert (chat.priority, chat.within_s, chat.progress) == ("batch", 9.0, True)
    assert (embed.priority, embed.within_s) == ("batch", 9.0)
    out = bench.post("/api/chat", CHAT, **{"x-ollama-priority": "soon"})
    assert out.status == 400
    assert len(bench.inference.requests) == 2


def test_the_head_of_an_answer_says_where_it_waited() -> None:
    for body in (CHAT, {**CHAT, "stream": False}):
        out = Bench(ScriptedInference(WAITS)).post("/api/chat", body)
        assert (out.status, out.headers["x-queue-position"], out.headers["x-queue-eta"]) == (200, "3", "4.2")
        assert b"queue" not in out.body
    plain = Bench(ScriptedInference(HELLO)).post("/api/chat", CHAT)
    assert "x-queue-position" not in plain.headers


def test_who_asks_hears_at_once_in_a_line_of_ollamas_stream() -> None:
    bench = Bench(ScriptedInference(hold=True))
    out = bench.post("/api/chat", CHAT, **{"x-ollama-progress": "1"})
    (generation,) = bench.inference.generations
    generation.emit(Queued(position=3, eta_s=4.25))
    assert (out.status, out.headers["x-queue-position"]) == (200, "3")
    generation.emit(Queued(position=1), *HELLO)
    lines = [json.loads(line) for line in out.body.splitlines()]
    assert [line.get("queue") for line in lines[:2]] == [
        {"position": 3, "eta_s": 4.2},
        {"position": 1, "eta_s": None},
    ]
    assert all(line["message"]["content"] == "" and line["done"] is False for line in lines[:2])
    assert lines[-1]["done"]


def test_and_in_a_comment_of_server_sent_events() -> None:
    bench = Bench(ScriptedInference(WAITS), routes=openai.ROUTES)
    out = bench.post("/v1/chat/completions", {**CHAT, "stream": True}, **{"x-ollama-progress": "1"})
    assert out.body.startswith(b": queue position=3 eta_s=4.2\n\n")
    assert out.body.endswith(b"data: [DONE]\n\n")
    whole = Bench(ScriptedInference(WAITS), routes=openai.ROUTES).post("/v1/chat/completions", CHAT)
    assert whole.body.startswith(b"{")


def test_what_would_be_refused_is_refused_unread() -> None:
    bench = Bench(ScriptedInference(HELLO), routes=openai.ROUTES)
    seen: list[Turn] = []

    def shed(identity: Identity, turn: Turn) -> None:
        assert identity.role == "local"
        seen.append(turn)
        raise QueueFull("full", retry_after_s=7.0)

    bench.path.means = msgspec.structs.replace(bench.path.means, shed=shed)
    exchange, out = bench.open("/v1/chat/completions")
    exchange.receive(b"this is no JSON")
    exchange.body_complete()
    assert (out.status, 7 <= int(out.headers["retry-after"]) <= 16) == (429, True)
    assert json.loads(out.body)["error"]["code"] == "queue_full"
    large, refused = bench.open("/v1/chat/completions", **{"content-length": "2000000"})
    assert (large.ended, refused.status) == (True, 429)
    assert seen == [USUAL, USUAL]
    taken_up = bench.post(
        "/v1/chat/completions",
        {**CHAT, "stream": True},
        **{"x-ollama-resume-at": "0", "x-request-id": "r"},
    )
    assert taken_up.status == 200, "an answer that has begun is not shed"
