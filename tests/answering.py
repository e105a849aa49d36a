"""A node without doors: serving and answers on an engine, and an ear for what comes out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio

from ollama_distributed.base.clock import SystemClock
from ollama_distributed.base.errors import ModelNotFound
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import RequestId
from ollama_distributed.base.inference import (
    ChatPrompt,
    Delta,
    Event,
    Failed,
    Finished,
    Generation,
    InferenceRequest,
    Message,
    Opened,
    Queued,
)
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.serving.ports import Engine
from ollama_distributed.serving.service import Serving
from ollama_distributed.serving.settings import ServingSettings
from ollama_distributed.streams.service import Answers
from tests.limits import SOON_S

DEADLINE_S = SOON_S
"""For one step of a test; the real engine on a busy machine takes seconds to load."""


class Models:
    def __init__(self, *models: ModelSpec) -> None:
        self.models = {m.display: m for m in models}

    async def resolve(self, name: str) -> ModelSpec:
        try:
            return self.models[name]
        except KeyError:
            raise ModelNotFound(f"model '{name}' not found") from None

    def known(self, name: str) -> ModelSpec | None:
        return self.models.get(name)


class FixedMachine:
    def cores(self) -> int:
        return 2

    def memory_available_bytes(self) -> int:
        return 4 << 30


class Listener:
    """A sink that can be waited on."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        """But where it stands while it waits."""
        self.places: list[Queued] = []
        self.changed = asyncio.Event()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Queued):
            self.places.append(event)
        else:
            self.events.append(event)
        self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        with anyio.fail_after(DEADLINE_S):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def end(self) -> Finished | Failed:
        await self.until(lambda: bool(self.events) and isinstance(self.events[-1], Finished | Failed))
        end = self.events[-1]
        assert isinstance(end, Finished | Failed)
        return end

    @property
    def text(self) -> str:
        return "".join(e.text for e in self.events if isinstance(e, Delta))

    @property
    def thinking(self) -> str:
        return "".join(e.thinking for e in self.events if isinstance(e, Delta))


class Node:
    def __init__(self, engine: Engine, serving: Serving) -> None:
        self.engine = engine
        self.serving = serving
        self.answers = Answers(serving, SystemClock())

    def ask(self, request: InferenceRequest) -> tuple[Listener, Generation]:
        listener = Listener()
        return listener, self.answers.open(request, listener)

    async def finished(self, request: InferenceRequest) -> tuple[Listener, Finished]:
        listener, _ = self.ask(request)
        end = await listener.end()
        assert isinstance(end, Finished), end
        return listener, end

    async def refused(self, request: InferenceRequest) -> Exception:
        listener, _ = self.ask(request)
        end = await listener.end()
        assert isinstance(end, Failed), end
        assert not any(isinstance(event, Opened) for event in listener.events)
        return end.error


@asynccontextmanager
async def node(engine: Engine, *models: ModelSpec, **settings: object) -> AsyncIterator[Node]:
    """Serving and answers on this engine; nothing is loaded when it is left."""
    serving = Serving(
        Models(*models),
        [engine],
        FixedMachine(),
        SystemClock(),
        ServingSettings(**settings),  # type: ignore[arg-type]
    )
    try:
        yield Node(engine, serving)
    finally:
        with anyio.fail_after(DEADLINE_S):
            await serving.close(drain_s=0)
        assert not serving.loaded()


def chat(content: str = "hello", **fields: object) -> InferenceRequest:
    messages = fields.pop("messages", (Message(role="user", content=content),))
    return ask(ChatPrompt(messages=messages, tools=fields.pop("tools", ())), **fields)  # type: ignore[arg-type]


def ask(prompt: object, **fields: object) -> InferenceRequest:
    defaults: dict[str, object] = {
        "request_id": RequestId("r"),
        "identity": Identity("local"),
        "model": "m",
        "prompt": prompt,
    }
    return InferenceRequest(**{**defaults, **fields})  # type: ignore[arg-type]
