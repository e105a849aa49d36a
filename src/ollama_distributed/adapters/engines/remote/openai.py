"""A server with OpenAI's API on this machine as an engine: vLLM, SGLang, llama-server, others.

What a server can do beside `/v1` depends on its kind: llama-server speaks its own routes
for templates and tokens; vLLM has ids, `/tokenize` and `/detokenize`; the rest is refused with words.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from ollama_distributed.adapters.engines.call import Call, EventParser
from ollama_distributed.adapters.engines.fetch import fetch, fetch_json
from ollama_distributed.adapters.engines.framing import ServerSentEvents, Whole
from ollama_distributed.adapters.engines.intake import Intake, intake
from ollama_distributed.adapters.engines.kept import Kept
from ollama_distributed.adapters.engines.llamacpp import chat as llama_chat
from ollama_distributed.adapters.engines.llamacpp import protocol as llama
from ollama_distributed.adapters.engines.llamacpp.enforced import EnforcedCalls
from ollama_distributed.adapters.engines.llamacpp.stream import CompletionStream
from ollama_distributed.adapters.engines.remote import openai_wire as wire
from ollama_distributed.adapters.engines.remote.openai_stream import OpenAIAnswer, OpenAIStream
from ollama_distributed.adapters.engines.remote.runner import (
    HEALTH_S,
    QUICK_S,
    SLOW_HEALTH_S,
    RemoteRunner,
    unsupported,
)
from ollama_distributed.adapters.engines.remote.settings import local_name, read_settings, remote_of
from ollama_distributed.base.errors import EngineError, LoadFailed, OllamaDistributedError
from ollama_distributed.base.inference import Message, Think, Tool
from ollama_distributed.base.tokens import EngineSink
from ollama_distributed.models.spec import Architecture, Capability, ModelSpec, RemoteModel
from ollama_distributed.serving.ports import (
    ChatRequest,
    CompletionRequest,
    EngineInfo,
    LoadPlan,
    RunnerMetrics,
)

METRICS_S = 0.5
_EMBEDS = ("embed", "minilm", "bge-", "gte-", "e5-")
_RERANKS = ("rerank",)
"""Parts of names: `/v1/models` does not say what a model is for. A setting overrules the guess."""


class _Meta(msgspec.Struct):
    n_ctx: int = 0
    n_ctx_train: int = 0
    n_embd: int = 0
    n_params: int = 0
    size: int = 0


class _Model(msgspec.Struct):
    id: str
    created: float = 0.0
    owned_by: str = ""
    max_model_len: int | None = None
    meta: _Meta | None = None


class OpenAIEngine:
    """`OpenAIEngine({"name": "vllm", "url": "http://127.0.0.1:8000"})`; see `RemoteSettings`."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = read_settings(settings)
        self._remote = remote_of(self._settings)
        self._kind: wire.ServerKind | None = None if self._settings.kind == "auto" else self._settings.kind
        self._runners: set[RemoteRunner] = set()
        self._intake: Intake | None = None

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(name="openai", variant=str(self._remote.address), version=self._kind or "unknown")

    def can_load(self, model: ModelSpec) -> bool:
        return model.remote is not None and model.remote.engine == self._settings.name

    async def models(self) -> list[ModelSpec]:
        """What the server lists. Raises `Unavailable` while it is away."""
        return [self._spec(model) for model in await self._listed()]

    async def _listed(self) -> list[_Model]:
        path = f"{self._remote.prefix}/v1/models"
        status, value = await fetch_json(
            self._remote.address, "GET", path, headers=self._remote.headers, deadline_s=QUICK_S
        )
        if status != 200:
            raise wire.read_error(status, msgspec.json.encode(value))
        try:
            models = msgspec.convert(value["data"], list[_Model])
        except (msgspec.ValidationError, KeyError, TypeError) as exc:
            raise EngineError(
                f"{self._remote.address} answered {path} with something else than models"
            ) from exc
        if models and self._settings.kind == "auto":
            self._kind = wire.kind_of(models[0].owned_by)
        return models

    def _spec(self, model: _Model) -> ModelSpec:
        name, meta = local_name(model.id), model.meta or _Meta()
        able = self._settings.capabilities.get(model.id) or _guess(model.id)
        return ModelSpec(
            name=str(name),
            display=name.display,
            digest=hashlib.sha256(f"{self._remote.address} {model.id}".encode()).hexdigest(),
            size_bytes=meta.size,
            modified_at=model.created,
            architecture=Architecture(
                name="",
                layers=0,
                context_tokens=model.max_model_len or meta.n_ctx or meta.n_ctx_train,
                embedding_length=meta.n_embd,
                heads=0,
                kv_heads=0,
                key_length=0,
                value_length=0,
                parameters=meta.n_params,
                file_type="",
            ),
            remote=RemoteModel(engine=self._settings.name, name=model.id),
            capabilities=frozenset(able),
            pooling="rank" if "rerank" in able else "mean" if "embedding" in able else "",
        )

    async def load(
        self, model: ModelSpec, plan: LoadPlan, on_progress: Callable[[float], None] | None = None
    ) -> OpenAIRunner:
        """Check that the server serves the model; it was loaded when the server started.

        Raises:
            LoadFailed: the server is away or does not list the model.
        """
        if not self.can_load(model) or model.remote is None:
            raise LoadFailed(f"{model.display} is not a model of {self._settings.name}")
        try:
            listed = [entry.id for entry in await self._listed()]
        except OllamaDistributedError as exc:
            raise LoadFailed(
                f"cannot reach {self._remote.address} for {model.display}: {exc.message}"
            ) from exc
        if model.remote.name not in listed:
            raise LoadFailed(f"{self._remote.address} does not serve {model.remote.name} any more")
        if self._intake is None and not self._remote.encrypted:
            self._intake = intake(self._settings.pace_s)
        runner = OpenAIRunner(
            self._remote,
            model.remote.name,
            plan,
            self.info,
            read_error=llama.error_of_body if self._kind == "llama-server" else wire.read_error,
            deadline_s=self._settings.deadline_s,
            on_gone=self._runners.discard,
            kept=None if self._kind == "llama-server" else Kept(),
            reads=self._intake,
            kind=self._kind or "openai",
        )
        self._runners.add(runner)
        if on_progress is not None:
            on_progress(1.0)
        return runner

    async def close(self) -> None:
        await asyncio.gather(*(runner.unload() for runner in list(self._runners)))
        if self._intake is not None:
            self._intake.close()
            self._intake = None


