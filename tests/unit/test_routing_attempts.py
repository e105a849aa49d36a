"""One generation over several nodes: silent tries, one end, nothing after it."""

from __future__ import annotations

import pytest

from ollama_distributed.base.errors import (
    Invalid,
    ModelNotFound,
    OllamaDistributedError,
    QueueFull,
    RunnerDied,
    Unavailable,
)
from ollama_distributed.base.ids import NodeId, RequestId
from ollama_distributed.base.inference import Generation
from ollama_distributed.base.tokens import (
    ChatDelta,
    Done,
    EngineFailed,
    Prepared,
    Progress,
    Skipped,
    SourceEvent,
    SourceSink,
    Tokens,
)
from ollama_distributed.routing.attempts import Attempts

DONE = Done(reason="stop", prompt_tokens=1, cached_tokens=0, completion_tokens=1)


class Node:
    def __init__(self, sink: SourceSink) -> None:
        self.say = sink
        self.calls: list[str] = []

    def cancel(self) -> None:
        self.calls.append("cancel")

    def pause(self) -> None:
        self.calls.append("pause")

    def resume(self) -> None:
        self.calls.append("resume")


class Nodes:
    """Nodes that say what the test makes them say; `at_once`: what they refuse with at once."""

    def __init__(self, *names: str, at_once: dict[str, OllamaDistributedError] | None = None) -> None:
        self.asked: list[NodeId] = []
        self.begun: dict[str, Node] = {}
        self.heard: list[SourceEvent] = []
        self.at_once = at_once or {}
        self.attempts = Attempts(
            [NodeId(name) for name in names], self.begin, self.heard.append, RequestId("r1")
        )

    def begin(self, node: NodeId, sink: SourceSink) -> Generation:
        self.asked.append(node)
        self.begun[node] = Node(sink)
        if node in self.at_once:
            sink(EngineFailed(self.at_once[node]))
        return self.begun[node]


def test_the_first_answers() -> None:
    nodes = Nodes("a", "b")
    for event in (Prepared(), Progress(1, 1), Tokens((1,), "x"), DONE):
        nodes.begun["a"].say(event)
    assert nodes.heard == [Prepared(node="a", replica="a"), Progress(1, 1), Tokens((1,), "x"), DONE]
    assert nodes.asked == ["a"]


def test_a_refusal_leads_to_the_next_unseen() -> None:
    nodes = Nodes("a", "b", "c", at_once={"b": QueueFull("full")})
    nodes.begun["a"].say(Prepared(load_s=1.0))
    nodes.begun["a"].say(Progress(4, 2))
    nodes.begun["a"].say(EngineFailed(Unavailable("away")))
    assert nodes.asked == ["a", "b", "c"]
    nodes.begun["a"].say(Tokens((9,), "late"))  # of a node that was given up
    nodes.begun["c"].say(Prepared())
    nodes.begun["c"].say(Tokens((1,), "x"))
    nodes.begun["c"].say(DONE)
    assert nodes.heard == [
        Prepared(load_s=1.0, node="a", replica="a"),
        Progress(4, 2),
        Prepared(node="c", replica="c", route="retry"),
        Tokens((1,), "x"),
        DONE,
    ]


def test_all_refuse_and_the_most_telling_reason_is_shown() -> None:
    refusals = {"a": Unavailable("away"), "b": QueueFull("full"), "c": ModelNotFound("gone")}
    nodes = Nodes("a", "b", "c", at_once=refusals)
    assert nodes.heard == [EngineFailed(refusals["b"])]


@pytest.mark.parametrize("word", [Tokens((1,), "x"), ChatDelta(text="x"), Tokens((1,), "")])
def test_after_the_first_word_it_fails_honestly(word: SourceEvent) -> None:
    nodes = Nodes("a", "b")
    error = Unavailable("lost")
    nodes.begun["a"].say(word)
    nodes.begun["a"].say(EngineFailed(error))
    assert nodes.heard == [word, EngineFailed(error)]
    assert nodes.asked == ["a"]


@pytest.mark.parametrize("error", [Invalid("bad"), RunnerDied("a request that kills runners")])
def test_what_the_request_is_to_blame_for_goes_nowhere_else(error: OllamaDistributedError) -> None:
    nodes = Nodes("a", "b", at_once={"a": error})
    assert (nodes.heard, nodes.asked) == ([EngineFailed(error)], ["a"])


def test_nothing_to_generate_is_an_end() -> None:
    nodes = Nodes("a", "b")
    nodes.begun["a"].say(Skipped(reason="load"))
    assert nodes.heard == [Skipped(reason="load", node="a")]


def test_cancel_reaches_the_node_that_works_and_nothing_comes_after() -> None:
    nodes = Nodes("a", "b", at_once={"a": Unavailable("away")})
    nodes.attempts.cancel()
    nodes.attempts.cancel()
    nodes.begun["b"].say(Tokens((1,), "late"))
    assert (nodes.begun["b"].calls, nodes.heard) == (["cancel"], [])


def test_a_paused_answer_stays_paused_on_the_next_node() -> None:
    nodes = Nodes("a", "b")
    nodes.attempts.pause()
    nodes.begun["a"].say(EngineFailed(Unavailable("away")))
    assert nodes.begun["b"].calls == ["pause"]
    nodes.attempts.resume()
    assert nodes.begun["b"].calls == ["pause", "resume"]


def test_the_client_may_go_away_while_a_node_refuses() -> None:
    asked: list[NodeId] = []
    began: list[Node] = []

    def begin(node: NodeId, sink: SourceSink) -> Generation:
        asked.append(node)
        began.append(Node(sink))
        return began[-1]

    def hear(event: SourceEvent) -> None:
        attempts.cancel()

    attempts = Attempts([NodeId("a"), NodeId("b")], begin, hear, RequestId("r1"))
    began[0].say(Prepared())
    began[0].say(EngineFailed(Unavailable("away")))
    assert asked == ["a"]
    assert began[0].calls == ["cancel"]


def test_a_node_that_cannot_even_be_asked() -> None:
    def begin(node: NodeId, sink: SourceSink) -> Generation:
        if node == "a":
            raise Invalid("a number is too large")
        raise AssertionError("nobody else may be asked")

    heard: list[SourceEvent] = []
    Attempts([NodeId("a"), NodeId("b")], begin, heard.append, RequestId("r1"))
    (end,) = heard
    assert isinstance(end, EngineFailed)
    assert end.error.message == "a number is too large"
