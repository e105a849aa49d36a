"""Limits at the door: what is reserved, what is refused in which words, what is counted at the end."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.gateway_bench import HELLO, USAGE, WALL, Bench

from ollama_distributed.access.metering import BorrowAsk, Borrowed, Meter, Ticket
from ollama_distributed.access.usage import Price
from ollama_distributed.base.errors import RateLimited, Unavailable
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import KeyId, NodeId, RequestId
from ollama_distributed.base.inference import (
    ChatPrompt,
    Delta,
    Failed,
    Finished,
    InferenceRequest,
    Message,
    Opened,
    Sampling,
    TextPrompt,
    Usage,
)
from ollama_distributed.base.policies import Limits, Policy
from ollama_distributed.base.usage import Sums
from ollama_distributed.gateway.dialects.contract import Generate
from ollama_distributed.gateway.dialects.table import HOT_ROUTES
from ollama_distributed.gateway.entry import Entrance
from ollama_distributed.gateway.gate import Admission, Gate
from ollama_distributed.gateway.metering import Need, limits_of, need_of, prompt_tokens
from ollama_distributed.testing.inference import ScriptedInference

ME = NodeId("g1")
CONTEXT = 400


class Alone:
    """A node without others: implements what a `Meter` asks for, and is what a gateway asks."""

    def __init__(self) -> None:
        self.had = Sums()
        self.meter = Meter(ME, self, self, self, lambda: WALL)
        self.need: Need | None = None

    def holders(self) -> tuple[NodeId, ...]:
        return (ME,)

    def living(self, nodes: Sequence[NodeId]) -> Sequence[NodeId]:
        return nodes

    async def borrow(self, node: Any, ask: Any) -> Any:
        if isinstance(ask, BorrowAsk):
            return Borrowed()
        return await self.meter.borrow(node, ask.amounts, 0.0)

    async def left(self, node: Any, ask: Any) -> Any:
        raise AssertionError("there is no other gateway")

    def own(self, at: float, *, key: str, team: str) -> Sums:
        return self.had

    async def others(self, at: float, *, key: str, team: str) -> Sums:
        return Sums()

    def longest(self, request: InferenceRequest) -> int:
        return CONTEXT

    def admit(self, identity: Identity, need: Need) -> Ticket | None:
        self.need = need
        price = Price(input=1.0, output=1.0)
        cost = price.cost(Usage(prompt_tokens=need.prompt_tokens, completion_tokens=need.answer_tokens))
        return self.meter.admit(identity, need.amounts, cost)


class Known(Gate):
    """Everyone is the same."""

    def __init__(self, gate: Gate, identity: Identity) -> None:
        self.limits = gate.limits
        self._identity = identity

    def admit(self, head: Any, right: Any) -> Admission:
        return Admission(self._identity, None)


def bench(limits: Limits, inference: Any = None) -> tuple[Bench, Alone]:
    one, alone = Bench(inference or ScriptedInference(HELLO), routes=HOT_ROUTES), Alone()
    identity = Identity(role="user", key_id=KeyId("k"), policy=Policy(name="p", limits=limits))
    gate = Known(one.path.means.gate, identity)
    one.path.means = msgspec.structs.replace(
        one.path.means, gate=gate, entrance=Entrance(one.path.means.inference, alone)
    )
    return one, alone


GEN = {"model": "m", "prompt": "p", "stream": False}
MESSAGES = {"model": "m", "max_tokens": 10, "messages": [{"role": "user", "content": "p"}]}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "p"}]}


def test_what_is_left_in_openais_names() -> None:
    one, _ = bench(Limits(requests_per_minute=2, tokens_per_minute=1000))
    first = one.post("/v1/chat/completions", CHAT)
    assert first.status == 200
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-limit-tokens"] == "1000"
    assert int(first.headers["x-ratelimit-remaining-tokens"]) < 1000 - CONTEXT
    assert first.headers["x-ratelimit-reset-tokens"].endswith("s")


def test_what_is_left_in_anthropics_names() -> None:
    one, _ = bench(Limits(requests_per_minute=1))
    answer = one.post("/v1/messages", MESSAGES)
    assert answer.headers["anthropic-ratelimit-requests-limit"] == "1"
    assert answer.headers["anthropic-ratelimit-requests-remaining"] == "0"
    assert answer.headers["anthropic-ratelimit-requests-reset"].endswith("Z")
    assert not any(name.startswith("x-ratelimit") for name in answer.headers)
    refused = one.post("/v1/messages", MESSAGES)
    assert refused.status == 429
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert refused.headers["anthropic-ratelimit-requests-remaining"] == "0"


@pytest.mark.parametrize(
    ("path", "body"), [("/api/generate", GEN), ("/api/v1/generate", GEN), ("/v1/chat/completions", CHAT)]
)
def test_a_refusal_says_when_to_come_back(path: str, body: Any) -> None:
    one, _ = bench(Limits(requests_per_minute=1))
    assert one.post(path, body).status == 200
    refused = one.post(path, body)
    assert refused.status == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert one.summaries[-1].error_code == RateLimited.code
    assert len(one.inference.requests) == 1, "it did not reach the model"


def test_without_limits_nothing_is_said_or_changed() -> None:
    one, alone = bench(Limits())
    answer = one.post("/api/generate", GEN)
    assert answer.status == 200
    assert not any("ratelimit" in name for name in answer.headers)
    assert alone.need is None
    assert one.inference.requests[0].sampling.num_predict is None


def test_an_answer_without_a_length_gets_the_longest_where_tokens_are_limited() -> None:
    one, _ = bench(Limits(tokens_per_minute=1000))
    assert one.post("/api/generate", GEN).status == 200
    assert one.inference.requests[0].sampling.num_predict == CONTEXT
    own, _ = bench(Limits(tokens_per_minute=1000))
    own.post("/api/generate", {**GEN, "options": {"num_predict": 7}})
    assert own.inference.requests[0].sampling.num_predict == 7


def test_what_was_not_needed_is_given_back() -> None:
    one, alone = bench(Limits(tokens_per_minute=CONTEXT + 100))
    for _ in range(3):  # each reserves nearly all, and needs little
        assert one.post("/api/generate", GEN).status == 200
    used = alone.meter._accounts["key/k/p"].shares["tokens"].used
    assert used == 3 * (USAGE.prompt_tokens + USAGE.completion_tokens)


def test_too_long_for_any_minute() -> None:
    one, _ = bench(Limits(tokens_per_minute=CONTEXT))
    refused = one.post("/api/generate", GEN)
    assert refused.status == 429
    assert "never fit" in refused.json()["error"]


def test_a_spent_budget_is_402() -> None:
    one, alone = bench(Limits(budget_per_month=1.0))
    alone.had = Sums(cost=1.0)
    for path, body in (("/api/generate", GEN), ("/v1/chat/completions", CHAT), ("/v1/messages", MESSAGES)):
        assert one.post(path, body).status == 402
    assert one.summaries[-1].error_code == "budget_spent"


def test_a_month_that_is_used_up() -> None:
    one, alone = bench(Limits(tokens_per_month=10_000))
    alone.had = Sums(prompt_tokens=9_000, completion_tokens=900)
    refused = one.post("/api/generate", GEN)
    assert refused.status == 429
    assert int(refused.headers["retry-after"]) > 60


def test_a_place_is_free_again_however_a_request_ends() -> None:
    inference = ScriptedInference(hold=True)
    one, alone = bench(Limits(concurrency=1), inference)
    for end in ("finished", "failed", "gone"):
        exchange, out = one.open("/api/generate")
        exchange.receive(msgspec.json.encode(GEN))
        exchange.body_complete()
        assert one.post("/api/generate", GEN).status == 429
        if end == "gone":
            exchange.disconnected()
        else:
            last = Failed(Unavailable("gone")) if end == "failed" else Finished(reason="stop")
            inference.generations[-1].emit(last)
            assert out.ended
        assert alone.meter._accounts["key/k/p"].shares["running"].used == 0


async def test_who_leaves_before_the_prompt_is_counted_leaves_nothing_begun() -> None:
    one, _ = bench(Limits())
    gate = Known(one.path.means.gate, Identity(role="user", policy=Policy(name="p", max_context=CONTEXT)))
    tasks: list[asyncio.Task[None]] = []

    def spawn(work: Any) -> Callable[[], object]:
        tasks.append(asyncio.get_running_loop().create_task(work))
        return tasks[-1].cancel

    one.path.means = msgspec.structs.replace(one.path.means, gate=gate, spawn=spawn)
    exchange, _ = one.open("/api/generate")
    with warnings.catch_warnings(record=True) as said:
        exchange.receive(msgspec.json.encode(GEN))
        exchange.body_complete()
        exchange.disconnected()
        await asyncio.wait(tasks)
    assert tasks[0].cancelled()
    assert not said
    assert one.summaries[0].outcome == "cancelled"


def test_what_was_had_of_a_cancelled_answer_is_counted() -> None:
    inference = ScriptedInference(hold=True)
    one, alone = bench(Limits(tokens_per_minute=1000), inference)
    exchange, _ = one.open("/api/generate")
    exchange.receive(msgspec.json.encode(GEN))
    exchange.body_complete()
    generation = inference.generations[0]
    generation.emit(Opened(prompt_tokens=3), Delta(text="a"))
    generation.spent = Usage(prompt_tokens=3, completion_tokens=2)
    exchange.disconnected()
    assert one.summaries[0].outcome == "cancelled"
    assert one.summaries[0].usage == generation.spent
    assert alone.meter._accounts["key/k/p"].shares["tokens"].used == 5


def test_a_rest_that_was_taken_up_counts_as_the_rest() -> None:
    whole, rest = Usage(prompt_tokens=9, completion_tokens=9), Usage(completion_tokens=4)
    one, _ = bench(Limits(), ScriptedInference([Finished(reason="stop", usage=whole, spent=rest)]))
    one.post("/api/generate", GEN)
    assert one.summaries[0].usage == rest


def test_prompts_of_one_request_add_up_and_choices_do_not() -> None:
    for body, prompts in (({"prompt": ["a", "b"]}, 2), ({"prompt": "a", "n": 2}, 1)):
        one, _ = bench(Limits())
        assert one.post("/v1/completions", {"model": "m", **body}).status == 200
        assert one.summaries[0].usage.prompt_tokens == prompts * USAGE.prompt_tokens
        assert one.summaries[0].usage.completion_tokens == 2 * USAGE.completion_tokens


@given(st.text(max_size=400), st.integers(1, 3))
def test_a_prompt_is_taken_for_more_than_half_its_bytes_or_all_of_its_others(text: str, count: int) -> None:
    """At least a token for two bytes of ASCII and for each byte of anything else."""
    identity = Identity(role="user")
    chat = ChatPrompt(messages=(Message(role="user", content=text),) * count)
    made = InferenceRequest(request_id=RequestId("r"), identity=identity, model="m", prompt=chat)
    plain = sum(character < "\x80" for character in text)
    others = len(text.encode(errors="replace")) - plain
    assert prompt_tokens(made) >= count * (plain // 2 + others)
    request = msgspec.structs.replace(made, prompt=TextPrompt(text=text), sampling=Sampling(num_predict=5))
    call = Generate((request,), None, False)  # type: ignore[arg-type]  # nothing is encoded
    need = need_of(call, Limits(tokens_per_minute=1), lambda _: 0)
    assert need.amounts.tokens == prompt_tokens(request) + 5


def test_who_has_limits() -> None:
    assert limits_of(None) is None
    assert limits_of(Identity(role="user")) is None
    assert limits_of(Identity(role="user", policy=Policy(name="p"))) is None
    some = Limits(concurrency=1)
    assert limits_of(Identity(role="user", policy=Policy(name="p", limits=some))) is some
