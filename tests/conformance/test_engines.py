"""Every engine against the one suite: the fake, llama.cpp in its forms, remote servers."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from tests.llama_servers import API_KEY, LlamaServers
from tests.models import EMOJI, JSON_ANSWER, WEATHER_CALL, Models, model_spec
from tests.ollama_double import DIMENSIONS, OllamaDouble

from ollama_distributed.adapters.engines.llamacpp import discover
from ollama_distributed.adapters.engines.llamacpp.engine import LlamaCppEngine
from ollama_distributed.adapters.engines.llamacpp.program import Program
from ollama_distributed.adapters.engines.llamacpp.runner_port import LlamaCppRunner
from ollama_distributed.adapters.engines.remote import OllamaEngine, OpenAIEngine
from ollama_distributed.base.inference import Tool
from ollama_distributed.models.spec import ModelSpec, RemoteModel
from ollama_distributed.serving.ports import EngineInfo, LoadPlan, RemoteEngine, Runner
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

Maker = Callable[[Models, LlamaServers], AbstractAsyncContextManager[Subject]]


@asynccontextmanager
async def echo(models: Models, _: LlamaServers) -> AsyncIterator[Subject]:
    model = echo_model()
    yield Subject(
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
    runner.kill()


@asynccontextmanager
async def llamacpp_wheel(models: Models, _: LlamaServers) -> AsyncIterator[Subject]:
    yield _llamacpp(models, await discover.wheel())


@asynccontextmanager
async def llamacpp_binary(models: Models, _: LlamaServers) -> AsyncIterator[Subject]:
    found = sorted(ENGINES.glob(discover.BUILT_GLOB)) or [shutil.which(discover.BINARY_NAME) or ""]
    if not str(found[0]):
        pytest.skip("no llama-server here: run `ollama-distributed engine build`")
    yield _llamacpp(models, await discover.examine("binary", Path(found[0])))


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


# ── remote ──────────────────────────────────────────────────────────────────────────

REMOTE: frozenset[Ability] = EVERYTHING - {"ids"}
"""Of llama-server at a distance: its ids have holes, so they are not given on."""


class Several:
    """Remote engines as one: each server serves one model."""

    def __init__(self, *engines: RemoteEngine) -> None:
        self._engines = engines

    @property
    def info(self) -> EngineInfo:
        return self._engines[0].info

    def can_load(self, model: ModelSpec) -> bool:
        return any(engine.can_load(model) for engine in self._engines)

    async def load(
        self, model: ModelSpec, plan: LoadPlan, on_progress: Callable[[float], None] | None = None
    ) -> Runner:
        engine = next(engine for engine in self._engines if engine.can_load(model))
        return await engine.load(model, plan, on_progress)

    async def close(self) -> None:
        for engine in self._engines:
            await engine.close()


@pytest.fixture(scope="session")
def servers() -> Iterator[LlamaServers]:
    started = LlamaServers()
    yield started
    started.close()


@asynccontextmanager
async def openai(models: Models, servers: LlamaServers) -> AsyncIterator[Subject]:
    engines: list[OpenAIEngine] = []

    async def serve(path: Path, *able: str, pooling: str = "") -> ModelSpec:
        engine = OpenAIEngine(
            {
                "name": path.stem,
                "url": servers.url(path, pooling),
                "api_key": API_KEY,
                "capabilities": {path.stem: able or ("completion", "tools")},
            }
        )
        engines.append(engine)
        (listed,) = await engine.models()
        assert listed.remote == RemoteModel(engine=path.stem, name=path.stem)
        return listed

    gone = OpenAIEngine({"name": "gone", "url": "http://127.0.0.1:9", "kind": "vllm"})
    engines.append(gone)
    subject = {
        "writer": await serve(models.emoji()),
        "endless": await serve(models.endless()),
        "varied": await serve(models.random()),
        "tools": await serve(models.tools()),
        "jsonish": await serve(models.json()),
        "embedder": await serve(models.minilm(), "embedding", pooling="mean"),
        "reranker": await serve(models.reranker(), "rerank", pooling="rank"),
    }
    broken = msgspec.structs.replace(subject["writer"], remote=RemoteModel(engine="gone", name="gone"))
    yield Subject(
        engine=Several(*engines[1:], engines[0]),
        prompt="Greet.",
        answer=EMOJI,
        endless_context=2048,
        abilities=REMOTE,
        tool=WEATHER,
        tool_arguments=dict(WEATHER_CALL["arguments"]),
        schema=SCHEMA,
        dimensions=384,
        broken=broken,
        kill=lambda _: servers.kill(models.endless()),
        **subject,
    )


@asynccontextmanager
async def ollama(models: Models, servers: LlamaServers) -> AsyncIterator[Subject]:
    async with OllamaDouble(EMOJI, JSON_ANSWER, dict(WEATHER_CALL["arguments"])) as double:
        engine = OllamaEngine({"name": "ollama", "url": double.url})
        listed = {model.display.removesuffix(":latest"): model for model in await engine.models()}
        assert {"embedding"} == listed["embedder"].capabilities
        yield Subject(
            engine=engine,
            writer=listed["writer"],
            prompt="Greet.",
            answer=EMOJI,
            endless=listed["endless"],
            endless_context=2048,
            abilities=frozenset({"logprobs", "template", "format", "metrics", "lifecycle"}),
            tools=listed["tools"],
            tool=WEATHER,
            tool_arguments=dict(WEATHER_CALL["arguments"]),
            jsonish=listed["json"],
            schema=SCHEMA,
            embedder=listed["embedder"],
            dimensions=DIMENSIONS,
            broken=msgspec.structs.replace(
                listed["writer"], remote=RemoteModel(engine="ollama", name="missing:latest")
            ),
        )


INTEGRATION = pytest.mark.integration


@pytest.fixture(
    params=[
        echo,
        pytest.param(llamacpp_wheel, marks=INTEGRATION),
        pytest.param(llamacpp_binary, marks=INTEGRATION),
        pytest.param(openai, marks=INTEGRATION),
        ollama,
    ],
    ids=lambda maker: maker.__name__,
)
async def subject(
    request: pytest.FixtureRequest, models: Models, servers: LlamaServers
) -> AsyncIterator[Subject]:
    maker: Maker = request.param
    async with maker(models, servers) as made:
        yield made
        await made.engine.close()


@pytest.mark.parametrize("name", CHECKS)
async def test_engine(subject: Subject, name: str) -> None:
    try:
        await CHECKS[name](subject)
    except NotApplicable as reason:
        pytest.skip(str(reason))
