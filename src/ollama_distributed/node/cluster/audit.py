"""What happened to the cluster's trust, in the log and in this node's audit chain."""

from __future__ import annotations

import msgspec
import structlog

from ollama_distributed.access.audit.log import AuditLog
from ollama_distributed.base.audit import AuditEntry
from ollama_distributed.cluster.identity.ports import AuditEvent, EventKind

log = structlog.get_logger("identity.audit")

_REFUSED: frozenset[EventKind] = frozenset({"join.refused", "join.throttled"})
"""Anybody may cause these: of a flood only some are kept."""
_ROUTINE: frozenset[EventKind] = frozenset({"node.renewed"})
"""Each node, twice a day; the log has them."""


class TrustAudit:
    """Implements `cluster.identity.ports.Audit`."""

    def __init__(self, chain: AuditLog) -> None:
        self._chain = chain

    def __call__(self, event: AuditEvent, /) -> None:
        """
        Raises:
            DiskFull, Unavailable: nothing can be recorded now, so nobody is let in.
        """
        fields = {
            name: value for name, value in msgspec.structs.asdict(event).items() if value not in ("", False)
        }
        kind = fields.pop("kind")
        if event.alarm:
            log.warning(kind, **fields)
        else:
            log.info(kind, **fields)
        if event.kind in _ROUTINE:
            return
        entry = AuditEntry(
            action=event.kind,
            result=event.reason or "ok",
            object=" ".join(
                f"{name}={value}"
                for name, value in (("node", event.node), ("token", event.token_id))
                if value
            ),
            actor=event.actor,
            source=event.source,
            alarm=event.alarm,
        )
        if event.kind in _REFUSED and not event.alarm:
            self._chain.refused(entry)
            return
        if self._chain.failure is not None:
            raise self._chain.failure
        self._chain.note(entry)
