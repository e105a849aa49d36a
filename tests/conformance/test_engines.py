"""Every engine against the one suite: the fake, llama.cpp in its forms, remote servers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import get_args

import pytest
from tests.models import EMOJI, Models

from ollama_distributed.base.inference import Tool
from ollama_distributed.serving.ports import Runner
from ollama_distributed.testing.echo import EchoEngine, EchoRunner, echo_model
from ollama_distributed.testing.engine_conformance import CHECKS, Ability, NotApplicable, Subject

pytestmark = pytest.mark.anyio

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER = Tool(
    name="get_weather",
    description="The weather of a city",
    parameters={"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
)

EVERYTHING: frozenset[Ability] = frozenset(get_args(Ability))

Maker = Callable[[Models], Subject]


def echo(models: Models) -> Subject:
    model = echo_model()
    return Subject(
        engine=EchoEngine({"tokens_per_s": 2000}),
        writer=model,
        prompt=EMOJI,
        answer=EMOJI,
        endless=model,
        endless_prompt="and so on " * 10_000,
        endless_context=65_536,
        abilities=frozenset(
            {"ids", "logprobs", "tokenize", "template", "format", "metrics", "context", "lifecycle"}
        ),
        tools=model,
        tool=WEATHER,
        tool_prompt='call get_weather {"city": "Paris"}',
        tool_arguments={"city": "Paris"},
        jsonish=model,
        schema=SCHEMA,
        embedder=model,
        dimensions=64,
        reranker=model,
        kill=_crash,
    )


def _crash(runner: Runner) -> None:
    assert isinstance(runner, EchoRunner)
    runner.crash()


@pytest.fixture(params=[echo], ids=lambda maker: maker.__name__)
async def subject(request: pytest.FixtureRequest, models: Models) -> AsyncIterator[Subject]:
    maker: Maker = request.param
    made = maker(models)
    yield made
    await made.engine.close()


@pytest.mark.parametrize("name", CHECKS)
async def test_engine(subject: Subject, name: str) -> None:
    try:
        await CHECKS[name](subject)
    except NotApplicable as reason:
        pytest.skip(str(reason))
