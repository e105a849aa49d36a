"""What admission needs of the world. `cluster.ports.Coordination` is a `Records`."""

from __future__ import annotations

from typing import Literal, Protocol, TypeAlias

import msgspec

from ollama_distributed.cluster.ports import Entry


class Records(Protocol):
    async def get(self, key: str) -> Entry | None: ...

    async def put(self, key: str, value: bytes, *, revision: int) -> int:
        """Compare-and-set; revision `ABSENT`: the key must not be there.

        Raises:
            Conflict: the key stands at another revision.
        """
        ...


EventKind: TypeAlias = Literal[
    "token.created",
    "token.revoked",
    "node.admitted",
    "node.admitted_again",
    "node.renewed",
    "node.removed",
    "join.refused",
    "join.throttled",
]


class AuditEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that happened to the cluster's trust. Never holds a secret."""

    kind: EventKind
    at: float
    source: str = ""
    """Address it came from."""
    actor: str = ""
    token_id: str = ""
    node: str = ""
    reason: str = ""
    alarm: bool = False
    """A person must look: a used or revoked token's secret came again, or was bent to another role."""


class Audit(Protocol):
    def __call__(self, event: AuditEvent, /) -> None:
        """Keep the event. What it raises reaches the asker: no credentials leave unrecorded."""
        ...
