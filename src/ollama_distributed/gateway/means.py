"""What the exchanges of a node share."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import msgspec

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.inference import Inference
from ollama_distributed.gateway.body import Bodies
from ollama_distributed.gateway.entry import Entrance
from ollama_distributed.gateway.gate import Gate
from ollama_distributed.gateway.jsonguard import JsonGuard
from ollama_distributed.gateway.queueing import Shed
from ollama_distributed.gateway.summary import Observer
from ollama_distributed.gateway.workers import Offload


class Spawn(Protocol):
    """Runs a coroutine as a task that its caller may cancel."""

    def __call__(self, coroutine: Coroutine[Any, Any, None], /) -> Callable[[], object]: ...


class Means(msgspec.Struct, frozen=True, kw_only=True):
    """What all exchanges of a node share."""

    inference: Inference
    entrance: Entrance
    gate: Gate
    clock: Clock
    observe: Observer
    spawn: Spawn
    offload: Offload
    guard: JsonGuard
    bodies: Bodies
    node: str = ""
    """What this one is called in `X-Ollama-Node`; empty: answers do not say."""
    shed: Shed | None = None
    """Says before a body is parsed that its request would be refused."""
