"""`client.keys` and `client.policies`: for both clients."""

from __future__ import annotations

from ollama_distributed.client import access_calls as calls
from ollama_distributed.client.groups import Group, SyncGroup, run, run_sync


class Keys(Group):
    """API keys, and who one is: `client.keys`."""

    list = run(calls.list_keys)
    get = run(calls.get_key)
    create = run(calls.create_key)
    rotate = run(calls.rotate_key)
    revoke = run(calls.revoke_key)
    whoami = run(calls.whoami)


class Policies(Group):
    """What keys, roles and teams may do: `client.policies`."""

    list = run(calls.list_policies)
    get = run(calls.get_policy)
    create = run(calls.create_policy)
    set = run(calls.set_policy)
    delete = run(calls.delete_policy)
    explain = run(calls.explain_policy)


class SyncKeys(SyncGroup):
    """API keys, and who one is: `client.keys`."""

    list = run_sync(calls.list_keys)
    get = run_sync(calls.get_key)
    create = run_sync(calls.create_key)
    rotate = run_sync(calls.rotate_key)
    revoke = run_sync(calls.revoke_key)
    whoami = run_sync(calls.whoami)


class SyncPolicies(SyncGroup):
    """What keys, roles and teams may do: `client.policies`."""

    list = run_sync(calls.list_policies)
    get = run_sync(calls.get_policy)
    create = run_sync(calls.create_policy)
    set = run_sync(calls.set_policy)
    delete = run_sync(calls.delete_policy)
    explain = run_sync(calls.explain_policy)
