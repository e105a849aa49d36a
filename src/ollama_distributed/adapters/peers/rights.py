"""Who of the cluster may ask what over the hop: the reviewed list of all its routes.

Every caller has shown a certificate of this cluster that is neither expired nor revoked
(`adapters.identity.handshake_server`). A request for somebody (to generate, a file, a batch) also
carries that person's identity, signed by the gateway that let it in, and is judged by it. A route without
a row cannot be added to the door.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

from ollama_distributed.base.ids import NodeRole

Callers: TypeAlias = Literal["members", "servers"]

ROWS: Mapping[str, Callers] = {
    # Inference, for somebody.
    "generate": "members",
    "embed": "members",
    "rerank": "members",
    "count_tokens": "members",
    "written": "members",
    "handed": "members",
    "files/one": "members",
    "files/list": "members",
    "files/read": "members",
    "files/delete": "members",
    "batches/create": "members",
    "batches/one": "members",
    "batches/list": "members",
    "batches/cancel": "members",
    # Who signs in, who they are and what they change: judged where it is done.
    "people/ask": "members",
    # Models and their pieces.
    "show": "members",
    "unload": "members",
    "models/name": "members",
    "models/manifest": "members",
    "models/copy": "members",
    "models/transfers": "members",
    "pieces/have": "members",
    "pieces/get": "members",
    "outside/turn": "members",
    "outside/blob": "members",
    "outside/pulled": "members",
    "outside/follow": "members",
    "disk/keep": "members",
    "disk/show": "members",
    "disk/evict": "members",
    "disk/scrub": "members",
    # What a gateway asks others to answer for all.
    "queue/show": "members",
    "queue/waiting": "members",
    "quota/borrow": "members",
    "quota/left": "members",
    "usage/keep": "members",
    "usage/ask": "members",
    # Its own chain a node has kept elsewhere; what others did only servers read.
    "audit/take": "members",
    "audit/page": "servers",
    "audit/check": "servers",
    # Who is in the cluster, and who votes.
    "members/leave": "members",
    "voters/prepare": "servers",
    "voters/take": "servers",
    "voters/leave": "servers",
    "voters/replace": "servers",
    "voters/hand-over": "servers",
}


def callers_of(route: str) -> Callers:
    """
    Raises:
        LookupError: the route has no row.
    """
    try:
        return ROWS[route]
    except KeyError:
        raise LookupError(
            f"{route} has no row in adapters/peers/rights.py: who may ask is not said"
        ) from None


def may(role: NodeRole, callers: Callers) -> bool:
    return callers == "members" or role == "server"
