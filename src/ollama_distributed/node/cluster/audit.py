"""What happened to the cluster's trust, in the log."""

from __future__ import annotations

import msgspec
import structlog

from ollama_distributed.cluster.identity.ports import AuditEvent

log = structlog.get_logger("identity.audit")


def write(event: AuditEvent) -> None:
    fields = {
        name: value for name, value in msgspec.structs.asdict(event).items() if value not in ("", False)
    }
    kind = fields.pop("kind")
    if event.alarm:
        log.warning(kind, **fields)
    else:
        log.info(kind, **fields)
