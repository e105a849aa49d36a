"""Every engine against the one suite: the fake, llama.cpp in its forms, remote servers."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import get_args

import pytest
from tests.models import EMOJI, WEATHER_CALL, Models, model_spec

from ollama_distributed.adapters.engines.llamacpp import discover
from ollama_distributed.adapters.engines.llamacpp.engine import LlamaCppEngine
from ollama_distributed.adapters.engines.llamacpp.program import Program
from ollama_distributed.adapters.engines.llamacpp.runner_port import LlamaCppRunner
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

ENGINES = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ollama-distributed" / "engines"
"""Where `engine build` keeps its builds."""
EVERYTHING: frozenset[Ability] = frozenset(get_args(Ability))

Maker = Callable[[Models], Subject]


async def echo(models: Models) -> Subject:
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


async def llamacpp_wheel(models: Models) -> Subject:
    return _llamacpp(models, await discover.wheel())


async def llamacpp_binary(models: Models) -> Subject:
    found = sorted(ENGINES.glob(discover.BUILT_GLOB)) or [shutil.which(discover.BINARY_NAME) or ""]
    if not str(found[0]):
        pytest.skip("no llama-server here: run `ollama-distributed engine build`")
    return _llamacpp(models, await discover.examine("binary", Path(found[0])))


def _llamacpp(models: Models, program: Program) -> Subject:
    return Subject(
        engine=LlamaCppEngine(program),
        writer=model_spec(models.emoji()),
        prompt="Greet.",
        answer=EMOJI,
        endless=model_spec(models.endless()),
        endless_context=2048,
        abilities=EVERYTHING,
        varied=model_spec(models.random()),
        tools=model_spec(models.tools()),
        tool=WEATHER,
        tool_arguments=dict(WEATHER_CALL["arguments"]),
        jsonish=model_spec(models.json()),
        schema=SCHEMA,
        embedder=model_spec(models.minilm(), pooling="mean"),
        dimensions=384,
        reranker=model_spec(models.reranker(), pooling="rank"),
        broken=model_spec(models.corrupt("data-cut")),
        kill=_kill,
    )


def _kill(runner: Runner) -> None:
    assert isinstance(runner, LlamaCppRunner)
    os.kill(runner.process.pid, signal.SIGKILL)


INTEGRATION = pytest.mark.integration


@pytest.fixture(
    params=[
        echo,
        pytest.param(llamacpp_wheel, marks=INTEGRATION),
        pytest.param(llamacpp_binary, marks=INTEGRATION),
    ],
    ids=lambda maker: maker.__name__,
)
async def subject(request: pytest.FixtureRequest, models: Models) -> AsyncIterator[Subject]:
    maker: Maker = request.param
    made = await maker(models)
    yield made
    await made.engine.close()


@pytest.mark.parametrize("name", CHECKS)
async def test_engine(subject: Subject, name: str) -> None:
    try:
        await CHECKS[name](subject)
    except NotApplicable as reason:
        pytest.skip(str(reason))
