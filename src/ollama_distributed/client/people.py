"""`client.auth` and `client.users`, for both clients; as `client.cluster` is made."""

from __future__ import annotations

from ollama_distributed.client import people_calls as calls
from ollama_distributed.client.cluster import _Group, _run, _run_sync, _SyncGroup


class Auth(_Group):
    """Signing in, and one's own sessions: `client.auth`."""

    login = _run(calls.login)
    redeem = _run(calls.redeem)
    logout = _run(calls.logout)
    refresh = _run(calls.refresh)
    token = _run(calls.token)
    session = _run(calls.session)
    sessions = _run(calls.sessions)
    end_session = _run(calls.end_session)
    change_password = _run(calls.change_password)
    jwks = _run(calls.jwks)


class Users(_Group):
    """Who may sign in: `client.users`."""

    list = _run(calls.list_users)
    get = _run(calls.get_user)
    create = _run(calls.create_user)
    change = _run(calls.change_user)
    set_password = _run(calls.set_password)
    delete = _run(calls.delete_user)
    sessions = _run(calls.user_sessions)
    end_sessions = _run(calls.end_user_sessions)


class SyncAuth(_SyncGroup):
    """Signing in, and one's own sessions: `client.auth`."""

    login = _run_sync(calls.login)
    redeem = _run_sync(calls.redeem)
    logout = _run_sync(calls.logout)
    refresh = _run_sync(calls.refresh)
    token = _run_sync(calls.token)
    session = _run_sync(calls.session)
    sessions = _run_sync(calls.sessions)
    end_session = _run_sync(calls.end_session)
    change_password = _run_sync(calls.change_password)
    jwks = _run_sync(calls.jwks)


class SyncUsers(_SyncGroup):
    """Who may sign in: `client.users`."""

    list = _run_sync(calls.list_users)
    get = _run_sync(calls.get_user)
    create = _run_sync(calls.create_user)
    change = _run_sync(calls.change_user)
    set_password = _run_sync(calls.set_password)
    delete = _run_sync(calls.delete_user)
    sessions = _run_sync(calls.user_sessions)
    end_sessions = _run_sync(calls.end_user_sessions)
