"""Headers of requests and answers, and how one proves who one is, for the OpenAPI document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.base.priority import PRIORITIES
from ollama_distributed.gateway.cookies import SESSION
from ollama_distributed.gateway.errors import STATUS
from ollama_distributed.gateway.queueing import LONGEST_S

_NUMBER = {"type": "integer", "minimum": 0}
_TEXT = {"type": "string"}
_REQUEST_ID = {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._:-]{0,63}$"}

REQUEST: Mapping[str, Mapping[str, Any]] = {
    "X-Request-Id": {
        "description": "Its answer's X-Request-Id, if it is well-formed; else it gets another one.",
        "schema": _TEXT,
    },
    "X-Ollama-Priority": {
        "description": "How it waits; the key's own class is the highest that it may have.",
        "schema": {"type": "string", "enum": list(PRIORITIES)},
    },
    "X-Request-Timeout": {
        "description": "Seconds that it may wait for a slot at most.",
        "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": LONGEST_S},
    },
    "X-Ollama-Progress": {
        "description": "1: the stream tells of its place while it waits; 0, false or nothing: it does not.",
        "schema": _TEXT,
    },
    "X-Ollama-Resume-At": {
        "description": "Goes on with the answer that X-Request-Id names, behind so many bytes of its text "
        "(UTF-8, thinking included).",
        "schema": _NUMBER,
    },
}
"""Of requests to inference routes."""
ONLY_TEXT = frozenset({"X-Ollama-Progress", "X-Ollama-Resume-At"})
"""Of those the ones that only generated text knows."""

ANSWER: Mapping[str, Mapping[str, Any]] = {
    "X-Request-Id": {
        "description": "Names the request in the log, the audit and route/explain.",
        "required": True,
        "schema": _REQUEST_ID,
    },
    "Request-Id": {"description": "The same, as clients of Anthropic's read it.", "schema": _REQUEST_ID},
    "X-Ollama-Node": {"description": "Name of the node that answers.", "schema": _TEXT},
    "X-Ollama-Route": {"description": "Why that node, in a word.", "schema": _TEXT},
    "X-Ollama-Failovers": {
        "description": "How often it went on at another node, before its first byte.",
        "schema": _NUMBER,
    },
    "X-Queue-Position": {"description": "Its place when it began to wait, if it did.", "schema": _NUMBER},
    "X-Queue-ETA": {"description": "Seconds that it was to wait.", "schema": {"type": "number"}},
    "Retry-After": {"description": "Seconds, where waiting helps.", "schema": _NUMBER},
    "X-Should-Retry": {"description": "false: the same request cannot succeed.", "schema": _TEXT},
    "WWW-Authenticate": {"description": "With 401.", "schema": _TEXT},
    "Allow": {"description": "With 405: the methods of the path.", "schema": _TEXT},
}
"""Of answers."""
FOUND = ("X-Ollama-Node", "X-Ollama-Route", "X-Ollama-Failovers", "X-Queue-Position", "X-Queue-ETA")
REFUSED = ("Retry-After", "X-Should-Retry", "WWW-Authenticate", "Allow")
_LIMITS = ("limit", "remaining", "reset")


def _limit(name: str, what: str) -> Mapping[str, Any]:
    text = {"limit": "may be had", "remaining": "are left", "reset": "come back: when"}[what]
    schema = _TEXT if what == "reset" else _NUMBER
    return {"description": f"Of the limit of {name}, where the key has one: {text}.", "schema": schema}


OPENAI_LIMITS = {
    f"X-RateLimit-{what.title()}-{name.title()}": _limit(name, what)
    for name in ("requests", "tokens")
    for what in _LIMITS
}
ANTHROPIC_LIMITS = {
    f"anthropic-ratelimit-{name}-{what}": _limit(name, what)
    for name in ("requests", "tokens")
    for what in _LIMITS
}

SCHEMES: Mapping[str, Mapping[str, Any]] = {
    "key": {
        "type": "http",
        "scheme": "bearer",
        "description": "odk_… key, ods_… session or JWT; not needed at this machine",
    },
    "x-api-key": {
        "type": "apiKey",
        "in": "header",
        "name": "X-Api-Key",
        "description": "The same, as Anthropic's clients send it.",
    },
    "session": {
        "type": "apiKey",
        "in": "cookie",
        "name": SESSION,
        "description": f"A browser's session; over TLS the cookie is __Host-{SESSION}. What changes "
        "something needs its X-CSRF-Token too.",
    },
}


def components() -> dict[str, Any]:
    headers = {**ANSWER, **OPENAI_LIMITS, **ANTHROPIC_LIMITS}
    parameters = {name: {"name": name, "in": "header", **row} for name, row in REQUEST.items()}
    return {"headers": headers, "parameters": parameters, "securitySchemes": SCHEMES}


def answered(names: Iterable[str] = ()) -> dict[str, Any]:
    """The headers of an answer, as references; all have X-Request-Id."""
    return {name: {"$ref": f"#/components/headers/{name}"} for name in ("X-Request-Id", *names)}


def asked(*, generates: bool) -> list[dict[str, Any]]:
    names = [name for name in REQUEST if generates or name not in ONLY_TEXT]
    return [{"$ref": f"#/components/parameters/{name}"} for name in names]


def codes() -> str:
    """Every status with the codes of its errors, for the document's introduction."""
    by_status: dict[int, list[str]] = {}
    errors: Mapping[type[OllamaDistributedError], int] = STATUS
    for error, status in errors.items():
        if error.code not in by_status.setdefault(status, []):
            by_status[status].append(error.code)
    return "; ".join(f"{status} {', '.join(by_status[status])}" for status in sorted(by_status))
