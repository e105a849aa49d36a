"""The OpenAPI document: hot and cold routes, with the schemas of the structs they decode."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from ollama_distributed.gateway.dialects.anthropic_errors import AnthropicErrorBody
from ollama_distributed.gateway.dialects.anthropic_errors import render_error as render_anthropic
from ollama_distributed.gateway.dialects.anthropic_request import MessagesIn
from ollama_distributed.gateway.dialects.contract import HotRoute, RenderError
from ollama_distributed.gateway.dialects.ollama import render_scheduled
from ollama_distributed.gateway.dialects.ollama_wire import ChatBody, EmbedBody, EmbeddingsBody, GenerateBody
from ollama_distributed.gateway.dialects.openai_chat import ChatIn
from ollama_distributed.gateway.dialects.openai_completions import CompletionIn
from ollama_distributed.gateway.dialects.openai_embeddings import EmbeddingsIn
from ollama_distributed.gateway.dialects.openai_errors import OpenAIErrorBody
from ollama_distributed.gateway.dialects.openai_errors import render_error as render_openai
from ollama_distributed.gateway.dialects.rerank import RerankIn
from ollama_distributed.gateway.dialects.responses_request import ResponsesIn
from ollama_distributed.gateway.errors import OllamaErrorBody, SeedErrorBody, render_ollama, render_seed
from ollama_distributed.gateway.routes.batches import FORM
from ollama_distributed.gateway.routes.table import ColdRoute
from ollama_distributed.gateway.shapes import renderer_of
from ollama_distributed.models.bundle import MEDIA_TYPE as TAR

_TAGS = (
    ("/api/v1/", "REST"),
    ("/api/", "Ollama: inference"),
    ("/v1/messages", "Anthropic"),
    ("/", "OpenAI"),
)
HOT_BODIES: Mapping[str, tuple[type[Any], str]] = {
    "/api/v1/generate": (GenerateBody, "Complete a prompt; one object, or lines with stream"),
    "/api/v1/chat": (ChatBody, "Answer a chat; one object, or lines with stream"),
    "/api/v1/embeddings": (EmbedBody, "Embed texts"),
    "/api/generate": (GenerateBody, "Complete a prompt; streams unless told otherwise"),
    "/api/chat": (ChatBody, "Answer a chat; streams unless told otherwise"),
    "/api/embed": (EmbedBody, "Embed texts"),
    "/api/embeddings": (EmbeddingsBody, "Embed one text (older form)"),
    "/v1/chat/completions": (ChatIn, "Answer a chat"),
    "/v1/completions": (CompletionIn, "Complete a prompt"),
    "/v1/embeddings": (EmbeddingsIn, "Embed texts or tokens"),
    "/v1/responses": (ResponsesIn, "Answer, stateless"),
    "/v1/rerank": (RerankIn, "Order documents by relevance"),
    "/rerank": (RerankIn, "Order documents by relevance"),
    "/v1/messages": (MessagesIn, "Answer a chat"),
    "/v1/messages/count_tokens": (MessagesIn, "Count the tokens of a chat"),
}
"""Path of a hot route -> the struct of its body and one line about it."""
_ERRORS: Mapping[RenderError, type[Any]] = {
    render_seed: SeedErrorBody,
    render_ollama: OllamaErrorBody,
    render_scheduled: OllamaErrorBody,
    render_openai: OpenAIErrorBody,
    render_anthropic: AnthropicErrorBody,
}
_JSON, _LINES, _EVENTS = "application/json", "application/x-ndjson", "text/event-stream"
_NUMBER = {"type": "integer", "minimum": 1}
_DAY = {"type": "string", "format": "date"}
_FORMS: Mapping[str, Mapping[str, Any]] = {
    "limit": _NUMBER,
    "context": _NUMBER,
    "slots": _NUMBER,
    "since": {"type": "number", "minimum": 0},
    "port": {"type": "integer", "minimum": 1024, "maximum": 65535},
    "from": _DAY,
    "to": _DAY,
    "order": {"type": "string", "enum": ["asc", "desc"]},
    "format": {"type": "string", "enum": ["csv", "json"]},
}
"""Of parameters that are no free text."""
_BINARY = {"type": "string", "format": "binary"}
_FORM = {
    "type": "object",
    "required": ["purpose", "file"],
    "properties": {
        "purpose": {"type": "string", "enum": ["batch"]},
        "file": _BINARY,
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 1},
    },
}
"""Of a file that is uploaded as OpenAI's clients do."""
_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")


