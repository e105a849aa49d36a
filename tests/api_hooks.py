"""What schemathesis is told of the world that it asks: which things there are, and how to write a tar.

Loaded by its program (`SCHEMATHESIS_HOOKS=tests.api_hooks`). Half of the requests name what is there, and
half of the bodies are good ones with two fields of the generated: so that more is seen than "not found" and
"invalid". Models come from the registry of the test and no other.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter
from typing import Any

import schemathesis

WORLD: dict[str, Any] = json.loads(os.environ.get("API_WORLD", "{}"))
"""`registry`: its host; `model`; `names`, `doomed`: path prefix -> what is there;
`good`: beside `GOOD`."""
_FROM_REGISTRIES = ("/api/pull", "/api/push", "/download", "/fit")
_MODEL_FIELDS = ("model", "name", "from", "source")
_CHAT = {"messages": [{"role": "user", "content": "hi"}], "stream": False}
_PROMPT = {"prompt": "hi", "stream": False}
_RERANK = {"query": "a", "documents": ["b", "c"]}
GOOD: dict[str, dict[str, Any]] = {
    "/api/v1/generate": _PROMPT,
    "/api/generate": _PROMPT,
    "/v1/completions": _PROMPT,
    "/api/v1/chat": _CHAT,
    "/api/chat": _CHAT,
    "/v1/chat/completions": _CHAT,
    "/v1/messages": {**_CHAT, "max_tokens": 9},
    "/v1/messages/count_tokens": {**_CHAT, "max_tokens": 9},
    "/v1/responses": {"input": "hi"},
    "/v1/responses/input_tokens": {"input": "hi"},
    "/api/v1/embeddings": {"input": "hi"},
    "/api/embed": {"input": ["hi", "there"]},
    "/api/embeddings": {"prompt": "hi"},
    "/v1/embeddings": {"input": "hi"},
    "/v1/rerank": _RERANK,
    "/v2/rerank": _RERANK,
    "/rerank": _RERANK,
    "/api/v1/route/explain": {"prompt": "hi"},
    "/api/show": {},
    "/api/create": {"model": "spare", "stream": False},
    "/api/delete": {"model": "doomed"},
    "/v1/batches": {"endpoint": "/v1/chat/completions", "completion_window": "24h"},
    "/api/v1/models/{name}/pin": {},
    "/api/v1/models/{name}/unpin": {},
    "/api/copy": {"source": "echo", "destination": "copied"},
    "/api/v1/keys": {},
    "/api/v1/keys/{id}/rotate": {},
    "/api/v1/policies": {"name": "spare"},
    "/api/v1/policies/{name}": {},
    "/api/v1/policies/explain": {},
    "/api/v1/users": {"name": "somebody", "password": "correct horse battery"},
    "/api/v1/users/{name}": {},
    "/api/v1/users/{name}/password": {"password": "another horse battery"},
    "/api/v1/auth/login": {"name": "spare", "password": "correct horse battery"},
    "/api/v1/cluster/tokens": {},
    "/api/v1/cluster/what-if": {"lose": []},
    "/api/v1/config": {"values": {"keep_alive": "5m"}},
    "/api/v1/config/rollback": {"version": 0},
    "/api/v1/models/{name}/place": {},
    "/api/v1/models/{name}/replicas": {},
    "/api/v1/models/{name}/evict": {},
    "/api/v1/models/{name}/distribute": {},
}
"""Bodies that are taken, by path, with what the world adds; what is about a model has one beside."""
_INFERENCE = ("/api/v1/generate", "/api/v1/chat", "/api/v1/embeddings", "/api/v1/route/explain")


_SELDOM = ("X-Ollama-Resume-At", "X-Ollama-Priority")
"""Headers with which most requests are refused: an answer that is not there, a class above the key's."""
_UNKNOWN = "x-schemathesis-unknown-property"
"""A header that the document does not tell of; servers take any."""
_TWINS = (
    *("/api/v1/generate", "/api/v1/chat", "/api/v1/embeddings"),
    *("/v1/messages/count_tokens", "/v2/rerank", "/rerank", "/api/v1/policies/{name}"),
    *("/v1/responses", "/v1/responses/input_tokens", "/v1/completions"),
)
"""Their bodies are another route's, or much like it; where time is short, that one is asked with all the
bounds."""


_asked: Counter[str] = Counter()
"""How often each operation was asked: turn by turn the path, the body or both are made good."""


def _known(method: str, path: str) -> list[str]:
    """What is there; of what is deleted something that nobody else asks for."""
    deletes = method == "DELETE" or path.endswith("/evict")
    names: dict[str, list[str]] = WORLD["doomed"] if deletes else WORLD["names"]
    return next((found for prefix, found in names.items() if path.startswith(prefix)), [])


def _of_the_registry(name: str) -> str:
    """Names without a host would be asked of Ollama's own registry."""
    return name if name.count("/") > 1 else f"{WORLD['registry']}/library/{name}"


@schemathesis.hook
def before_load_schema(_context: Any, raw_schema: dict[str, Any]) -> None:
    if not WORLD.get("short"):
        return
    for path, operations in raw_schema["paths"].items():
        for operation in operations.values() if path in _TWINS else ():
            if "requestBody" in operation:
                operation["requestBody"]["content"]["application/json"]["schema"] = {"type": "object"}
        for operation in operations.values() if path != "/api/chat" else ():  # headers: of one route
            parameters = operation.get("parameters", ())
            operation["parameters"] = [one for one in parameters if "$ref" not in one]


@schemathesis.hook
def before_call(_context: Any, case: Any, **_: Any) -> None:
    path: str = case.operation.path
    turn = _asked[f"{case.method} {path}"]
    _asked[f"{case.method} {path}"] += 1
    for name in (_UNKNOWN, *(_SELDOM if turn % 4 else ())):
        (case.headers or {}).pop(name, None)
    asks_registry = path.endswith(_FROM_REGISTRIES)
    known = [WORLD["model"]] if asks_registry else _known(case.method, path)  # the others may be gone
    for name, value in (case.path_parameters or {}).items():
        if known and turn & 1:
            case.path_parameters[name] = known[turn // 4 % len(known)]
        elif asks_registry and name == "name":
            case.path_parameters[name] = _of_the_registry(str(value))
    if path == "/api/v1/bundles" and case.query and turn & 1:
        case.query["model"] = _known("GET", "/api/v1/models")[-1]
    if not isinstance(case.body, dict):
        return
    if path in GOOD and turn & 2:
        some = sorted(case.body, key=lambda field: (len(field) * 31 + turn) % 17)[:2]
        good = {"model": WORLD["model"], **GOOD[path], **WORLD["good"].get(path, {})}
        if path.startswith("/api/v1/") and path not in _INFERENCE:
            del good["model"]
        case.body = good | {field: case.body[field] for field in some[: turn // 4 % 3]}
    for field in _MODEL_FIELDS:
        value = case.body.get(field)
        if isinstance(value, str) and asks_registry:
            case.body[field] = _of_the_registry(value)
        elif isinstance(value, str) and field != "name" and turn & 1 and path not in GOOD:
            case.body[field] = WORLD["model"]


@schemathesis.serializer("application/x-tar")
def tar(_context: Any, value: Any) -> bytes:
    """Every second one is a tar, with what was made up as a file."""
    _asked["tar"] += 1
    data = value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")
    if _asked["tar"] % 2:
        return data
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in ("oci-layout", "index.json"):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()
