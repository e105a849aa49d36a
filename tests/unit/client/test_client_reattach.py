"""What a stream that was lost is taken up with, and when it is not."""

from __future__ import annotations

import pytest

from ollama_distributed.client import calls, wire
from ollama_distributed.client.attempts import Servers
from ollama_distributed.client.errors import ClientError, ConnectionLost, NotFound, TimedOut, Unavailable
from ollama_distributed.client.reattach import MORE_RETRIES, Held

CALL = calls.generate(wire.GenerateRequest(model="m", prompt="p"), stream=True)
LOST = ConnectionLost("lost")


def held(retries: int = 2, **headers: str) -> Held[wire.GenerateResponse]:
    made = Held(CALL, retries)
    made.began({"x-request-id": "r1", **headers})
    return made


def test_the_rest_is_asked_for_by_id_and_bytes() -> None:
    one = held()
    one.got(wire.GenerateResponse(thinking="h\u00e4", response=""))
    one.got(wire.GenerateResponse(response="\U0001f600!"))
    again = one.lost(LOST)
    assert again.headers == {"x-request-id": "r1", "x-ollama-resume-at": str(3 + 5)}
    assert (again.path, again.body, again.repeat) == (CALL.path, CALL.body, "always")
    assert one.retries == MORE_RETRIES
    one.got(wire.GenerateResponse(response="more"))
    assert one.lost(LOST).headers["x-ollama-resume-at"] == "12"


def test_how_it_was_lost_is_told_when_it_cannot_be_taken_up() -> None:
    one = held()
    one.lost(LOST)
    with pytest.raises(ConnectionLost) as told:
        one.lost(NotFound("no such answer"))
    assert told.value is LOST
    with pytest.raises(ConnectionLost):
        one.lost(ConnectionLost("again, and nothing came"))


def test_a_server_that_says_that_it_stops_is_left_too() -> None:
    assert held().lost(Unavailable("shutting down")).headers["x-request-id"] == "r1"


def test_a_server_that_hangs_is_left_for_another_one() -> None:
    servers = Servers(("a", "b", "c"))
    servers.answered("b")
    one = Held(CALL, 2, servers.leave)
    one.began({"x-request-id": "r1"})
    one.got(wire.GenerateResponse(response="x"))
    assert one.lost(TimedOut("silent")).headers["x-ollama-resume-at"] == "1"
    assert servers.order() == ("c", "a", "b")


def test_what_is_not_taken_up() -> None:
    complete = held()
    complete.got(wire.GenerateResponse(done=True))
    other = Held(calls.pull_model("m"), 2)
    other.began({"x-request-id": "r1"})
    nameless: Held[wire.GenerateResponse] = Held(CALL, 2)
    nameless.began({})
    for one in (complete, other, nameless, held(retries=0)):
        with pytest.raises(ConnectionLost):
            one.lost(LOST)
    with pytest.raises(ClientError, match="refused"):
        held().lost(NotFound("refused"))
