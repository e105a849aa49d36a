"""`client.audit`: for both clients."""

from __future__ import annotations

from ollama_distributed.client import audit_calls as calls
from ollama_distributed.client.groups import Group, SyncGroup, run, run_sync


class Audit(Group):
    """Who changed what: `client.audit`."""

    page = run(calls.page)
    verify = run(calls.verify)


class SyncAudit(SyncGroup):
    """Who changed what: `client.audit`."""

    page = run_sync(calls.page)
    verify = run_sync(calls.verify)