def document(hot: Iterable[HotRoute], cold: Iterable[ColdRoute], *, version: str) -> dict[str, Any]:
    cold = [route for route in cold if not route.hidden]
    types: list[type[Any]] = list(_ERRORS.values())
    types += [body for body, _ in HOT_BODIES.values()]
    types += [one for route in cold for one in (route.body, route.answer) if one is not None]
    types = list(dict.fromkeys(types))
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    reference = dict(zip(types, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in hot:
        body, text = HOT_BODIES[route.path]
        operation = _add(paths, route.path, route.method, _tag(route.path), text, reference[body])
        operation["responses"] = {
            "200": {"description": "Done.", "content": _answers(route, body)},
            "default": _refused(reference[_ERRORS[route.render_error]]),
        }
    for one in cold:
        schema = reference[one.body] if one.body is not None else None
        operation = _add(paths, one.path, one.method, one.tag, one.summary, schema)
        if one.query or one.words:
            operation.setdefault("parameters", []).extend((*map(_word, one.words), *map(_flag, one.query)))
        if one.verb is None:
            operation["security"] = []
        if one.upload:
            operation["requestBody"] = _file(one.upload)
        if one.media == TAR:
            operation["responses"] = {"200": {"description": "Done.", "content": {TAR: {"schema": _BINARY}}}}
        elif one.answer is not None:
            operation["responses"] = _answered(one, reference[one.answer])
        elif one.status != 200:
            operation["responses"] = {str(one.status): {"description": "Done."}}
        for media in one.other_media:
            operation["responses"][str(one.status)]["content"][media] = {}
        for status in one.other:
            operation["responses"][str(status)] = {"description": "As the route's text says."}
        operation["responses"]["default"] = _refused(reference[_ERRORS[renderer_of(one.path)]])
    return {
        "openapi": "3.1.0",
        "info": {"title": "Ollama Distributed", "version": version},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "odk_… key, ods_… session or JWT; not needed at this machine",
                }
            },
        },
        "security": [{"key": []}, {}],
    }


def _answers(route: HotRoute, body: type[Any]) -> dict[str, Any]:
    """What media types an answer may have; its JSON is as the API's own documentation has it."""
    answers: dict[str, Any] = {_JSON: {"schema": {"type": "object"}}}
    if "stream" in body.__struct_fields__:
        ours = _ERRORS[route.render_error] in (SeedErrorBody, OllamaErrorBody)
        answers[_LINES if ours else _EVENTS] = {}
    return answers


def _refused(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"description": "Refused, or it failed.", "content": {_JSON: {"schema": schema}}}


def _tag(path: str) -> str:
    return next(tag for prefix, tag in _TAGS if path.startswith(prefix))


def _add(
    paths: dict[str, dict[str, Any]],
    path: str,
    method: str,
    tag: str,
    summary: str,
    body: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Put an operation among `paths`; it is returned, for more about it."""
    names = _PARAMETER.findall(path)
    plain = _PARAMETER.sub(r"{\1}", path)
    operation: dict[str, Any] = {
        "operationId": f"{method.lower()}{re.sub(r'[^A-Za-z0-9]+', '_', plain).rstrip('_')}",
        "tags": [tag],
        "summary": summary,
        "responses": {"200": {"description": "As this API's own documentation has it."}},
    }
    if names:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {_JSON: {"schema": body}}}
    elif plain.startswith("/api/blobs/") and method == "POST":
        operation["requestBody"] = _file("application/octet-stream")
    paths.setdefault(plain, {})[method.lower()] = operation
    return operation


def _file(media: str) -> dict[str, Any]:
    return {"required": True, "content": {media: {"schema": _FORM if media == FORM else _BINARY}}}


def _word(name: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "schema": _FORMS.get(name, {"type": "string"})}


def _flag(name: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "schema": {"type": "boolean", "default": False}}


def _answered(route: ColdRoute, schema: Mapping[str, Any]) -> dict[str, Any]:
    if route.media == _EVENTS:  # each event's data is one
        data = {"type": "string", "contentMediaType": _JSON, "contentSchema": schema}
        schema = {"type": "object", "required": ["data"], "properties": {"data": data}}
    return {str(route.status): {"description": "Done.", "content": {route.media: {"schema": schema}}}}
