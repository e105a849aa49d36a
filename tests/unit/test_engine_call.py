"""A call has a last event, whatever goes wrong on the way."""

from __future__ import annotations

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.limits import SOON_S

from ollama_distributed.adapters.engines.call import Call, together
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
