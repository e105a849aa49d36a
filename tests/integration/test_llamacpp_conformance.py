"""llama.cpp in both its forms against the engines' one suite."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.conformance.test_engines import SCHEMA, WEATHER
from tests.integration.llamacpp_programs import PROGRAMS, program_named
from tests.models import EMOJI, Models, model_spec

from ollama_distributed.adapters.engines.llamacpp.engine import LlamaCppEngine
from ollama_distributed.adapters.engines.llamacpp.runner_port import LlamaCppRunner
from ollama_distributed.serving.ports import Runner
from ollama_distributed.testing.engine_conformance import CHECKS, NotApplicable, Subject

pytestmark = [pytest.mark.integration, pytest.mark.anyio]

ANSWER = f"Hello there, friend. {EMOJI}"
"""Whole characters at the cut of the `limit` check: llama-server never sends the ids of a
character that the limit cut off."""


def kill(runner: Runner) -> None:
    assert isinstance(runner, LlamaCppRunner)
    os.kill(runner.process.pid, signal.SIGKILL)


@pytest.fixture(params=PROGRAMS)
async def subject(request: pytest.FixtureRequest, models: Models, tmp_path: Path) -> AsyncIterator[Subject]:
    engine = LlamaCppEngine(await program_named(request.param), runtime_dir=tmp_path / "run")
    yield Subject(
        engine=engine,
        writer=model_spec(models.scripted(ANSWER)),
        prompt="Say it.\n",
        answer=ANSWER,
        endless=model_spec(models.endless()),
        abilities=frozenset(
            {"ids", "logprobs", "tokenize", "template", "format", "metrics", "context", "lifecycle"}
        ),
        varied=model_spec(models.random()),
        tools=model_spec(models.tools()),
        tool=WEATHER,
        tool_arguments={"city": "Paris"},
        jsonish=model_spec(models.json()),
        schema=SCHEMA,
        embedder=model_spec(models.minilm(), pooling="mean"),
        dimensions=384,
        reranker=model_spec(models.reranker(), pooling="rank"),
        broken=model_spec(models.corrupt("header-cut")),
        kill=kill,
    )
    await engine.close()
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("name", CHECKS)
async def test_llamacpp(subject: Subject, name: str) -> None:
    if name == "tokenize":  # a scripted vocabulary has no space, so a text with one never comes back
        subject.writer = subject.varied or subject.writer
    try:
        await CHECKS[name](subject)
    except NotApplicable as reason:
        pytest.skip(str(reason))
