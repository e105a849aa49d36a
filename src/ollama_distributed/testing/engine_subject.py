"""What the engines' conformance suite works on: an engine, its models, its abilities."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Literal

import msgspec

from ollama_distributed.base.inference import Sampling, Tool
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.serving.ports import (
    CompletionRequest,
    Engine,
    LoadPlan,
    Runner,
)
from ollama_distributed.testing.recording import Recording

Ability = Literal["ids", "logprobs", "tokenize", "template", "format", "metrics", "context", "lifecycle"]
"""`ids`: emits token ids and continues from them; `context`: says when a prompt is too long;
`lifecycle`: its runners are its own (loading and unloading happen here)."""

CANCEL_S = 60.0
"""A cancelled answer frees its slot long before: a second on a machine that is not starved. One
that is not cancelled never ends."""
QUIET_S = 0.25
"""Nothing for this long: the stream stands still."""


class Subject(msgspec.Struct, kw_only=True):
    """An engine to check, and models that show what it does."""

    engine: Engine
    writer: ModelSpec
    """Answers `prompt` with `answer`, then stops. Best with characters outside ASCII."""
    prompt: str
    answer: str
    endless: ModelSpec
    """Answers `endless_prompt` for at least ten seconds."""
    endless_prompt: str = "go"
    endless_context: int = 131_072
    """Context that its prompt and ten seconds of answer fit in."""
    abilities: frozenset[Ability] = frozenset()
    varied: ModelSpec | None = None
    """Samples: other seeds give other answers."""
    tools: ModelSpec | None = None
    """Answers `tool_prompt`, offered `tool`, by calling it with `tool_arguments`."""
    tool: Tool = Tool(name="get_weather", parameters={"type": "object"})
    tool_prompt: str = "Weather?"
    tool_arguments: dict[str, object] = {}
    jsonish: ModelSpec | None = None
    """Answers with JSON that fits `schema` when the format is that schema."""
    schema: dict[str, object] = {}
    embedder: ModelSpec | None = None
    dimensions: int = 0
    reranker: ModelSpec | None = None
    broken: ModelSpec | None = None
    """Cannot be loaded."""
    kill: Callable[[Runner], None] | None = None
    """Ends the runner from outside, as an OOM killer would."""


class NotApplicable(Exception):
    """The subject does not claim what the check needs."""


def need(subject: Subject, *abilities: Ability) -> None:
    for ability in abilities:
        if ability not in subject.abilities:
            raise NotApplicable(f"the engine does not claim {ability!r}")


def model_of(model: ModelSpec | None, what: str) -> ModelSpec:
    if model is None:
        raise NotApplicable(f"the subject has no {what}")
    return model


async def load(
    subject: Subject, model: ModelSpec | None = None, *, slots: int = 2, context: int = 2048
) -> Runner:
    """A runner of `model`, or of the writer."""
    if model is subject.endless:
        context = max(context, subject.endless_context)
    plan = LoadPlan(slots=slots, context_tokens=context, threads=1)
    return await subject.engine.load(model or subject.writer, plan)


def completion(prompt: str | tuple[str | tuple[int, ...], ...], **sampling: object) -> CompletionRequest:
    settings = {"temperature": 0.0, **sampling}
    return CompletionRequest(prompt=prompt, sampling=msgspec.convert(settings, Sampling))


async def answer(runner: Runner, request: CompletionRequest) -> Recording:
    recording = Recording()
    runner.generate(request, recording)
    await recording.done()
    return recording


async def until(met: Callable[[], Awaitable[bool]], within_s: float, otherwise: str) -> None:
    try:
        async with asyncio.timeout(within_s):
            while not await met():  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"{otherwise} within {within_s:g} s") from None


async def slots_free(runner: Runner) -> None:
    async def free() -> bool:
        return (await runner.metrics()).slots_busy == 0

    await until(free, CANCEL_S, "the slot was not free")
