"""Answers over a scripted source: order of events, ends, counts, defects."""

from __future__ import annotations

import msgspec
import pytest

from ollama_distributed.base.errors import DeadlineExceeded, EngineError, Internal, Unavailable
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import RequestId
from ollama_distributed.base.inference import (
    ChatPrompt,
    Delta,
    Event,
    Failed,
    Finished,
    Generation,
    InferenceRequest,
    Message,
    Opened,
    Sampling,
    ToolCall,
    Usage,
)
from ollama_distributed.base.tokens import (
    MOST_S,
    MOST_TOKENS,
    ChatDelta,
    Done,
    EngineFailed,
    Prepared,
    Progress,
    Resume,
    Skipped,
    SourceEvent,
    SourceSink,
    Tokens,
    plausible,
)
from ollama_distributed.streams import whole
from ollama_distributed.streams.answer import Answer
from ollama_distributed.streams.service import Answers

DONE = Done(
    reason="stop", prompt_tokens=7, cached_tokens=2, completion_tokens=3, prompt_s=0.5, completion_s=1.5
)


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


class Scripted:
    """A source whose events the test says, and which notes what is done to it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.say: SourceSink = lambda event: None
        self.broken = False

    def start(self, request: InferenceRequest, sink: SourceSink, resume: Resume | None = None) -> Generation:
        if self.broken:
            raise RuntimeError("no")
        self.say = sink
        return self

    def cancel(self) -> None:
        self.calls.append("cancel")

    def pause(self) -> None:
        self.calls.append("pause")

    def resume(self) -> None:
        self.calls.append("resume")


def request(**fields: object) -> InferenceRequest:
    defaults: dict[str, object] = {
        "request_id": RequestId("r1"),
        "identity": Identity("local"),
        "model": "m",
        "prompt": ChatPrompt(messages=(Message(role="user", content="secret question"),)),
    }
    return InferenceRequest(**{**defaults, **fields})  # type: ignore[arg-type]


def opened(asked: InferenceRequest | None = None) -> tuple[Scripted, list[Event], Answer]:
    source, events = Scripted(), list[Event]()
    answer = Answers(source, Clock()).open(asked or request(), events.append)  # type: ignore[arg-type]
    assert isinstance(answer, Answer)
    return source, events, answer


def say(source: Scripted, *events: SourceEvent) -> None:
    for event in events:
        source.say(event)


def test_an_answer_from_prepared_to_finished() -> None:
    source, events, _ = opened()
    say(source, Prepared(load_s=0.25), Progress(7, 3, 2))
    say(source, Tokens((1,), "Hel"), Tokens((2,), "lo"), Tokens((3,), ""), DONE, Tokens((4,), "late"))
    assert events[:3] == [Opened(prompt_tokens=7), Delta(text="Hel"), Delta(text="lo")]
    assert len(events) == 4
    end = events[3]
    assert isinstance(end, Finished)
    assert end.reason == "stop"
    usage = end.usage
    assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (7, 2, 3)
    assert (usage.load_s, usage.prompt_s, usage.completion_s) == (0.25, 0.5, 1.5)


def test_a_stop_sequence_ends_it_and_frees_the_source() -> None:
    source, events, _ = opened(request(want_context=True))
    say(source, Prepared(stop=("STOP",), prompt_ids=(8, 9)))
    say(source, Tokens((1,), "a ST"), Tokens((2,), "OP b"), Tokens((3,), "late"), DONE)
    assert events[:2] == [Opened(prompt_tokens=2), Delta(text="a ")]
    end = events[2]
    assert isinstance(end, Finished)
    assert (end.reason, end.stop_sequence, end.context) == ("stop", "STOP", (8, 9, 1, 2))
    assert end.usage.completion_tokens == 2
    assert source.calls == ["cancel"]
    assert len(events) == 3


def test_withheld_text_comes_out_at_the_end() -> None:
    source, events, _ = opened()
    say(source, Prepared(stop=("STOP",)), Tokens((1,), "a ST"), DONE)
    assert events[1:3] == [Delta(text="a "), Delta(text="ST")]


def test_nothing_comes_after_cancel() -> None:
    source, events, answer = opened()
    say(source, Prepared(), Tokens((1,), "a"))
    answer.cancel()
    answer.cancel()
    say(source, Tokens((2,), "b"), DONE)
    assert events == [Opened(), Delta(text="a")]
    assert source.calls == ["cancel"]


@pytest.mark.parametrize("at", [Opened, Delta])
def test_the_client_may_cancel_at_any_event(at: type[Event]) -> None:
    source, events = Scripted(), list[Event]()

    def hear(event: Event) -> None:
        events.append(event)
        if isinstance(event, at):
            answer.cancel()

    answer = Answers(source, Clock()).open(request(), hear)  # type: ignore[arg-type]
    say(source, Prepared(), Tokens((1,), "a"), Tokens((2,), "b"), DONE)
    assert type(events[-1]) is at


def test_pause_and_resume_reach_the_source() -> None:
    source, _, answer = opened()
    answer.pause()
    answer.resume()
    say(source, DONE)
    answer.pause()
    assert source.calls == ["pause", "resume"]


def test_a_failure_is_the_last_event() -> None:
    source, events, _ = opened()
    error = EngineError("why")
    say(source, Prepared(), Tokens((1,), "a"), EngineFailed(error), DONE)
    assert events[2:] == [Failed(error)]


def test_a_refusal_comes_without_opened() -> None:
    source, events, _ = opened()
    error = EngineError("why")
    say(source, EngineFailed(error))
    assert events == [Failed(error)]


@pytest.mark.parametrize("reason", ["load", "unload", "stop"])
def test_nothing_to_generate(reason: str) -> None:
    source, events, _ = opened()
    say(source, Skipped(reason=reason, rendered="p", rendered_images=1))  # type: ignore[arg-type]
    end = events[1]
    assert isinstance(end, Finished)
    assert (end.reason, end.rendered, end.rendered_images) == (reason, "p", 1)


def test_prepared_again_before_a_token_starts_over() -> None:
    source, events, _ = opened()
    say(source, Prepared(stop=("a",)), Progress(9, 9), Prepared(stop=("b",)), Tokens((1,), "ab"))
    assert events[1] == Delta(text="a")


def test_tool_calls_pass_and_stops_hold() -> None:
    source, events, _ = opened()
    call = ToolCall(id="c1", name="f", arguments="{}")
    say(source, Prepared(stop=("END",)), ChatDelta(thinking="hm"), ChatDelta(tool_calls=(call,)))
    say(source, ChatDelta(text="x E"), ChatDelta(text="ND y"), DONE)
    assert events[1:4] == [Delta(thinking="hm"), Delta(tool_calls=(call,)), Delta(text="x ")]
    assert isinstance(events[4], Finished)
    assert events[4].stop_sequence == "END"
    assert len(events) == 5


def test_a_source_that_raises_is_an_internal_error() -> None:
    source, events = Scripted(), list[Event]()
    source.broken = True
    Answers(source, Clock()).open(request(), events.append)  # type: ignore[arg-type]
    assert isinstance(events[0], Failed)
    assert isinstance(events[0].error, Internal)
    assert "r1" in events[0].error.message
    assert len(events) == 1


def test_a_node_that_ends_cuts_its_answers_and_looks_for_no_other_source() -> None:
    source, events = Scripted(), list[Event]()
    answers = Answers(source, Clock())  # type: ignore[arg-type]
    answers.open(request(), events.append)
    say(source, Prepared(), Tokens((1,), "a"))
    answers.cut()
    say(source, EngineFailed(Unavailable("the engine ends too")))
    assert source.calls == ["cancel"]
    assert [type(event) for event in events] == [Opened, Delta, Failed]
    assert isinstance(events[-1], Failed)
    assert "shutting down" in events[-1].error.message


def test_a_sink_that_raises_ends_its_answer_only(capsys: pytest.CaptureFixture[str]) -> None:
    source, events = Scripted(), list[Event]()

    def sink(event: Event) -> None:
        events.append(event)
        raise RuntimeError("the dialect has a defect")

    Answers(source, Clock()).open(request(), sink)  # type: ignore[arg-type]
    say(source, Prepared(), Tokens((1,), "a"), DONE)
    assert source.calls == ["cancel"]
    assert [type(event) for event in events] == [Opened, Failed]
    assert "secret question" not in capsys.readouterr().out


@pytest.mark.parametrize("resumable", [True, False])
def test_an_engine_without_end_fills_no_memory(resumable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runner that was taken over, asked for an answer that is sent whole."""
    monkeypatch.setattr(whole, "MOST_BYTES", 1 << 20)
    source, events, _ = opened(request(whole=True))
    say(source, Prepared(resumable=resumable), *[Tokens((1,), "x" * 1000)] * 2000, DONE)
    end = events[-1]
    assert isinstance(end, Failed)
    assert isinstance(end.error, EngineError)
    assert source.calls == ["cancel"]
    assert sum(len(event.text) for event in events if isinstance(event, Delta)) <= 1 << 20


