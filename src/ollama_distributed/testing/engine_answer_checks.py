"""Checks of engines: what they answer. Part of `engine_conformance`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import msgspec

from ollama_distributed.base.errors import ContextExceeded
from ollama_distributed.base.inference import JsonSchema, Message
from ollama_distributed.serving.ports import (
    ChatRequest,
    Done,
    Tokens,
)
from ollama_distributed.testing.engine_subject import (
    QUIET_S,
    Subject,
    answer,
    completion,
    load,
    model_of,
    need,
    slots_free,
)
from ollama_distributed.testing.recording import Recording

# ── answers ─────────────────────────────────────────────────────────────────────────


async def check_exact_answer(subject: Subject) -> None:
    """The whole text, counted, with one last event."""
    recording = await answer(await load(subject), completion(subject.prompt))
    done = recording.events[-1]
    assert isinstance(done, Done)
    assert recording.text == subject.answer
    assert done.reason == "stop"
    assert done.prompt_tokens > 0
    assert done.completion_tokens > 0
    assert done.cached_tokens <= done.prompt_tokens


async def check_ids(subject: Subject) -> None:
    """Ids are complete, detokenise to the text, and text never runs ahead of them."""
    need(subject, "ids", "tokenize")
    runner = await load(subject)
    recording = await answer(runner, completion(subject.prompt))
    assert await runner.detokenize(recording.ids) == subject.answer
    ids: list[int] = []
    said = b""
    for event in recording.events:
        if isinstance(event, Tokens):
            ids += event.ids
            said += event.text.encode() + event.raw
            assert (await runner.detokenize(ids)).startswith(said.decode(errors="ignore"))


async def check_continuation(subject: Subject) -> None:
    """Prompt and emitted ids go on with the next token: what a failover relies on."""
    need(subject, "ids")
    runner = await load(subject)
    ids = (await answer(runner, completion(subject.prompt))).ids
    for done in (1, len(ids) // 2, len(ids) - 1):
        rest = await answer(runner, completion((subject.prompt, tuple(ids[:done]))))
        assert rest.ids == ids[done:], f"after {done} of {len(ids)} tokens"


async def check_limit(subject: Subject) -> None:
    """`num_predict` ends the answer with `length` after exactly so many tokens."""
    recording = await answer(await load(subject), completion(subject.prompt, num_predict=2))
    done = recording.events[-1]
    assert isinstance(done, Done)
    assert done.reason == "length"
    assert done.completion_tokens == 2
    assert subject.answer.startswith(recording.text)
    if "ids" in subject.abilities:
        assert len(recording.ids) == 2


async def check_seeds(subject: Subject) -> None:
    """The same seed gives the same answer, another seed another one."""
    runner = await load(subject, model_of(subject.varied, "model that samples"))
    texts = [
        (await answer(runner, completion("the", seed=seed, temperature=1.0, num_predict=24))).text
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


async def check_logprobs(subject: Subject) -> None:
    """One entry for each token; as many alternatives as asked for; none unasked."""
    need(subject, "logprobs")
    runner = await load(subject)
    for top in (None, 0, 2):
        request = msgspec.structs.replace(completion(subject.prompt), top_logprobs=top)
        recording = await answer(runner, request)
        entries = [e for event in recording.events if isinstance(event, Tokens) for e in event.logprobs]
        if top is None:
            assert not entries
            continue
        assert b"".join(entry.bytes for entry in entries).decode() == subject.answer
        for entry in entries:
            assert entry.logprob <= 0
            assert math.isfinite(entry.logprob)
            assert len(entry.top) == top


async def check_format(subject: Subject) -> None:
    """An answer with a schema is JSON of that schema."""
    need(subject, "format")
    runner = await load(subject, model_of(subject.jsonish, "model for JSON"))
    request = msgspec.structs.replace(completion("JSON, please."), format=JsonSchema(subject.schema))
    value = json.loads((await answer(runner, request)).text)
    properties = subject.schema["properties"]
    assert isinstance(properties, dict)
    assert set(value) == set(properties)


async def check_context(subject: Subject) -> None:
    """A prompt that does not fit is refused with the numbers; the next one is answered."""
    need(subject, "context")
    runner = await load(subject, context=256)
    refused = Recording()
    runner.generate(completion("x y z " * 400), refused)
    error = (await refused.failed()).error
    assert isinstance(error, ContextExceeded)
    assert error.prompt_tokens >= error.context_tokens > 0
    assert (await answer(runner, completion(subject.prompt))).text == subject.answer


# ── chat ────────────────────────────────────────────────────────────────────────────


async def check_template(subject: Subject) -> None:
    """The rendered prompt holds what was said, in order."""
    need(subject, "template")
    runner = await load(subject)
    messages = (
        Message(role="system", content="Be brief."),
        Message(role="user", content="First."),
        Message(role="assistant", content="Yes."),
        Message(role="user", content="Second?"),
    )
    prompt = await runner.apply_template(messages)
    places = [prompt.index(message.content) for message in messages]
    assert places == sorted(places)
    assert (await answer(runner, completion(prompt))).text


async def check_tool_call(subject: Subject) -> None:
    """A call arrives with id, name and whole arguments, and the answer ends with `tool_calls`."""
    runner = await load(subject, model_of(subject.tools, "model that calls tools"))
    recording = Recording()
    messages = (Message(role="user", content=subject.tool_prompt),)
    runner.chat(ChatRequest(messages=messages, tools=(subject.tool,)), recording)
    done = await recording.done()
    assert done.reason == "tool_calls"
    (call,) = recording.tool_calls
    assert call.id
    assert call.name == subject.tool.name
    assert json.loads(call.arguments) == subject.tool_arguments


async def check_chat_cancel(subject: Subject) -> None:
    """A chat is cancelled as a completion is."""
    runner = await load(subject, subject.endless, slots=1)
    recording = Recording()
    messages = (Message(role="user", content=subject.endless_prompt),)
    generation = runner.chat(ChatRequest(messages=messages, tools=()), recording)
    await recording.pieces(2)
    generation.cancel()
    recording.cancelled = True
    if "metrics" in subject.abilities:
        await slots_free(runner)
    await recording.quiet(QUIET_S)
    assert not recording.breaches, recording.breaches


# ── the other questions ─────────────────────────────────────────────────────────────


async def check_tokenize(subject: Subject) -> None:
    """Text to ids and back."""
    need(subject, "tokenize")
    runner = await load(subject)
    for text in ("Hello, world", "caf\u00e9 \U0001f600", "line\nline"):
        ids = await runner.tokenize(text, add_special=False)
        assert ids
        assert await runner.detokenize(ids) == text
    assert await runner.tokenize("", add_special=False) == []


async def check_embed(subject: Subject) -> None:
    """Vectors have one length, depend on the text alone, and are the same for its ids."""
    runner = await load(subject, model_of(subject.embedder, "embedding model"), context=512)
    texts = ["the cat sat", "stock prices fell", "the cat sat"]
    vectors, tokens = await runner.embed(texts)
    assert tokens > 0
    assert [len(vector) for vector in vectors] == [subject.dimensions] * 3
    assert _near(vectors[0], vectors[2])
    assert not _near(vectors[0], vectors[1])
    assert all(math.isfinite(number) for vector in vectors for number in vector)
    if "tokenize" in subject.abilities:
        (from_ids,), _ = await runner.embed([await runner.tokenize(texts[0])])
        assert _near(from_ids, vectors[0])


def _near(left: Sequence[float], right: Sequence[float]) -> bool:
    cosine = sum(a * b for a, b in zip(left, right, strict=True)) / (math.hypot(*left) * math.hypot(*right))
    return cosine > 0.999


async def check_rerank(subject: Subject) -> None:
    """Scores come in the documents' order."""
    runner = await load(subject, model_of(subject.reranker, "rerank model"), context=512)
    documents = ["a red cat", "the market fell", "red cats and dogs"]
    scores, tokens = await runner.rerank("red cat", documents)
    assert tokens > 0
    assert len(scores) == 3
    assert len(set(scores)) > 1
    backwards, _ = await runner.rerank("red cat", documents[::-1])
    assert all(abs(a - b) < 0.05 for a, b in zip(scores, backwards[::-1], strict=True))


async def check_metrics(subject: Subject) -> None:
    """Slots and what is busy."""
    need(subject, "metrics")
    runner = await load(subject, subject.endless, slots=2)
    idle = await runner.metrics()
    assert (idle.slots, idle.slots_busy) == (2, 0)
    recording = Recording()
    generation = runner.generate(completion(subject.endless_prompt), recording)
    await recording.pieces(1)
    busy = await runner.metrics()
    assert busy.slots_busy == 1
    assert busy.kv_used is None or 0 <= busy.kv_used <= 1
    generation.cancel()
    recording.cancelled = True
    await slots_free(runner)
