"""The OpenAPI document: hot and cold routes, with the schemas of the structs they decode."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from ollama_distributed.gateway.dialects.anthropic_request import MessagesIn
from ollama_distributed.gateway.dialects.contract import HotRoute
from ollama_distributed.gateway.dialects.ollama_wire import ChatBody, EmbedBody, EmbeddingsBody, GenerateBody
from ollama_distributed.gateway.dialects.openai_chat import ChatIn
from ollama_distributed.gateway.dialects.openai_completions import CompletionIn
from ollama_distributed.gateway.dialects.openai_embeddings import EmbeddingsIn
from ollama_distributed.gateway.dialects.rerank import RerankIn
from ollama_distributed.gateway.dialects.responses_request import ResponsesIn
from ollama_distributed.gateway.errors import OllamaErrorBody, SeedErrorBody
from ollama_distributed.gateway.routes.table import ColdRoute
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
_BINARY = {"type": "string", "format": "binary"}
_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")


def document(hot: Iterable[HotRoute], cold: Iterable[ColdRoute], *, version: str) -> dict[str, Any]:
    cold = [route for route in cold if not route.hidden]
    types: list[type[Any]] = [SeedErrorBody, OllamaErrorBody]
    types += [body for body, _ in HOT_BODIES.values()]
    types += [one for route in cold for one in (route.body, route.answer) if one is not None]
    types = list(dict.fromkeys(types))
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    reference = dict(zip(types, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in hot:
        body, text = HOT_BODIES[route.path]
        _add(paths, route.path, route.method, _tag(route.path), text, reference[body])
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
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    elif plain.startswith("/api/blobs/") and method == "POST":
        operation["requestBody"] = _file("application/octet-stream")
    paths.setdefault(plain, {})[method.lower()] = operation
    return operation


def _file(media: str) -> dict[str, Any]:
    return {"required": True, "content": {media: {"schema": _BINARY}}}


def _word(name: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "schema": {"type": "string"}}


def _flag(name: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "schema": {"type": "boolean", "default": False}}


def _answered(route: ColdRoute, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {str(route.status): {"description": "Done.", "content": {route.media: {"schema": schema}}}}