def _guess(model: str) -> tuple[Capability, ...]:
    lower = model.lower()
    if any(part in lower for part in _RERANKS):
        return ("rerank",)
    if any(part in lower for part in _EMBEDS):
        return ("embedding",)
    return ("completion", "tools")


class OpenAIRunner(RemoteRunner):
    """A model that the server was started with."""

    def __init__(self, *arguments: Any, kind: wire.ServerKind, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._kind = kind
        self._secret = self.remote.headers.get("authorization", "")
        self._begin: tuple[int, ...] | None = None
        """Token ids that begin every text."""
        self.health_path = "/v1/models" if kind == "openai" else "/health"
        self.renders = kind in ("llama-server", "vllm")
        self.health_s = SLOW_HEALTH_S if kind == "openai" else HEALTH_S

    # ── answers ─────────────────────────────────────────────────────────────────────

    def generate(self, request: CompletionRequest, sink: EngineSink) -> Call:
        parser: EventParser
        try:
            if self._kind == "llama-server":
                path = llama.completion_path(request)
                body = llama.completion_body(request, context_tokens=self._plan.context_tokens)
                stop_at = None if request.shift else self._plan.context_tokens
                parser = CompletionStream(stop_at_tokens=stop_at, top_logprobs=request.top_logprobs or 0)
            else:
                path, parser = "/v1/completions", OpenAIStream()
                body = wire.completion_body(self.model, request, self._kind, secret=self._secret)
        except OllamaDistributedError as exc:
            return self._refuse(sink, exc)
        return self._stream(path, body, sink, parser, ServerSentEvents, joins=request.together)

    def chat(self, request: ChatRequest, sink: EngineSink) -> Call:
        parser: EventParser
        body: Mapping[str, Any]
        path = "/v1/chat/completions"
        try:
            if self._kind != "llama-server":
                body = wire.chat_body(self.model, request, self._kind, secret=self._secret)
                if request.whole:
                    return self._stream(path, body, sink, OpenAIAnswer(), Whole)
                parser = OpenAIStream()
            elif llama_chat.enforced(request):
                # llama-server does not enforce `tool_choice` (trap 8): a schema does.
                schema = llama_chat.calls_schema(request)
                asked = self._enforced(request, schema)
                return self._stream_after(asked, sink, EnforcedCalls(), ServerSentEvents)
            else:
                body = llama_chat.chat_body(request, context_tokens=self._plan.context_tokens)
                parser = llama_chat.ChatStream(top_logprobs=request.top_logprobs or 0)
        except OllamaDistributedError as exc:
            return self._refuse(sink, exc)
        return self._stream(path, body, sink, parser, ServerSentEvents, joins=request.together)

    async def _enforced(self, request: ChatRequest, schema: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        prompt = await self.apply_template(request.messages, request.tools, think=False)
        completion = CompletionRequest(
            prompt=prompt,
            images=tuple(image for message in request.messages for image in message.images),
            sampling=request.sampling,
        )
        body = llama.completion_body(completion, context_tokens=self._plan.context_tokens)
        return "/completion", body | {"json_schema": schema}

    # ── questions ───────────────────────────────────────────────────────────────────

    async def apply_template(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), think: Think | None = None
    ) -> str:
        if not self.renders:
            raise unsupported(self._kind, "apply a chat template: it has no route for it")
        ids = await self.template_ids(messages, tools, think)
        if ids is None:
            body = llama_chat.template_body(messages, tools, think)
            return str((await self._ask("POST", "/apply-template", body))["prompt"])
        # What begins every text is added to the prompt again; twice would disturb the model.
        if self._begin is None:
            self._begin = tuple(await self.tokenize(""))
        begin = self._begin
        return await self.detokenize(ids[len(begin) :] if ids[: len(begin)] == begin else ids)

    async def template_ids(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), think: Think | None = None
    ) -> tuple[int, ...] | None:
        """vLLM has no route that renders, but one that tokenizes a conversation."""
        if self._kind != "vllm":
            return None
        body = llama_chat.template_body(messages, tools, think)
        answer = await self._ask("POST", "/tokenize", {"model": self.model, **body})
        return tuple(map(int, answer["tokens"]))

    async def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        if self._kind == "llama-server":
            body = {"content": text, "add_special": add_special, "parse_special": True}
        elif self._kind == "openai":
            raise unsupported("this server", "tokenize: OpenAI's API has no such route")
        else:
            body = {"model": self.model, "prompt": text, "add_special_tokens": add_special}
        return [int(token) for token in (await self._ask("POST", "/tokenize", body))["tokens"]]

    async def detokenize(self, ids: Sequence[int]) -> str:
        if self._kind == "llama-server":
            return str((await self._ask("POST", "/detokenize", {"tokens": list(ids)}))["content"])
        if self._kind == "openai":
            raise unsupported("this server", "detokenize: OpenAI's API has no such route")
        answer = await self._ask("POST", "/detokenize", {"model": self.model, "tokens": list(ids)})
        return str(answer["prompt"] if "prompt" in answer else answer["text"])

    async def embed(self, inputs: Sequence[str | Sequence[int]]) -> tuple[list[list[float]], int]:
        body = {"model": self.model, "input": [i if isinstance(i, str) else list(i) for i in inputs]}
        answer = await self._ask("POST", "/v1/embeddings", body, deadline_s=self._deadline_s)
        rows = sorted(answer["data"], key=lambda row: int(row["index"]))
        return [row["embedding"] for row in rows], int((answer.get("usage") or {}).get("prompt_tokens", 0))

    async def rerank(self, query: str, documents: Sequence[str]) -> tuple[list[float], int]:
        if self._kind == "openai":
            raise unsupported("this server", "rerank: OpenAI's API has no such route")
        body = {"model": self.model, "query": query, "documents": list(documents)}
        answer = await self._ask("POST", "/v1/rerank", body, deadline_s=self._deadline_s)
        # SGLang answers with the bare list, and calls the figure `score`.
        rows = answer if isinstance(answer, list) else answer["results"]
        usage = {} if isinstance(answer, list) else answer.get("usage") or {}
        scores = [0.0] * len(documents)
        for row in rows:
            scores[int(row["index"])] = float(row.get("relevance_score", row.get("score", 0.0)))
        return scores, int(usage.get("prompt_tokens", usage.get("total_tokens", 0)))

    async def metrics(self) -> RunnerMetrics:
        """The server's own figures, which count other clients too; ours where it has none."""
        ours = await super().metrics()
        names = wire.GAUGES.get(self._kind)
        if names is None or self._gone:
            return ours
        try:
            answer = await fetch(
                self.remote.address,
                "GET",
                f"{self.remote.prefix}/metrics",
                headers=self.remote.headers,
                deadline_s=METRICS_S,
            )
        except OllamaDistributedError:
            return ours
        text = answer.body.decode("utf-8", "replace") if answer.status == 200 else ""
        busy, queued = wire.gauge(text, names.busy), wire.gauge(text, names.queued)
        if busy is None:
            return ours
        kv = next((value for name in names.kv if (value := wire.gauge(text, name)) is not None), None)
        return msgspec.structs.replace(
            ours,
            slots_busy=int(busy),
            queued=int(queued or 0),
            tokens_per_s=wire.gauge(text, names.speed) or 0.0,
            kv_used=None if kv is None else min(max(kv, 0.0), 1.0),
        )
