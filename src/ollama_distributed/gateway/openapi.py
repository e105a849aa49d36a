"""The OpenAPI document: hot and cold routes, with the schemas of the structs they decode."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ollama_distributed.gateway import openapi_headers
from ollama_distributed.gateway.dialects import answer_bodies as bodies
from ollama_distributed.gateway.dialects.anthropic_errors import AnthropicErrorBody
from ollama_distributed.gateway.dialects.anthropic_errors import render_error as render_anthropic
from ollama_distributed.gateway.dialects.anthropic_request import MessagesIn
from ollama_distributed.gateway.dialects.contract import HotRoute, RenderError
from ollama_distributed.gateway.dialects.ollama import render_scheduled
from ollama_distributed.gateway.dialects.ollama_answer import NDJSON
from ollama_distributed.gateway.dialects.ollama_wire import ChatBody, EmbedBody, EmbeddingsBody, GenerateBody
from ollama_distributed.gateway.dialects.openai_chat import ChatIn
from ollama_distributed.gateway.dialects.openai_completions import CompletionIn
from ollama_distributed.gateway.dialects.openai_embeddings import EmbeddingsIn
from ollama_distributed.gateway.dialects.openai_errors import OpenAIErrorBody
from ollama_distributed.gateway.dialects.openai_errors import render_error as render_openai
from ollama_distributed.gateway.dialects.rerank import RerankIn
from ollama_distributed.gateway.dialects.responses import InputTokens
from ollama_distributed.gateway.dialects.responses_request import ResponsesIn
from ollama_distributed.gateway.errors import OllamaErrorBody, SeedErrorBody, render_ollama, render_seed
from ollama_distributed.gateway.gate import Head
from ollama_distributed.gateway.openapi_schemas import schemas_of
from ollama_distributed.gateway.pages import wants_page
from ollama_distributed.gateway.routes.batches import FORM
from ollama_distributed.gateway.routes.table import ColdRoute
from ollama_distributed.gateway.shapes import for_anthropic, renderer_of
from ollama_distributed.models.bundle import MEDIA_TYPE as TAR

_TAGS = (
    ("/api/v1/", "REST"),
    ("/api/", "Ollama: inference"),
    ("/v1/messages", "Anthropic"),
    ("/", "OpenAI"),
)
HOT_BODIES: Mapping[str, tuple[type[Any], type[Any], str]] = {
    "/api/v1/generate": (
        GenerateBody,
        bodies.GenerateAnswer,
        "Complete a prompt; one object, or lines with stream",
    ),
    "/api/v1/chat": (ChatBody, bodies.ChatAnswer, "Answer a chat; one object, or lines with stream"),
    "/api/v1/embeddings": (EmbedBody, bodies.EmbedAnswer, "Embed texts"),
    "/api/generate": (
        GenerateBody,
        bodies.GenerateAnswer,
        "Complete a prompt; streams unless told otherwise",
    ),
    "/api/chat": (ChatBody, bodies.ChatAnswer, "Answer a chat; streams unless told otherwise"),
    "/api/embed": (EmbedBody, bodies.EmbedAnswer, "Embed texts"),
    "/api/embeddings": (EmbeddingsBody, bodies.EmbeddingAnswer, "Embed one text (older form)"),
    "/v1/chat/completions": (ChatIn, bodies.ChatCompletion, "Answer a chat"),
    "/v1/completions": (CompletionIn, bodies.Completion, "Complete a prompt"),
    "/v1/embeddings": (EmbeddingsIn, bodies.EmbeddingList, "Embed texts or tokens"),
    "/v1/responses": (ResponsesIn, bodies.ResponseAnswer, "Answer, stateless"),
    "/v1/responses/input_tokens": (ResponsesIn, InputTokens, "Count the tokens of an input"),
    "/v1/rerank": (RerankIn, bodies.RerankAnswer, "Order documents by relevance"),
    "/v2/rerank": (RerankIn, bodies.RerankAnswer, "Order documents by relevance"),
    "/rerank": (RerankIn, bodies.RerankAnswer, "Order documents by relevance"),
    "/v1/messages": (MessagesIn, bodies.MessageAnswer, "Answer a chat"),
    "/v1/messages/count_tokens": (MessagesIn, bodies.TokenCount, "Count the tokens of a chat"),
}
"""Path of a hot route -> the structs of its body and answer, and one line about it."""
_ERRORS: Mapping[RenderError, type[Any]] = {
    render_seed: SeedErrorBody,
    render_ollama: OllamaErrorBody,
    render_scheduled: OllamaErrorBody,
    render_openai: OpenAIErrorBody,
    render_anthropic: AnthropicErrorBody,
}
_JSON, _LINES, _EVENTS, _PAGE = "application/json", NDJSON, "text/event-stream", "text/html"
_NUMBER = {"type": "integer", "minimum": 1}
_DAY = {"type": "string", "pattern": r"^(\d{4}-\d{2}-\d{2})?$"}
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
_PLAIN = {"schema": {"type": "string"}}
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


_ABOUT = (
    "One node of Ollama Distributed; docs/api.md tells what is beside each dialect's own documentation.\n\n"
    "Every answer has X-Request-Id. The status of a stream comes with its first byte; an error after "
    "that is the stream's last event or line, in the dialect's form.\n\n"
    "Statuses and codes: {codes}. On Ollama's routes queue_full is 503, and no_capacity, engine_error, "
    "runner_died, quarantined and registry_error are 500."
)
_ABOUT_PATH = {
    "name": "Of a model; may hold / and :, as they are or as %2F and %3A.",
    "model": "May hold / and :, as they are or as %2F and %3A.",
    "digest": "sha256:HEX.",
}


def document(hot: Iterable[HotRoute], cold: Iterable[ColdRoute], *, version: str) -> dict[str, Any]:
    cold = [route for route in cold if not route.hidden]
    asked = [body for body, _, _ in HOT_BODIES.values()]
    told = [*_ERRORS.values(), *(answer for _, answer, _ in HOT_BODIES.values())]
    reference, components = schemas_of(
        [*asked, *(one.body for one in cold if one.body is not None)],
        [*told, *(one.answer for one in cold if one.answer is not None)],
    )
    paths: dict[str, dict[str, Any]] = {}
    for route in hot:
        body, answer, text = HOT_BODIES[route.path]
        operation = _add(paths, route.path, route.method, _tag(route.path), text, reference[body])
        streams = _streams(route, body, answer, reference[answer])
        operation["parameters"] = openapi_headers.asked(generates=bool(streams))
        operation["responses"] = {
            "200": _inferred(route.path, {_JSON: {"schema": reference[answer]}, **streams}),
            "default": _refused(reference[_ERRORS[route.render_error]], _limits(route.path)),
        }
    for one in cold:
        schema = reference[one.body] if one.body is not None else None
        operation = _add(paths, one.path, one.method, one.tag, one.summary, schema)
        if one.query or one.words:
            operation.setdefault("parameters", []).extend((*map(_word, one.words), *map(_flag, one.query)))
        if one.verb is None:
            operation["security"] = []
        if one.body_optional:
            operation["requestBody"]["required"] = False
        if one.upload:
            operation["requestBody"] = _file(one.upload)
        operation["responses"] = _answered(one, reference[one.answer] if one.answer is not None else None)
        refused = _refused(reference[_ERRORS[renderer_of(one.path)]])
        if wants_page(Head("GET", one.path, {"accept": "text/html"})):
            refused["content"][_PAGE] = _PLAIN
        operation["responses"]["default"] = refused
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Ollama Distributed",
            "version": version,
            "description": _ABOUT.format(codes=openapi_headers.codes()),
        },
        "paths": paths,
        "components": {"schemas": components, **openapi_headers.components()},
        "security": [*({name: []} for name in openapi_headers.SCHEMES), {}],
    }


def _streams(
    route: HotRoute, body: type[Any], answer: type[Any], schema: Mapping[str, Any]
) -> dict[str, Any]:
    """The media type of its stream, if it has one, with a line or an event of it."""
    if "stream" not in body.__struct_fields__ or answer is bodies.TokenCount:
        return {}
    ours = _ERRORS[route.render_error] in (SeedErrorBody, OllamaErrorBody)
    return {_LINES: {"schema": schema}} if ours else {_EVENTS: {"schema": _event({"type": "string"})}}


def _inferred(path: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """An answer of an inference route, and where it comes from."""
    headers = openapi_headers.answered((*openapi_headers.FOUND, *_limits(path)))
    return {"description": "Done.", "headers": headers, "content": content}


def _limits(path: str) -> Iterable[str]:
    """Headers that tell what is left of a limit, and which request it was, in the names of its clients."""
    if for_anthropic(path, ()):
        return ("Request-Id", *openapi_headers.ANTHROPIC_LIMITS)
    return openapi_headers.OPENAI_LIMITS


def _refused(schema: Mapping[str, Any], limits: Iterable[str] = ()) -> dict[str, Any]:
    return {
        "description": "Refused, or it failed.",
        "headers": openapi_headers.answered((*openapi_headers.REFUSED, *limits)),
        "content": {_JSON: {"schema": schema}},
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
        "responses": {},
    }
    if names:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}, **_about(path, name)}
            for name in names
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


def _about(path: str, name: str) -> dict[str, str]:
    if name == "id" and path.startswith("/api/v1/nodes"):
        return {"description": "Of a node: its id, or a name that only it has."}
    if f"{{{name}:path}}" not in path and name != "digest":
        return {}
    return {"description": _ABOUT_PATH[name]}


def _event(data: Mapping[str, Any]) -> dict[str, Any]:
    """A server-sent event."""
    name = {"type": "string"}
    return {"type": "object", "required": ["data"], "properties": {"event": name, "id": name, "data": data}}


def _answered(route: ColdRoute, schema: Mapping[str, Any] | None) -> dict[str, Any]:
    """Of what worked, by status."""
    done: dict[str, Any] = {"description": "Done.", "headers": openapi_headers.answered()}
    content: dict[str, Any] = {}
    if schema is not None and route.media == _EVENTS:  # each event's data is one
        data = {"type": "string", "contentMediaType": _JSON, "contentSchema": schema}
        content = {
            _EVENTS: {"schema": {"type": "object", "required": ["data"], "properties": {"data": data}}}
        }
    elif schema is not None:
        content = {route.media: {"schema": schema}}
    elif route.media == TAR:
        content = {TAR: {"schema": _BINARY}}
    elif route.media != _JSON:
        content = {route.media: _PLAIN}
    for media in route.other_media:
        content[media] = {"schema": schema} if media == _LINES else _PLAIN
    if content:
        done["content"] = content
    found = {str(status): done for status in (route.status, *route.same)}
    for status in route.other:
        found[str(status)] = {
            "description": "As the route's text says.",
            "headers": openapi_headers.answered(),
        }
    return found
