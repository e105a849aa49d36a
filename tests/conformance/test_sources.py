"""One suite for every `streams.ports.Source`: serving itself, and the router in front of it,
here and over a hop. Whoever asks cannot tell them apart."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.hop_nodes import HopNode, cluster, text_request, until

from ollama_distributed.base.errors import (
    ContextExceeded,
    Invalid,
    LoadFailed,
    ModelNotFound,
    RunnerDied,
    Unsupported,
)
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import RequestId
from ollama_distributed.base.inference import EmbedRequest, RerankRequest, Sampling
from ollama_distributed.base.tokens import (
    Done,
    EngineFailed,
    Prepared,
    Progress,
    Resume,
    Skipped,
    SourceEvent,
    Tokens,
)
from ollama_distributed.streams.ports import Source
from ollama_distributed.testing.echo import echo_model

LAST = (Done, Skipped, EngineFailed)


class Subject:
    """A source, and the node on which its runners are."""

    def __init__(self, source: Source, node: HopNode) -> None:
        self.source = source
        self.node = node

    async def events(self, model: str = "m", text: str = "hello there", **fields: Any) -> list[SourceEvent]:
        heard: list[SourceEvent] = []
        self.source.start(text_request(model, text, **fields), heard.append)
        await until(lambda: heard and isinstance(heard[-1], LAST), "the last event")
        return heard

    async def failure(self, model: str = "m", text: str = "x", **fields: Any) -> Exception:
        last = (await self.events(model, text, **fields))[-1]
        assert isinstance(last, EngineFailed), last
        return last.error


@pytest.fixture(params=["serving", "router, here", "router, far", "router, after a refusal"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@asynccontextmanager
async def subject(kind: str, folder: Path, **echo: Any) -> AsyncIterator[Subject]:
    async with cluster(folder) as nodes:
        if kind == "router, after a refusal":
            # `a` holds the model and cannot load it: each request goes on to `b`.
            a = await nodes.add("a", ("m",), echo={"crash_on_load": True})
            yield Subject(a.router, await nodes.add("b", ("m",), echo=echo))
        elif kind == "router, far":
            a = await nodes.add("a")
            yield Subject(a.router, await nodes.add("b", ("m",), echo=echo))
        else:
            a = await nodes.add("a", ("m",), echo=echo)
            yield Subject(a.router if kind == "router, here" else a.serving, a)


async def test_prepared_comes_first_and_one_end_last(kind: str, tmp_path: Path) -> None:
    async with subject(kind, tmp_path) as one:
        heard = await one.events()
        assert isinstance(heard[0], Prepared)
        assert all(isinstance(event, Tokens | Progress) for event in heard[1:-1])
        assert "hello there" in "".join(event.text for event in heard if isinstance(event, Tokens))
        done = heard[-1]
        assert isinstance(done, Done)
        ids = sum(len(event.ids) for event in heard if isinstance(event, Tokens))
        assert (done.reason, done.completion_tokens) == ("stop", ids)


async def test_load_only_is_skipped(kind: str, tmp_path: Path) -> None:
    async with subject(kind, tmp_path) as one:
        (event,) = await one.events(load_only=True)
        assert isinstance(event, Skipped)
        assert event.reason == "load"
        assert len(one.node.serving.loaded()) == 1


async def test_nothing_comes_after_cancel_and_the_slot_is_free(kind: str, tmp_path: Path) -> None:
    async with subject(kind, tmp_path, tokens_per_s=50.0, hash_tokens=50_000) as one:
        heard: list[SourceEvent] = []
        generation = one.source.start(text_request("m"), heard.append)
        await until(lambda: any(isinstance(event, Tokens) for event in heard), "a word")
        generation.cancel()
        generation.cancel()
        count = len(heard)
        await until(lambda: not one.node.serving._jobs, "the free slot")
        assert len(heard) == count


async def test_pause_holds_and_resume_goes_on(kind: str, tmp_path: Path) -> None:
    async with subject(kind, tmp_path, hash_tokens=300) as one:
        heard: list[SourceEvent] = []
        generation = one.source.start(text_request("m", sampling=Sampling(num_predict=300)), heard.append)
        generation.pause()
        generation.resume()
        await until(lambda: heard and isinstance(heard[-1], LAST), "the end")
        assert isinstance(heard[-1], Done)
        assert heard[-1].completion_tokens == 300


async def test_an_answer_goes_on_after_tokens_of_another(kind: str, tmp_path: Path) -> None:
    async with subject(kind, tmp_path) as one:
        whole = [event for event in await one.events() if isinstance(event, Tokens)]
        ids = tuple(token for event in whole for token in event.ids)
        heard: list[SourceEvent] = []
        resume = Resume(ids=ids[:2], prompt_text="hello there", model_digest=echo_model("m").digest)
        one.source.start(text_request("m", "hello there"), heard.append, resume)
        await until(lambda: heard and isinstance(heard[-1], LAST), "the end")
        rest = tuple(token for event in heard if isinstance(event, Tokens) for token in event.ids)
        assert ids[:2] + rest == ids
        assert [event.after for event in heard if isinstance(event, Prepared)][-1] == 2


async def test_refusals_are_the_last_event_with_their_class(kind: str, tmp_path: Path) -> None:
    async with subject(kind, tmp_path) as one:
        missing = await one.failure("none")
        assert (type(missing), str(missing)) == (ModelNotFound, "model 'none' not found")
        long = await one.failure(text="word " * 5000, truncate=False)
        assert isinstance(long, ContextExceeded)
        assert long.prompt_tokens > long.context_tokens
        assert isinstance(await one.failure(think=True), Unsupported | Invalid)


async def test_a_runner_that_dies_is_told_and_a_model_that_does_not_load(kind: str, tmp_path: Path) -> None:
    async with subject(kind, tmp_path / "1", fail_after_tokens=2) as one:
        assert isinstance(await one.failure(text="many words to say"), RunnerDied)
    async with subject(kind, tmp_path / "2", crash_on_load=True) as one:
        assert isinstance(await one.failure(), LoadFailed)


async def test_the_other_questions(kind: str, tmp_path: Path) -> None:
    async with subject(kind, tmp_path, dimensions=8) as one:
        embedding = EmbedRequest(
            request_id=RequestId("r"), identity=Identity("local"), model="m", inputs=("a b", "c")
        )
        vectors = (await one.source.embed(embedding)).vectors
        assert vectors == (await one.node.serving.embed(embedding)).vectors
        assert [len(vector) for vector in vectors] == [8, 8]
        ranking = RerankRequest(
            request_id=RequestId("r"), identity=Identity("local"), model="m", query="a", documents=("a", "b")
        )
        assert (await one.source.rerank(ranking)).scores == (await one.node.serving.rerank(ranking)).scores
        assert await one.source.count_tokens(text_request("m", "one two")) > 0
        with pytest.raises(ModelNotFound, match="model 'none' not found"):
            await one.source.count_tokens(text_request("none"))
