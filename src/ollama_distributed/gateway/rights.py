"""Which resource a path is about, and which paths are public: the reviewed list of all routes.

A route says its verb, this table its resource; together they are what `access/roles.py` is asked
for. A route without a row cannot be registered.
"""

from __future__ import annotations

from ollama_distributed.access.roles import Resource, Right, Verb

PUBLIC = frozenset(
    {
        "/healthz",
        "/readyz",
        "/health",
        "/",
        "/ui/",
        "/ui/sign-in",
        "/ui/sign-in.js",
        "/ui/account.js",
        "/ui/style.css",
        "/ui/icon.svg",
        "/api/v1/auth/login",
        "/api/v1/auth/oidc/start",
        "/api/v1/auth/oidc/callback",
    }
)
"""Paths that need no identity. They tell nothing that anyone may not know."""

_ROWS: tuple[tuple[str, str, Resource], ...] = (
    # Inference, in every dialect.
    ("POST", "/api/v1/generate", "inference"),
    ("POST", "/api/v1/chat", "inference"),
    ("POST", "/api/v1/embeddings", "inference"),
    ("POST", "/api/generate", "inference"),
    ("POST", "/api/chat", "inference"),
    ("POST", "/api/embed", "inference"),
    ("POST", "/api/embeddings", "inference"),
    ("POST", "/v1/chat/completions", "inference"),
    ("POST", "/v1/completions", "inference"),
    ("POST", "/v1/embeddings", "inference"),
    ("POST", "/v1/responses", "inference"),
    ("POST", "/v1/responses/input_tokens", "inference"),
    ("POST", "/v1/messages", "inference"),
    ("POST", "/v1/messages/count_tokens", "inference"),
    ("POST", "/v1/rerank", "inference"),
    ("POST", "/v2/rerank", "inference"),
    ("POST", "/rerank", "inference"),
    ("*", "/v1/files*", "files"),
    ("*", "/v1/batches*", "batches"),
    # Models.
    ("*", "/api/v1/models/{name:path}/status", "placement"),
    ("*", "/api/v1/models/{name:path}/fit", "placement"),
    ("*", "/api/v1/models/{name:path}/place", "placement"),
    ("*", "/api/v1/models/{name:path}/replicas", "placement"),
    ("*", "/api/v1/models/{name:path}/pin", "placement"),
    ("*", "/api/v1/models/{name:path}/unpin", "placement"),
    ("POST", "/api/v1/models/{name:path}/distribute", "transfers"),
    ("*", "/api/v1/models*", "models"),
    ("*", "/v1/models*", "models"),
    ("*", "/api/v1/bundles*", "models"),
    ("*", "/api/blobs/*", "models"),
    ("POST", "/api/create", "models"),
    ("POST", "/api/copy", "models"),
    ("POST", "/api/pull", "models"),
    ("POST", "/api/push", "models"),
    ("POST", "/api/show", "models"),
    ("DELETE", "/api/delete", "models"),
    ("*", "/api/tags", "models"),
    ("GET", "/api/ps", "models"),
    ("*", "/api/v1/transfers*", "transfers"),
    ("*", "/api/v1/placement*", "placement"),
    ("*", "/api/v1/cluster/what-if", "placement"),
    ("*", "/api/v1/copies*", "disk"),
    ("GET", "/api/v1/nodes/{id}/disk", "disk"),
    ("POST", "/api/v1/nodes/{id}/scrub", "disk"),
    ("*", "/api/v1/queue*", "queue"),
    ("*", "/api/v1/route*", "decisions"),
    # The node.
    ("*", "/", "node"),
    ("*", "/healthz", "node"),
    ("*", "/readyz", "node"),
    ("*", "/health", "node"),
    ("*", "/api/version", "node"),
    ("*", "/api/status", "node"),
    ("GET", "/api/v1/health", "node"),
    ("GET", "/api/v1/version", "node"),
    ("GET", "/metrics", "metrics"),
    ("GET", "/openapi.json", "docs"),
    ("GET", "/docs", "docs"),
    ("GET", "/ui*", "docs"),
    # The cluster.
    ("DELETE", "/api/v1/nodes/{id}", "members"),
    ("*", "/api/v1/nodes*", "nodes"),
    ("*", "/api/v1/cluster/tokens*", "tokens"),
    ("GET", "/api/v1/cluster*", "cluster"),
    ("POST", "/api/v1/cluster*", "members"),
    ("*", "/api/v1/config*", "config"),
    # Who may do what.
    ("*", "/api/v1/auth*", "account"),
    ("GET", "/api/v1/ws", "account"),
    ("*", "/api/v1/keys*", "keys"),
    ("*", "/api/v1/policies*", "policies"),
    ("*", "/api/v1/users*", "users"),
    ("*", "/api/v1/usage*", "usage"),
    ("*", "/api/v1/audit*", "audit"),
)
"""Method, path (`*` at its end: and what is below), resource; the first that fits counts."""


def resource_of(method: str, path: str) -> Resource:
    """
    Raises:
        LookupError: the route has no row.
    """
    for row_method, row_path, resource in _ROWS:
        if row_method not in ("*", method):
            continue
        stem = row_path.removesuffix("*").rstrip("/")
        if path == row_path or (row_path[-1] == "*" and (path == stem or path.startswith(stem + "/"))):
            return resource
    raise LookupError(f"{method} {path} has no row in gateway/rights.py: who may use it is not said")


def right_of(method: str, path: str, verb: Verb | None) -> Right | None:
    """What the route asks for; None: it is public.

    Raises:
        LookupError: the route has no row, or is public without being on the list.
    """
    resource = resource_of(method, path)
    if verb is None:
        if path not in PUBLIC:
            raise LookupError(f"{method} {path} asks for no verb and is not on the list of public routes")
        return None
    return Right(verb, resource)