def test_an_engine_that_goes_on_after_its_limit_is_cut() -> None:
    source, events = Scripted(), list[Event]()
    answers = Answers(source, Clock())  # type: ignore[arg-type]
    answers.open(request(sampling=Sampling(num_predict=10)), events.append)
    say(source, Prepared(), *[Tokens((1,), "x")] * 40)
    answers.look()
    assert isinstance(events[-1], Delta), "some count otherwise"
    say(source, *[Tokens((1,), "x")] * 300)
    answers.look()
    assert isinstance(events[-1], Failed)
    assert source.calls == ["cancel"]


@pytest.mark.parametrize(
    ("said", "counted"),
    [
        ((10**30, 0, 10**30), (MOST_TOKENS, 0, MOST_TOKENS)),
        ((-(10**15), 0, -(10**15)), (0, 0, 0)),
        ((7, 10**9, 3), (7, 7, 3)),  # paid for as less than nothing, were it believed
    ],
)
def test_what_an_engine_says_of_its_work_is_believed_within_reason(
    said: tuple[int, int, int], counted: tuple[int, int, int]
) -> None:
    """It is counted, paid for, and kept in ledgers whose numbers have 64 bits."""
    source, events, answer = opened()
    prompt, cached, completion = said
    say(source, Prepared(), Progress(prompt, 0, cached), Tokens((1,), "a"))
    so_far = answer.used()
    assert (so_far.prompt_tokens, so_far.cached_tokens) == counted[:2]
    done = msgspec.structs.replace(
        DONE, prompt_tokens=prompt, cached_tokens=cached, completion_tokens=completion
    )
    say(source, msgspec.structs.replace(done, prompt_s=1e300, completion_s=-1e300))
    end = events[-1]
    assert isinstance(end, Finished)
    usage = end.usage
    assert (usage.prompt_tokens, usage.cached_tokens) == counted[:2]
    assert usage.completion_tokens == (counted[2] or 1), "one was seen"
    assert 0.0 <= usage.completion_s <= usage.prompt_s <= MOST_S
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(usage), type=Usage) == usage


