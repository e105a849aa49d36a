"""`client.audit`: for both clients, as `cluster.py`."""

from __future__ import annotations

from ollama_distributed.client import audit_calls as calls
from ollama_distributed.client.cluster import _Group, _run, _run_sync, _SyncGroup


class Audit(_Group):
    """Who changed what: `client.audit`."""

    page = _run(calls.page)
    verify = _run(calls.verify)


class SyncAudit(_SyncGroup):
    """Who changed what: `client.audit`."""

    page = _run_sync(calls.page)
    verify = _run_sync(calls.verify)
