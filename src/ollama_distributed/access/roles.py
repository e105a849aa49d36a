"""Which role may do what: one table, deny by default."""

from __future__ import annotations

from typing import Literal

from ollama_distributed.base.errors import Forbidden
from ollama_distributed.base.identity import Identity, Role

Verb = Literal["inference", "read", "models", "admin"]
"""inference: generate, embed, rerank · read: lists, health, metrics · models: create, copy,
delete, upload · admin: everything that changes who may do what, or the node itself."""

MAY: dict[Role, frozenset[Verb]] = {
    "admin": frozenset({"inference", "read", "models", "admin"}),
    # A person at this machine, as Ollama has it; administration always needs a key.
    "local": frozenset({"inference", "read", "models"}),
}


def demand(identity: Identity, verb: Verb) -> None:
    """Raises `Forbidden` unless the identity's role has the verb."""
    if verb not in MAY[identity.role]:
        raise Forbidden(f"the role {identity.role!r} may not do this ({verb}); use an admin key")
