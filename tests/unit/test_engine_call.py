"""A call has a last event, whatever goes wrong on the way; tokens are told together or one by one."""

from __future__ import annotations

import itertools
import json
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.limits import SOON_S

from ollama_distributed.adapters.engines.call import Call, together
from ollama_distributed.adapters.engines.llamacpp.stream import CompletionStream
from ollama_distributed.base.errors import Internal, Invalid
from ollama_distributed.base.inference import TokenLogprob, ToolCall
from ollama_distributed.base.tokens import ChatDelta, Done, EngineEvent, EngineFailed, Progress, Tokens

pytestmark = pytest.mark.anyio


async def test_a_defect_while_a_call_is_prepared_ends_it() -> None:
    events: list[EngineEvent] = []
    over = anyio.Event()
    call = Call(events.append, lambda _: over.set(), lambda _, __: None, read_error=lambda _, __: Internal())

    async def steps() -> None:
        raise KeyError("prompt")

    call.prepare(steps)
    with anyio.fail_after(SOON_S):
        await over.wait()
    (event,) = events
    assert isinstance(event, EngineFailed)
    assert isinstance(event.error, Internal)


@pytest.mark.parametrize(("error", "told"), [(Invalid("no"), Invalid), (KeyError("prompt"), Internal)])
async def test_a_refusal_at_once_comes_when_the_caller_can_cancel_it(
    error: Exception, told: type[Exception]
) -> None:
    events: list[EngineEvent] = []
    over = anyio.Event()
    call = Call(events.append, lambda _: over.set(), lambda _, __: None, read_error=lambda _, __: Internal())

    def step() -> None:
        raise error

    call.begin(step)
    assert not events
    with anyio.fail_after(SOON_S):
        await over.wait()
    (event,) = events
    assert isinstance(event, EngineFailed)
    assert isinstance(event.error, told)


def test_what_came_together_is_told_together() -> None:
    ids = Tokens((1,), "a"), Tokens((2, 3), "b"), Tokens((4,), "c")
    assert together([*ids]) == [Tokens((1, 2, 3, 4), "abc")]
    chat = ChatDelta(text="a"), ChatDelta(text="b")
    done = Done(reason="stop", prompt_tokens=1, cached_tokens=0, completion_tokens=2)
    assert together([*chat, done]) == [ChatDelta(text="ab", pieces=2), done]


@pytest.mark.parametrize(
    "alone",
    [
        Tokens((), "x"),
        Tokens((9,), "", raw=b"\xe2"),
        Tokens((9,), "x", logprobs=(TokenLogprob("x", -1.0, b"x"),)),
        ChatDelta(thinking="x"),
        ChatDelta(tool_calls=(ToolCall(id="1", name="f", arguments=""),)),
        Progress(total=2, processed=1),
    ],
)
def test_what_says_more_than_text_stays_alone(alone: EngineEvent) -> None:
    around = Tokens((1,), "a"), Tokens((2,), "b")
    assert together([*around, alone, *around]) == [Tokens((1, 2), "ab"), alone, Tokens((1, 2), "ab")]
    assert together([alone, alone]) == [alone, alone]


@given(
    st.lists(
        st.sampled_from([Tokens((1,), "a"), ChatDelta(text="b"), Tokens((), "c"), ChatDelta(thinking="d")])
    )
)
def test_nothing_is_lost_or_moved_where_events_are_joined(events: list[EngineEvent]) -> None:
    def said(of: list[EngineEvent]) -> str:
        return "".join(e.text + getattr(e, "thinking", "") for e in of if isinstance(e, Tokens | ChatDelta))

    joined = together(events)
    assert said(joined) == said(events)
    assert sum(e.pieces for e in joined if isinstance(e, ChatDelta)) == sum(
        isinstance(e, ChatDelta) for e in events
    )


# ── of a body ───────────────────────────────────────────────────────────────────────


class ByHand:
    """In place of a `Route`: its one exchange gets its body by hand."""

    status = 200

    def send(self, _body: bytes, **callbacks: Any) -> ByHand:
        self.on_body = callbacks["on_body"]
        return self

    def leave(self) -> None: ...

    def cancel(self) -> None: ...


def heard(pieces: list[bytes], *, joins: bool) -> list[EngineEvent]:
    events: list[EngineEvent] = []
    call = Call(events.append, lambda _: None, lambda *_: None, read_error=lambda *_: Internal(), joins=joins)
    route = ByHand()
    call.send(route, {}, CompletionStream())  # type: ignore[arg-type]  # as a `Route`
    for piece in pieces:
        route.on_body(piece)
    return events


def tokens_of(events: list[EngineEvent]) -> tuple[list[int], str]:
    found = [event for event in events if isinstance(event, Tokens)]
    return [one for event in found for one in event.ids], "".join(event.text for event in found)


def llama_events(texts: list[str]) -> list[bytes]:
    """One for each token, and the last; a text may be empty: a part of a character."""
    chunks: list[dict[str, Any]] = [
        {"content": text, "tokens": [number], "stop": False, "tokens_predicted": number}
        for number, text in enumerate(texts, 1)
    ]
    chunks.append({"content": "", "tokens": [], "stop": True, "stop_type": "limit"})
    return [b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n" for chunk in chunks]


@given(
    st.lists(st.sampled_from(["a", " b", "", "ü\n", "\n\ndata: {"]), max_size=12),
    st.lists(st.integers(0, 1500), max_size=4),
)
def test_the_tokens_do_not_depend_on_the_cuts_or_on_who_tells_them(texts: list[str], cuts: list[int]) -> None:
    body = b"".join(llama_events(texts))
    edges = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    pieces = [body[a:b] for a, b in itertools.pairwise(edges) if a < b]
    for joins in (False, True):
        for one in (pieces, llama_events(texts)):
            events = heard(one, joins=joins)
            assert tokens_of(events) == ([*range(1, len(texts) + 1)], "".join(texts))
            assert isinstance(events[-1], Done)


def test_what_comes_together_is_one_event_only_for_who_takes_it_so() -> None:
    *first, _last = llama_events(["a", "b", "c"])
    assert heard([b"".join(first)], joins=True) == [Tokens((1, 2, 3), "abc")]
    each = [Tokens((1,), "a"), Tokens((2,), "b"), Tokens((3,), "c")]
    assert heard([b"".join(first)], joins=False) == each
    assert heard(first, joins=False) == each
    assert heard(first, joins=True) == each


def test_who_cancels_hears_no_more_of_what_came_together() -> None:
    events: list[EngineEvent] = []

    def hear(event: EngineEvent) -> None:
        events.append(event)
        call.cancel()

    call = Call(hear, lambda _: None, lambda *_: None, read_error=lambda *_: Internal())
    route = ByHand()
    call.send(route, {}, CompletionStream())  # type: ignore[arg-type]  # as a `Route`
    route.on_body(b"".join(llama_events(["a", "b"])))
    assert events == [Tokens((1,), "a")]
