"""A grammar after the thoughts: what one runner says in two runs is heard as one answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import msgspec
import pytest

from ollama_distributed.base.errors import RunnerDied
from ollama_distributed.base.inference import JsonObject, Sampling
from ollama_distributed.base.queue import Run
from ollama_distributed.base.tokens import Done, EngineEvent, EngineFailed, EngineSink, Progress, Tokens
from ollama_distributed.serving.grammar import GrammarAfterThoughts
from ollama_distributed.serving.options import Shape, plan_of
from ollama_distributed.serving.ports import CompletionRequest, Runner
from ollama_distributed.serving.prompts import Prompt
from ollama_distributed.serving.residents import Keeper, Lease, Resident
from ollama_distributed.testing.echo import echo_model

TAGS = ("<think>", "</think>")
PROMPT = Prompt(
    ask=CompletionRequest(prompt="hi", sampling=Sampling(num_predict=10), format=JsonObject()),
    rendered="hi",
    thinking_tags=TAGS,
)
ENDED = Done(reason="stop", prompt_tokens=1, cached_tokens=0, completion_tokens=2)


class OneRun:
    def __init__(self, ask: CompletionRequest, sink: EngineSink) -> None:
        self.ask = ask
        self.say = sink
        self.paused = self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False


class Runs:
    """A runner that says what the test says."""

    def __init__(self) -> None:
        self.all: list[OneRun] = []

    def generate(self, ask: CompletionRequest, sink: EngineSink) -> OneRun:
        self.all.append(OneRun(ask, sink))
        return self.all[-1]


class Heard:
    def __init__(self, prompt: Prompt = PROMPT) -> None:
        runs = Runs()
        self.runs = runs.all
        self.events: list[EngineEvent] = []
        self.then: Callable[[], None] = lambda: None
        """After each event."""
        shape = Shape(context_tokens=64, slots=1)
        plan = plan_of(shape, slots=1, threads=1)
        resident = Resident("m", echo_model("m"), shape, plan, 1)
        lease = Lease(cast("Keeper", None), resident, cast("Runner", runs), Run("m", "k", 0.0, 0.0))
        self.resident = resident
        self.answer = GrammarAfterThoughts(lease, prompt, self._hear)

    def _hear(self, event: EngineEvent) -> None:
        self.events.append(event)
        self.then()

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Tokens))


def said(text: str) -> Tokens:
    return Tokens(ids=(1,), text=text)


@pytest.mark.parametrize("ids", [(), (7, 8)])
def test_the_second_run_goes_on_after_the_thoughts_with_the_grammar(ids: tuple[int, ...]) -> None:
    heard = Heard(msgspec.structs.replace(PROMPT, ids=ids))
    first = heard.runs[0]
    assert first.ask.format is None
    for text in ("<th", "ink>hm", "</think>lost"):
        first.say(said(text))
    second = heard.runs[1]
    assert first.cancelled
    assert second.ask.format == JsonObject()
    assert second.ask.sampling.num_predict == 10 - 3
    thoughts = "<think>hm</think>\n\n"
    assert second.ask.prompt == ((ids, thoughts) if ids else "hi" + thoughts)
    second.say(Progress(total=9, processed=9))
    second.say(said("{}"))
    second.say(ENDED)
    assert heard.text == "<think>hm</think>{}"
    last = heard.events[-1]
    assert isinstance(last, Done)
    assert (last.completion_tokens, last.prompt_tokens) == (3 + 2, 0)
    assert not any(isinstance(event, Progress) for event in heard.events)


def test_an_answer_without_thoughts_begins_again_with_the_grammar() -> None:
    heard = Heard()
    heard.runs[0].say(said("no JSON"))
    heard.runs[1].say(said("{}"))
    heard.runs[1].say(ENDED)
    assert heard.text == "{}"
    assert heard.events[-1] == ENDED


def test_what_was_held_back_is_said_where_the_answer_ends_there() -> None:
    heard = Heard()
    heard.runs[0].say(said("<thi"))
    assert heard.events == []
    heard.runs[0].say(ENDED)
    assert heard.events == [said("<thi"), ENDED]


def test_a_failure_is_told_once_and_nothing_comes_after_it() -> None:
    heard = Heard()
    heard.runs[0].say(said("<thi"))
    failed = EngineFailed(RunnerDied("gone"))
    heard.runs[0].say(failed)
    heard.runs[0].say(said("nk>"))
    assert heard.events == [failed]


@pytest.mark.parametrize("slow", [True, False])
def test_the_second_run_has_the_readers_pace(slow: bool) -> None:
    heard = Heard()
    heard.answer.pause()
    if not slow:
        heard.answer.resume()
    heard.runs[0].say(said("<think>a</think>"))
    assert [run.paused for run in heard.runs[1:]] == [slow]


def test_a_reader_that_leaves_while_it_hears_the_thoughts_ends_it() -> None:
    heard = Heard()
    heard.then = heard.answer.cancel
    for text in ("<think>", "a</think>"):
        heard.runs[0].say(said(text))
    assert len(heard.runs) == 1
    assert heard.runs[0].cancelled
    assert len(heard.events) == 1


def test_what_is_held_back_is_a_sign_of_life_all_the_same() -> None:
    heard = Heard()
    heard.runs[0].say(said("<thi"))
    assert heard.resident.heard
