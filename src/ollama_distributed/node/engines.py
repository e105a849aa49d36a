"""Makes the engines that the settings name, in order of preference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, cast

import msgspec
import structlog

from ollama_distributed.adapters.engines.llamacpp.discover import choose, wheel
from ollama_distributed.adapters.engines.llamacpp.engine import LlamaCppEngine
from ollama_distributed.adapters.engines.llamacpp.program import Program
from ollama_distributed.adapters.engines.llamacpp.sandbox.plan import NO_SANDBOX, Sandbox
from ollama_distributed.adapters.engines.remote import OllamaEngine, OpenAIEngine
from ollama_distributed.base.errors import EngineError, Invalid, LoadFailed
from ollama_distributed.catalog.ports import RemoteModels
from ollama_distributed.node.engine_settings import EngineSettings
from ollama_distributed.node.settings import Settings
from ollama_distributed.serving.ports import Engine, EngineFactory

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

ENTRY_POINTS = "ollama_distributed.engines"


class Engines(msgspec.Struct, frozen=True):
    all: tuple[Engine, ...]
    remotes: tuple[RemoteModels, ...]
    """Those with models of their own."""


async def make_engines(settings: Settings, runtime_dir: Path, one_tenant: Callable[[], bool]) -> Engines:
    """llama.cpp first, then what `engines` adds. `runtime_dir`: of the runners' private folders.
    `one_tenant`: whether all who may ask share what runners keep of prompts.

    Raises:
        LoadFailed: llama.cpp does not run here and nothing else is configured.
        Invalid: an engine's settings are wrong.
    """
    made: list[Engine] = []
    try:
        program = await _llama_cpp(settings, runtime_dir)
        made.append(
            LlamaCppEngine(
                program,
                runtime_dir=runtime_dir,
                load_stall_s=settings.load_timeout,
                copies=one_tenant,
                pace_s=settings.stream_pace,
                sandbox=settings.engine_sandbox,
                kernels_dir=settings.cache_dir / "gpu",
            )
        )
        _tell_sandbox(settings, program)
    except LoadFailed as failure:
        if not settings.engines or settings.engine == "binary" or settings.llama_server is not None:
            raise
        log.warning("engines.no_llama_cpp", reason=failure.message)
    made += [_make(one, settings.stream_pace) for one in settings.engines]
    remotes = [cast(RemoteModels, engine) for engine in made if hasattr(engine, "models")]
    return Engines(tuple(made), tuple(remotes))


async def _llama_cpp(settings: Settings, runtime_dir: Path) -> Program:
    if settings.engine == "wheel":
        return await wheel(settings.engine_sandbox)
    choice = await choose(
        configured=settings.llama_server,
        cache_dir=settings.cache_dir / "engines",
        runtime_dir=runtime_dir,
        sandbox=settings.engine_sandbox,
    )
    for refusal in choice.refused:
        log.warning("engines.refused", path=refusal.path, reason=refusal.reason)
    if settings.engine == "binary" and choice.program.variant == "wheel":
        raise LoadFailed(
            "the setting `engine: binary` wants a llama-server, and none was found that works: "
            "name one with `llama_server`, or make one with `ollama-distributed engine build`"
        )
    return choice.program


def _tell_sandbox(settings: Settings, program: Program) -> None:
    """Once, what holds the runners back less than it could."""
    if settings.engine_sandbox == "off":
        log.warning("engines.sandbox", kept=NO_SANDBOX, reason="engine_sandbox is off")
    elif not program.caged:
        reason = "llama.cpp works on this machine outside a sandbox only"
        log.warning("engines.sandbox", kept=NO_SANDBOX, path=program.path, reason=reason)
    elif lacks := Sandbox(settings.engine_sandbox).lacks:
        log.warning("engines.sandbox", kept=Sandbox("auto").kept, reason=f"this machine has no {lacks}")


def _make(one: EngineSettings, pace_s: float) -> Engine:
    factories: Mapping[str, EngineFactory] = {"openai": OpenAIEngine, "ollama": OllamaEngine}
    factory = factories.get(one.kind) or _entry_point(one.kind)
    settings: dict[str, Any] = dict(one.options)
    if one.kind == "openai":
        settings.setdefault("pace_s", pace_s)
    if one.kind in factories:
        settings |= {"name": one.name, "url": one.url, "api_key": one.api_key.get_secret_value()}
    try:
        return factory(settings)
    except EngineError as failure:
        raise Invalid(f"the engine {one.name!r}: {failure.message}") from failure


def _entry_point(kind: str) -> EngineFactory:
    known = entry_points(group=ENTRY_POINTS)
    if kind not in known.names:
        kinds = ", ".join(sorted({"openai", "ollama", *known.names}))
        raise Invalid(f"there is no engine of kind {kind!r}; known kinds are {kinds}")
    return cast(EngineFactory, known[kind].load())
