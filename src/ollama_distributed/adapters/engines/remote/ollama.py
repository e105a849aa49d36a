"""An Ollama server on this machine as an engine: its models are listed and served as they are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import structlog

from ollama_distributed.adapters.engines.call import Call
from ollama_distributed.adapters.engines.fetch import fetch_json
from ollama_distributed.adapters.engines.framing import Lines
from ollama_distributed.adapters.engines.remote import ollama_wire as wire
from ollama_distributed.adapters.engines.remote.runner import QUICK_S, RemoteRunner, unsupported
from ollama_distributed.adapters.engines.remote.settings import local_name, read_settings, remote_of
from ollama_distributed.base.errors import (
    EngineError,
    LoadFailed,
    OllamaDistributedError,
    RunnerDied,
    Unsupported,
)
from ollama_distributed.base.inference import Message, Think, Tool
from ollama_distributed.base.tokens import EngineSink
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.serving.ports import ChatRequest, CompletionRequest, EngineInfo, LoadPlan

log = structlog.get_logger(__name__)

LEFT_OUT = "engines.remote_model_left_out"
_SHOWS_AT_ONCE = 4


class OllamaEngine:
    """`OllamaEngine({"name": "ollama", "url": "http://127.0.0.1:11434"})`; see `RemoteSettings`."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = read_settings(settings)
        self._remote = remote_of(self._settings)
        self._version = ""
        self._shown: dict[str, dict[str, Any]] = {}
        """Name and digest -> what `/api/show` said: it changes with the digest only."""
        self._runners: set[RemoteRunner] = set()

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            name="ollama", variant=str(self._remote.address), version=self._version or "unknown"
        )

    def can_load(self, model: ModelSpec) -> bool:
        return model.remote is not None and model.remote.engine == self._settings.name

    async def models(self) -> list[ModelSpec]:
        """What Ollama has; one that it cannot show is left out.

        Raises:
            Unavailable, RunnerDied: it is away, or goes.
            EngineError: it answers with something else than models.
        """
        tags = (await self._get("GET", "/api/tags")).get("models") or []
        limit, shown = asyncio.Semaphore(_SHOWS_AT_ONCE), dict[str, dict[str, Any]]()

        async def describe(tag: dict[str, Any]) -> ModelSpec | None:
            key = f"{tag['name']} {tag.get('digest')}"
            async with limit:
                try:
                    show = self._shown.get(key) or await self._show(str(tag["name"]))
                except RunnerDied:  # all of it is
                    raise
                except EngineError as error:  # it was deleted in this moment, or is broken there
                    log.warning(LEFT_OUT, engine=self._settings.name, model=tag["name"], error=error.message)
                    return None
            shown[key] = show
            name = local_name(str(tag["name"]))
            return wire.model_spec(self._settings.name, tag, show, str(name), name.display)

        try:
            found = await asyncio.gather(*(describe(tag) for tag in tags))
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise EngineError(f"{self._remote.address} answers with something else than models") from exc
        self._shown = shown
        return [spec for spec in found if spec is not None]

    async def _show(self, name: str) -> dict[str, Any]:
        return await self._get("POST", "/api/show", {"model": name})

    async def _get(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        status, value = await fetch_json(
            self._remote.address,
            method,
            self._remote.prefix + path,
            headers=self._remote.headers,
            body=body,
            deadline_s=QUICK_S,
        )
        if status != 200 or not isinstance(value, dict):
            raise EngineError(f"{self._remote.address} answered {path} with status {status}: is it Ollama?")
        return value

    async def load(
        self, model: ModelSpec, plan: LoadPlan, on_progress: Callable[[float], None] | None = None
    ) -> OllamaRunner:
        """Have Ollama load the model with this context.

        Raises:
            LoadFailed: with Ollama's reason.
        """
        if not self.can_load(model) or model.remote is None:
            raise LoadFailed(f"{model.display} is not a model of {self._settings.name}")
        try:
            self._version = str((await self._get("GET", "/api/version")).get("version", ""))
            runner = OllamaRunner(
                self._remote,
                model.remote.name,
                plan,
                self.info,
                read_error=wire.read_error,
                deadline_s=self._settings.deadline_s,
                on_gone=self._runners.discard,
                unloads=self._settings.unload,
            )
            if "completion" in model.capabilities:
                await runner.warm_up()
        except OllamaDistributedError as exc:
            raise LoadFailed(f"cannot load {model.display}: {exc.message}") from exc
        self._runners.add(runner)
        if on_progress is not None:
            on_progress(1.0)
        return runner

    async def close(self) -> None:
        await asyncio.gather(*(runner.unload() for runner in list(self._runners)))


class OllamaRunner(RemoteRunner):
    """A model that Ollama holds. Without token ids: Ollama's API has none."""

    health_path = "/api/version"

    def __init__(self, *arguments: Any, unloads: bool, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._unloads = unloads

    async def warm_up(self) -> None:
        body = {"model": self.model, "stream": False, "options": {"num_ctx": self._plan.context_tokens}}
        await self._ask("POST", "/api/generate", body, deadline_s=self._deadline_s)

    async def _let_go(self) -> None:
        if not self._unloads:
            return
        try:
            body = {"model": self.model, "keep_alive": 0, "stream": False}
            await self._ask("POST", "/api/generate", body)
        except OllamaDistributedError:
            # It is away, or holds the model for others: then its own keep_alive decides.
            return

    def generate(self, request: CompletionRequest, sink: EngineSink) -> Call:
        try:
            body = wire.generate_body(self.model, request, self._plan)
        except OllamaDistributedError as exc:
            return self._refuse(sink, exc)
        return self._stream("/api/generate", body, sink, wire.OllamaStream(), Lines)

    def chat(self, request: ChatRequest, sink: EngineSink) -> Call:
        try:
            body = wire.chat_body(self.model, request, self._plan)
        except OllamaDistributedError as exc:
            return self._refuse(sink, exc)
        return self._stream("/api/chat", body, sink, wire.OllamaStream(), Lines)

    async def apply_template(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), think: Think | None = None
    ) -> str:
        body = wire.template_body(self.model, messages, tools, think)
        answer = await self._ask("POST", "/api/chat", {**body, "_debug_render_only": True, "stream": False})
        rendered = (answer.get("_debug_info") or {}).get("rendered_template")
        if not isinstance(rendered, str):
            raise Unsupported("this Ollama does not render prompts (_debug_render_only)")
        return rendered

    async def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:  # noqa: ARG002 - the port's
        raise unsupported("Ollama", "tokenize: its API has no such route")

    async def detokenize(self, ids: Sequence[int]) -> str:  # noqa: ARG002 - the port's signature
        raise unsupported("Ollama", "detokenize: its API has no such route")

    async def embed(self, inputs: Sequence[str | Sequence[int]]) -> tuple[list[list[float]], int]:
        if not all(isinstance(text, str) for text in inputs):
            raise unsupported("Ollama", "embed token ids: it takes text only")
        body = {"model": self.model, "input": list(inputs), "truncate": False}
        answer = await self._ask("POST", "/api/embed", body, deadline_s=self._deadline_s)
        return answer["embeddings"], int(answer.get("prompt_eval_count", 0))

    async def rerank(self, query: str, documents: Sequence[str]) -> tuple[list[float], int]:  # noqa: ARG002 - the port's
        raise unsupported("Ollama", "rerank: its API has no such route")