def test_what_was_said_on_the_way_is_no_more_than_what_is_said_at_the_end() -> None:
    source, events, _ = opened()
    say(source, Prepared(), Progress(1000, 0, 1000), Tokens((1,), "a"))
    say(source, msgspec.structs.replace(DONE, prompt_tokens=7, cached_tokens=0))
    end = events[-1]
    assert isinstance(end, Finished)
    assert (end.usage.prompt_tokens, end.usage.cached_tokens) == (7, 7)


@pytest.mark.parametrize("said_s", [float("nan"), float("inf"), -1.0])
def test_a_time_that_is_no_time_is_none(said_s: float) -> None:
    found = plausible(msgspec.structs.replace(DONE, prompt_s=said_s, completion_s=said_s))
    assert 0.0 <= found.prompt_s <= MOST_S
    assert 0.0 <= found.completion_s <= MOST_S


def test_no_context_of_an_engine_without_ids() -> None:
    source, events, answer = opened(request(want_context=True))
    say(source, Prepared(prompt_ids=(1,), resumable=True), Tokens((), "a"), DONE)
    assert isinstance(events[-1], Finished)
    assert events[-1].context == ()
    assert not answer.journal.resumable


def test_the_journal_holds_what_another_source_needs() -> None:
    source, _, answer = opened()
    say(source, Prepared(model_digest="d", resumable=True), Tokens((4, 5), "a"), Tokens((6,), ""))
    journal = answer.journal
    assert (journal.model_digest, journal.resumable, journal.ids) == ("d", True, [4, 5, 6])


# ── an answer without an end ─────────────────────────────────────────────────────────


def expiring(asked: InferenceRequest, longest_s: float) -> tuple[Answers, Scripted, Clock, list[Event]]:
    source, clock, events = Scripted(), Clock(), list[Event]()
    answers = Answers(source, clock, longest_s=longest_s)  # type: ignore[arg-type]
    answers.open(asked, events.append)
    return answers, source, clock, events


@pytest.mark.parametrize("whole", [False, True])
def test_an_answer_that_takes_too_long_ends_as_one_that_reached_its_length(whole: bool) -> None:
    """What waits for a stop sequence is said; the slot is free; who takes it up again finds its end."""
    asked = request(whole=whole, sampling=Sampling(stop=("END",)))
    answers, source, clock, events = expiring(asked, 60.0)
    clock.now += 500.0  # in the queue: that has bounds of its own
    say(source, Prepared(stop=("END",), resumable=True), Progress(7, 7, 2))
    say(source, Tokens((1,), "Hel"), Tokens((2,), "lo E"))
    clock.now += 59.0
    answers.look()
    assert not any(isinstance(event, Finished) for event in events)
    clock.now += 1.0
    answers.look()
    end = events[-1]
    assert isinstance(end, Finished)
    assert end.reason == "length"
    assert (end.usage.prompt_tokens, end.usage.cached_tokens, end.usage.completion_tokens) == (7, 2, 2)
    assert "".join(event.text for event in events if isinstance(event, Delta)) == "Hello E"
    assert source.calls[-1:] == ["cancel"]
    say(source, Tokens((3,), "late"))
    assert events[-1] is end
    written = answers.written(asked)
    assert written is not None
    assert written.done is not None
    assert written.done.reason == "length"
    answers.look()


def test_a_prompt_that_is_read_for_too_long_is_an_error() -> None:
    answers, source, clock, events = expiring(request(), 60.0)
    say(source, Prepared(), Progress(7, 3, 0))
    clock.now += 61.0
    answers.look()
    (end,) = [event for event in events if not isinstance(event, Opened)]
    assert isinstance(end, Failed)
    assert isinstance(end.error, DeadlineExceeded)
    assert source.calls == ["cancel"]


def test_how_long_an_answer_may_take_changes_while_it_runs() -> None:
    answers, source, clock, events = expiring(request(), 0.0)
    say(source, Prepared(), Tokens((1,), "a"))
    clock.now += 1e6
    answers.look()
    assert not any(isinstance(event, Finished) for event in events)
    answers.use(60.0)
    answers.look()
    assert isinstance(events[-1], Finished)
