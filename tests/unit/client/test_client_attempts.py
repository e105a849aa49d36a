"""Which URL next, after which failure, how long to wait: the plan alone, without a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.client import calls, errors
from ollama_distributed.client.attempts import (
    MAX_WAIT_S,
    Failure,
    Outcome,
    Send,
    Servers,
    Succeeded,
    Wait,
    attempts,
)

REFUSED = Failure(stage="connect", text="refused")
LOST = Failure(stage="unanswered", text="reset")
TORN = Failure(stage="answering", text="reset")
SILENT = Failure(stage="unanswered", text="silent", timed_out=True)


def call(repeat: calls.Repeat) -> calls.Call[Any]:
    return calls.Call(method="POST", path="/", decode=lambda data: data, repeat=repeat)


def unavailable(status: int = 503, wait_s: float | None = None) -> errors.Unavailable:
    return errors.Unavailable("later", status=status, retry_after_s=wait_s)


def run(
    outcomes: Sequence[Outcome],
    *,
    urls: tuple[str, ...] = ("a",),
    repeat: calls.Repeat = "unanswered",
    retries: int = 2,
    draw: float = 0.5,
    servers: Servers | None = None,
) -> tuple[list[str | float], Any]:
    """Play the outcomes (the last for ever); what was sent where and waited, and the end."""
    steps = attempts(call(repeat), servers or Servers(urls), retries=retries, draw=lambda: draw)
    trace: list[str | float] = []
    left = list(outcomes)
    outcome: Outcome | None = None
    try:
        while True:
            step = steps.send(outcome)
            if isinstance(step, Send):
                trace.append(step.url)
                outcome = left.pop(0) if len(left) > 1 else left[0]
            else:
                assert isinstance(step, Wait)
                trace.append(step.seconds)
                outcome = None
    except StopIteration as finished:
        return trace, finished.value
    except errors.ClientError as error:
        return trace, error


def test_an_answer_ends_it() -> None:
    assert run([Succeeded(7)]) == (["a"], 7)


def test_the_next_server_is_asked_at_once_and_remembered() -> None:
    servers = Servers(("a", "b", "c"))
    assert run([REFUSED, Succeeded(1)], servers=servers) == (["a", "b"], 1)
    assert run([Succeeded(2)], servers=servers) == (["b"], 2)
    assert run([REFUSED, REFUSED, Succeeded(3)], servers=servers) == (["b", "c", "a"], 3)


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_server_that_cannot_now_is_passed_over(status: int) -> None:
    assert run([unavailable(status), Succeeded(1)], urls=("a", "b"))[0] == ["a", "b"]


def test_a_full_queue_is_waited_for_at_the_same_server() -> None:
    full = errors.QueueFull("full", status=429, retry_after_s=3.0)
    trace, end = run([full, Succeeded(1)], urls=("a", "b"), draw=0.0)
    assert (trace, end) == (["a", 3.0, "a"], 1)


def test_back_off_grows_and_is_drawn() -> None:
    assert run([REFUSED], retries=3, draw=1.0)[0] == ["a", 0.25, "a", 0.5, "a", 1.0, "a"]
    assert run([REFUSED], retries=2, draw=0.0)[0] == ["a", 0.0, "a", 0.0, "a"]


def test_a_server_that_asks_for_too_long_is_left_to_the_caller() -> None:
    trace, end = run([unavailable(wait_s=MAX_WAIT_S + 1)])
    assert trace == ["a"]
    assert end.retry_after_s == MAX_WAIT_S + 1


@pytest.mark.parametrize(
    ("repeat", "outcome", "again"),
    [
        ("always", REFUSED, True),
        ("always", LOST, True),
        ("always", TORN, True),
        ("always", SILENT, True),
        ("unanswered", REFUSED, True),
        ("unanswered", LOST, True),
        ("unanswered", TORN, False),
        ("unanswered", SILENT, False),
        ("unsent", REFUSED, True),
        ("unsent", LOST, False),
        ("unsent", TORN, False),
        ("unsent", SILENT, False),
        ("unsent", unavailable(503), True),
        ("unsent", unavailable(502), False),
        ("unanswered", unavailable(502), True),
        ("always", errors.ModelNotFound("no", status=404), False),
        ("always", errors.Internal("oh", status=500), False),
        ("unanswered", errors.RunnerDied("oh", status=500), True),
    ],
)
def test_only_what_is_safe_is_repeated(repeat: calls.Repeat, outcome: Outcome, again: bool) -> None:
    trace, end = run([outcome, Succeeded("good")], repeat=repeat)
    assert (len(trace) > 1) is again
    assert (end == "good") is again


def test_a_server_that_answered_says_more_than_one_that_is_away() -> None:
    _, end = run([REFUSED, unavailable()], urls=("a", "b"), retries=0)
    assert end.status == 503


@given(
    st.lists(
        st.sampled_from([REFUSED, LOST, unavailable(), unavailable(wait_s=1.0)]), min_size=1, max_size=6
    ),
    st.integers(1, 4),
    st.integers(0, 4),
    st.floats(0, 1, exclude_max=True),
)
def test_it_always_ends_within_its_budget(
    outcomes: list[Outcome], servers: int, retries: int, draw: float
) -> None:
    urls = tuple(f"s{n}" for n in range(servers))
    trace, end = run(outcomes, urls=urls, retries=retries, draw=draw)
    assert isinstance(end, errors.ClientError)
    assert len([step for step in trace if isinstance(step, str)]) <= servers * (retries + 1)
    assert all(0 <= step <= 2 * MAX_WAIT_S for step in trace if isinstance(step, float))


def test_a_certificate_that_is_not_trusted_is_no_server_that_does_not_answer() -> None:
    text = "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate (_ssl.c:1006)"
    told = str(Failure(stage="connect", text=text).error("https://gpu1"))
    assert told == "the certificate of https://gpu1 does not hold here: self-signed certificate"
    assert str(REFUSED.error("https://gpu1")) == "no server answers at https://gpu1 (refused)"
