"""S-13, S-04: of a request's body nothing reaches a runner but what this program has a name for.

CVE-2026-107183 was a field (`chat_parser`) that a server passed on; vLLM's CVE-2025-62426 one
(`chat_template_kwargs`) that a template believed. Here a body is read into typed fields, and the
runner's request is written from those: what is not among them is gone after the first step.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollama_distributed.adapters.engines.llamacpp import runner
from ollama_distributed.adapters.engines.llamacpp.chat import template_body
from ollama_distributed.adapters.engines.llamacpp.launch import runner_params
from ollama_distributed.base.errors import OllamaDistributedError, Unsupported
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import RequestId
from ollama_distributed.base.inference import Message, TextPrompt
from ollama_distributed.gateway.dialects.contract import Call, Generate, HotRoute, RequestContext
from ollama_distributed.gateway.dialects.table import HOT_ROUTES
from ollama_distributed.models.spec import Architecture, ModelSpec
from ollama_distributed.models.templates import known
from ollama_distributed.serving import prompts
from ollama_distributed.serving.ports import LoadPlan

CONTEXT = RequestContext(request_id=RequestId("r1"), identity=Identity("local"), now=1_700_000_000.0)
CANARY = "canary4711"

HOSTILE = (
    # llama-server reads these in a body
    *("chat_parser", "chat_format", "chat_template", "chat_template_kwargs", "reasoning_format", "id_slot"),
    *("slot_id", "lora", "n_cache_reuse", "cache_prompt", "samplers", "grammar", "grammar_lazy"),
    *("grammar_triggers", "preserved_tokens", "response_fields", "post_sampling_probs", "n_indent"),
    *("n_probs", "t_max_predict_ms", "t_max_prompt_ms"),
    *("timings_per_token", "return_tokens", "return_progress"),
    *("speculative.n_max", "dry_multiplier", "xtc_probability", "input_prefix", "input_extra", "json_schema"),
    *("multimodal_data", "prompt_string", "add_generation_prompt", "parse_tool_calls"),
    *("thinking_forced_open", "generation_prompt"),
    # others', with a flaw of their own
    *("tokenize", "continue_final_message", "media_io_kwargs", "mm_processor_kwargs", "api_base"),
    *("guided_grammar", "cache_salt", "kv_transfer_params", "model_path", "__class__", "__proto__"),
)  # fmt: skip

TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
SAID: list[dict[str, Any]] = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": "again"},
]
CHAT: dict[str, Any] = {"model": "m", "messages": SAID, "tools": [TOOL], "stream": True}
OPTIONS = {"options": {"temperature": 0.5, "num_ctx": 512}}
BODIES: dict[str, dict[str, Any]] = {
    "/api/v1/generate": {"model": "m", "prompt": "p", **OPTIONS},
    "/api/v1/chat": CHAT | OPTIONS,
    "/api/v1/embeddings": {"model": "m", "input": "a", **OPTIONS},
    "/api/generate": {"model": "m", "prompt": "p", **OPTIONS},
    "/api/chat": CHAT | OPTIONS,
    "/api/embed": {"model": "m", "input": ["a"], **OPTIONS},
    "/api/embeddings": {"model": "m", "prompt": "a", **OPTIONS},
    "/v1/chat/completions": CHAT
    | {"stream_options": {"include_usage": True}, "response_format": {"type": "json_object"}},
    "/v1/completions": {"model": "m", "prompt": "p"},
    "/v1/embeddings": {"model": "m", "input": "a"},
    "/v1/responses": {"model": "m", "input": SAID, "reasoning": {"effort": "low"}},
    "/v1/responses/input_tokens": {"model": "m", "input": SAID},
    "/v1/messages": {"model": "m", "max_tokens": 5, "messages": SAID, "thinking": {"type": "disabled"}},
    "/v1/messages/count_tokens": {"model": "m", "messages": SAID},
    "/v1/rerank": {"model": "m", "query": "q", "documents": ["a", "b"]},
    "/v2/rerank": {"model": "m", "query": "q", "documents": ["a", "b"]},
    "/rerank": {"model": "m", "query": "q", "documents": ["a", "b"]},
}
CALLERS_OWN = frozenset({"parameters", "schema", "input_schema"})
"""Objects whose fields are the caller's to name: schemas, which go to the runner as schemas."""


def objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every object of a body that this program names the fields of."""
    if isinstance(value, dict):
        yield value
        for name, part in value.items():
            if name not in CALLERS_OWN:
                yield from objects(part)
    elif isinstance(value, list):
        for part in value:
            yield from objects(part)


def carried(call: Call) -> str:
    """All that goes on from the gateway towards a runner."""
    return repr(call.requests if isinstance(call, Generate) else call.request)


routes = st.sampled_from([route for route in HOT_ROUTES if route.method == "POST"])
fields = st.sampled_from(HOSTILE) | st.text(min_size=1, max_size=12)
values = st.sampled_from(
    [CANARY, [CANARY], {"x": CANARY}, {CANARY: True}, {"enable_thinking": False, "template": CANARY}]
)


def test_every_route_has_a_body_here() -> None:
    assert {route.path for route in HOT_ROUTES} == set(BODIES)
    for route in HOT_ROUTES:
        route.parse(json.dumps(BODIES[route.path]).encode(), CONTEXT)


@settings(max_examples=400, deadline=None)
@given(st.data(), routes, fields, values)
def test_s13_an_unknown_field_never_gets_past_the_dialect(
    data: st.DataObject, route: HotRoute, name: str, value: Any
) -> None:
    """CVE-2026-107183 (`chat_parser`), CVE-2025-62426 (`chat_template_kwargs`), CVE-2026-105760
    (`media_io_kwargs`), CVE-2024-6587 (`api_base`)."""
    body = json.loads(json.dumps(BODIES[route.path]))
    places = [one for one in objects(body) if name not in one]
    data.draw(st.sampled_from(places))[name] = value
    try:
        call = route.parse(json.dumps(body).encode(), CONTEXT)
    except OllamaDistributedError:
        return  # a name that this dialect knows, with a value of another type
    if CANARY in carried(call):
        # A field that the dialect does know, of a type that takes a text.
        assert name in KNOWN_TEXTS, f"{name} in {route.path} reaches the runner"


KNOWN_TEXTS = frozenset(
    {
        *(
            "prompt",
            "suffix",
            "system",
            "template",
            "input",
            "content",
            "instructions",
            "stop",
            "description",
        ),
        *("name", "thinking", "title", "text", "tool_name", "tool_call_id", "id", "format", "query"),
    }
)
"""Fields of the dialects that hold a text of the caller; none of the hostile ones is among them."""


def test_s13_no_hostile_field_is_one_of_the_dialects() -> None:
    assert not set(HOSTILE) & KNOWN_TEXTS


@pytest.mark.parametrize("name", HOSTILE)
def test_s13_each_hostile_field_in_each_route(name: str) -> None:
    for route in HOT_ROUTES:
        body: dict[str, Any] = BODIES[route.path] | {name: CANARY}
        if "options" in body:
            body["options"] = {**body["options"], name: CANARY}
        try:
            call = route.parse(json.dumps(body).encode(), CONTEXT)
        except OllamaDistributedError:
            continue
        assert CANARY not in carried(call), route.path


# ── templates (S-04) ─────────────────────────────────────────────────────────────────

SPEC = ModelSpec(
    name="m",
    display="m",
    digest="0" * 64,
    size_bytes=1,
    modified_at=0.0,
    architecture=Architecture(
        name="llama", layers=1, context_tokens=8, embedding_length=8, heads=1, kv_heads=1, key_length=8,
        value_length=8, parameters=1, file_type="F16",
    ),
    chat_template="{{ messages }}",
)  # fmt: skip

JINJA = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{% for i in range(10**9) %}{% for j in range(10**9) %}x{% endfor %}{% endfor %}",
    "{{ 'a' * 10**9 }}",
    "{% include '/etc/passwd' %}",
    "{{ messages }}",
    "{{ .Prompt }}{{ range $i := .Messages }}{{ end }}{{ lipsum }}",
)


@pytest.mark.parametrize("template", JINJA)
def test_s04_a_template_in_a_request_is_refused_unless_it_is_one_of_ours(template: str) -> None:
    """CVE-2024-34359, CVE-2026-5760, CVE-2026-42203: a template from outside was rendered."""
    with pytest.raises(Unsupported):
        prompts.with_template(SPEC, TextPrompt(text="p", template=template))


@given(st.text())
def test_s04_whatever_the_text_only_our_own_templates_are_rendered(template: str) -> None:
    try:
        model = prompts.with_template(SPEC, TextPrompt(text="p", template=template))
    except Unsupported:
        return
    assert model.chat_template in {SPEC.chat_template, known.RAW, *known._TWINS.values()}
    assert model.chat_template == SPEC.chat_template or template not in ("", model.chat_template)


@given(st.sampled_from([None, True, False, "low", "medium", "high", "max"]))
def test_s04_a_template_is_told_two_things_of_a_request_beside_its_messages(think: Any) -> None:
    """CVE-2025-62426: keywords of a request overrode those of the server."""
    body = template_body([Message(role="user", content="hi")], think=think)
    assert set(body) <= {"messages", "tools", "add_generation_prompt", "chat_template_kwargs"}
    told = body.get("chat_template_kwargs", {})
    assert set(told) <= {"enable_thinking", "reasoning_effort"}
    assert told.get("reasoning_effort", "low") in ("low", "medium", "high")


# ── how the wheel is started (S-13) ──────────────────────────────────────────────────


class _Recorded:
    """Stands for the wheel's parameters: what was set, and nothing that was not."""

    def __init__(self) -> None:
        self.__dict__["nested"] = {name: SimpleNamespace() for name in ("model", "mmproj")}
        self.__dict__["threads"] = {name: SimpleNamespace() for name in ("cpuparams", "cpuparams_batch")}
        self.__dict__["told"] = {}

    def __getattr__(self, name: str) -> Any:
        return {**self.nested, **self.threads}[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self.told[name] = value


class _Names:
    def __getitem__(self, name: str) -> str:
        return name

    __getattr__ = __getitem__


SWITCHED_OFF: dict[str, Any] = {
    "endpoint_slots": False, "endpoint_props": False, "ui": False, "ui_mcp_proxy": False,
    "slot_save_path": "", "media_path": "", "cors_origins": "", "cors_credentials": False,
    "sleep_idle_seconds": -1, "offline": True,
}  # fmt: skip
MAY_BE_TOLD = frozenset(SWITCHED_OFF) | {
    *("mmproj_use_gpu", "lora_adapters", "n_ctx", "n_parallel", "kv_unified", "n_threads_http", "n_batch"),
    *("n_ubatch", "n_gpu_layers", "main_gpu", "load_mode", "cache_type_k", "cache_type_v", "flash_attn_type"),
    *("ctx_shift", "embedding", "pooling_type", "chat_template", "cache_ram_mib", "model_alias", "hostnames"),
    *("port", "api_keys", "fit_params", "warmup", "endpoint_metrics", "cors_methods", "cors_headers"),
    *("cors_origins_explicit", "verbosity"),
}


def test_s13_the_wheel_is_started_with_what_is_dangerous_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """CVE-2024-42478, CVE-2024-42479, CVE-2026-34159, CVE-2026-118375 (RPC), CVE-2026-43629 (slot files),
    CVE-2026-43631 (sleeping when idle)."""
    made: list[_Recorded] = []

    def parameters() -> _Recorded:
        made.append(_Recorded())
        return made[-1]

    wheel: Any = ModuleType("xllamacpp")
    wheel.CommonParams, wheel.CommonAdapterLoraInfo = parameters, SimpleNamespace
    wheel.ggml_type = wheel.llama_load_mode = wheel.llama_flash_attn_type = wheel.llama_pooling_type = (
        _Names()
    )
    wheel.Server = lambda _told: SimpleNamespace(listening_address="")
    monkeypatch.setitem(sys.modules, "xllamacpp", wheel)
    plan = LoadPlan(slots=2, context_tokens=64, threads=1)
    params = runner_params(
        msgspec.structs.replace(SPEC, weights="/m.gguf", adapters=("/lora.gguf",), pooling="mean"),
        plan,
        socket="/r/r.sock",
        api_key="secret",
    )
    runner.serve(msgspec.to_builtins(params))
    (told,) = (one.told for one in made)
    assert SWITCHED_OFF.items() <= told.items()
    assert set(told) <= MAY_BE_TOLD
    assert told["hostnames"] == ["/r/r.sock"]
    assert told["api_keys"] == ["secret"]
