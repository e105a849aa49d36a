"""`client.keys` and `client.policies`, for both clients; as `client.cluster` is made."""

from __future__ import annotations

from ollama_distributed.client import access_calls as calls
from ollama_distributed.client.cluster import _Group, _run, _run_sync, _SyncGroup


class Keys(_Group):
    """API keys, and who one is: `client.keys`."""

    list = _run(calls.list_keys)
    get = _run(calls.get_key)
    create = _run(calls.create_key)
    rotate = _run(calls.rotate_key)
    revoke = _run(calls.revoke_key)
    whoami = _run(calls.whoami)


class Policies(_Group):
    """What keys, roles and teams may do: `client.policies`."""

    list = _run(calls.list_policies)
    get = _run(calls.get_policy)
    create = _run(calls.create_policy)
    set = _run(calls.set_policy)
    delete = _run(calls.delete_policy)
    explain = _run(calls.explain_policy)


class SyncKeys(_SyncGroup):
    """API keys, and who one is: `client.keys`."""

    list = _run_sync(calls.list_keys)
    get = _run_sync(calls.get_key)
    create = _run_sync(calls.create_key)
    rotate = _run_sync(calls.rotate_key)
    revoke = _run_sync(calls.revoke_key)
    whoami = _run_sync(calls.whoami)


class SyncPolicies(_SyncGroup):
    """What keys, roles and teams may do: `client.policies`."""

    list = _run_sync(calls.list_policies)
    get = _run_sync(calls.get_policy)
    create = _run_sync(calls.create_policy)
    set = _run_sync(calls.set_policy)
    delete = _run_sync(calls.delete_policy)
    explain = _run_sync(calls.explain_policy)
