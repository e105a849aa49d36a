"""`client.auth` and `client.users`: for both clients."""

from __future__ import annotations

from ollama_distributed.client import people_calls as calls
from ollama_distributed.client.groups import Group, SyncGroup, run, run_sync


class Auth(Group):
    """Signing in, and one's own sessions: `client.auth`."""

    login = run(calls.login)
    redeem = run(calls.redeem)
    logout = run(calls.logout)
    refresh = run(calls.refresh)
    token = run(calls.token)
    session = run(calls.session)
    sessions = run(calls.sessions)
    end_session = run(calls.end_session)
    change_password = run(calls.change_password)
    jwks = run(calls.jwks)


class Users(Group):
    """Who may sign in: `client.users`."""

    list = run(calls.list_users)
    get = run(calls.get_user)
    create = run(calls.create_user)
    change = run(calls.change_user)
    set_password = run(calls.set_password)
    delete = run(calls.delete_user)
    sessions = run(calls.user_sessions)
    end_sessions = run(calls.end_user_sessions)


class SyncAuth(SyncGroup):
    """Signing in, and one's own sessions: `client.auth`."""

    login = run_sync(calls.login)
    redeem = run_sync(calls.redeem)
    logout = run_sync(calls.logout)
    refresh = run_sync(calls.refresh)
    token = run_sync(calls.token)
    session = run_sync(calls.session)
    sessions = run_sync(calls.sessions)
    end_session = run_sync(calls.end_session)
    change_password = run_sync(calls.change_password)
    jwks = run_sync(calls.jwks)


class SyncUsers(SyncGroup):
    """Who may sign in: `client.users`."""

    list = run_sync(calls.list_users)
    get = run_sync(calls.get_user)
    create = run_sync(calls.create_user)
    change = run_sync(calls.change_user)
    set_password = run_sync(calls.set_password)
    delete = run_sync(calls.delete_user)
    sessions = run_sync(calls.user_sessions)
    end_sessions = run_sync(calls.end_user_sessions)
