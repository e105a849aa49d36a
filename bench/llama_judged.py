"""Which of llama.cpp's tests a node is not asked, which it answers otherwise, and why."""

from __future__ import annotations

import re

_MODEL = "the words or tokens of a model that is not here"
_FIELDS = "fields of llama-server's own, in no API that a node speaks"
_ROUTE = "a route of llama-server's own"
_FLAG = "an option of llama-server's process"
_BUILD = "system_fingerprint is free in OpenAI's API; llama-server's begins with its build"
_OPENING = "OpenAI's streams open with an empty text, llama-server's with null"
_CUT = "what is too long is cut, as in Ollama (docs/api.md)"
_ORIGIN = "other origins are refused unless a setting names them; preflights answer 204 (docs/api.md)"
_UNTOOLED = (
    "tools need a template that has them, as in Ollama (docs/api.md); llama-server writes them into any"
)
_MIXED = "OpenAI takes texts or token ids; texts within ids, and objects, are llama-server's"
_TEI = "the form of text-embeddings-inference, which names no model"
_STRICT = "400, as Anthropic answers; llama-server makes it 500, and takes no messages at all"

_ALONE = {
    r"test_(infill|kv_keep_only_active|metrics|template|tokenize|ignore_eos|systemone|stream)\.py": _ROUTE,
    r"test_(lora|mcp_servers|proxy|router|sleep|slot_save|tools_builtin|compat_gcp|speculative)\.py": _FLAG,
    r"test_basic\.py::(?!test_server_(models$|multiple_addresses|start_simple))": _ROUTE,
    r"test_completion\.py::(?!.*openai_library)": _ROUTE,
    r"test_ctx_shift\.py::(?!test_ctx_shift_disabled_stream)": _ROUTE,
    r"test_security\.py::test_(access_static|cors_proxy|openai_library)": _ROUTE,
    r"test_security\.py::test_local_media_file": _FLAG,
    r"test_vision_api\.py": "a model that sees",
    r"test_compat_anthropic\.py::test_anthropic_vision_base64": "a model that sees",
    r"test_compat_anthropic\.py::test_anthropic_thinking_history_in_template": _ROUTE,
    r"test_chat_completion\.py::test_(apply_chat_template|logit_bias|chat_completions_token_count)": _ROUTE,
    r"test_embedding\.py::test_embedding_pooling_none": _FLAG,
}
"""Not asked at all."""
_OTHERWISE = {
    r"test_basic\.py::test_server_models": "models have Ollama's names, with a tag",
    r"test_chat_completion\.py::test_chat_completion(_cached_tokens|_stream)?(\[|$)": _MODEL,
    r"test_(chat_)?completion\.py::test_(chat_)?completion_with_openai_library": _BUILD,
    r"test_chat_completion\.py::test_logprobs_stream": _OPENING,
    r"test_chat_completion\.py::test_chat_template": _FIELDS,
    r"test_chat_completion\.py::test_completion_with_(json_schema|grammar|invalid_grammar)": _FIELDS,
    r"test_chat_completion\.py::test_(chat_completion_with_timings|return_progress|verbose_debug)": _FIELDS,
    r"test_compat_oai_responses\.py::test_responses_stream_with_llama_telemetry": _FIELDS,
    r"test_chat_completion\.py::test_context_size_exceeded": _CUT,
    r"test_embedding\.py::test_embedding_error_prompt_too_long": _CUT,
    r"test_embedding\.py::test_embedding_mixed_input\[input(3|7|8|9|10)-": _MIXED,
    r"test_embedding\.py::test_embedding_content_text_same_as_string": _MIXED,
    r"test_rerank\.py::test_rerank(_usage)?(\[|$)": _MODEL,
    r"test_rerank\.py::test_rerank_tei": _TEI,
    r"test_compat_anthropic\.py::test_anthropic_(empty|vision_format|tool_result_with_image)": _STRICT,
    r"test_security\.py::test_correct_api_key": "/completions answers as OpenAI's does; " + _FIELDS,
    r"test_security\.py::test_cors_o": _ORIGIN,
    r"test_tool_call\.py::test_(?!thoughts|completion_without).*(gemma|Phi-3\.5|chatml)": _UNTOOLED,
}
"""Asked, and known to fail."""


def alone(test: str) -> str | None:
    """Why a node is not asked this: it is about llama-server alone, or a model that is not here."""
    return _reason(_ALONE, test)


def otherwise(test: str) -> str | None:
    """Why a node answers this otherwise."""
    return _reason(_OTHERWISE, test)


def _reason(table: dict[str, str], test: str) -> str | None:
    return next((reason for pattern, reason in table.items() if re.match(pattern, test)), None)
