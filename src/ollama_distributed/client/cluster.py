"""`client.cluster`, `client.nodes`, `client.config`: for both clients.

A method is its call (`cluster_calls.py`) and the client that runs it, so the two clients share
signatures and documentation.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from ollama_distributed.client import cluster_calls as calls
from ollama_distributed.client import disk_calls, places_calls, route_calls
from ollama_distributed.client.calls import Call

if TYPE_CHECKING:
    from ollama_distributed.client.aio import Client
    from ollama_distributed.client.sync import SyncClient

P = ParamSpec("P")
T = TypeVar("T")
M = TypeVar("M", bound=Callable[..., Any])


class _Group:
    def __init__(self, client: Client) -> None:
        self._client = client


class _SyncGroup:
    def __init__(self, client: SyncClient) -> None:
        self._client = client


def _as(make: Callable[..., Any], method: M) -> M:
    """Gives a method the name, the text and the parameters of its call."""
    own = inspect.signature(make)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    method.__name__ = make.__name__
    method.__doc__ = make.__doc__
    method.__signature__ = own.replace(  # type: ignore[attr-defined]  # read by `inspect` and `help`
        parameters=[itself, *own.parameters.values()], return_annotation=inspect.Signature.empty
    )
    return method


def _run(make: Callable[P, Call[T]]) -> Callable[Concatenate[_Group, P], Coroutine[Any, Any, T]]:
    async def method(self: _Group, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._client._run(make(*args, **kwargs))

    return _as(make, method)


def _stream(make: Callable[P, Call[T]]) -> Callable[Concatenate[_Group, P], AsyncGenerator[T]]:
    def method(self: _Group, /, *args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[T]:
        return self._client._stream(make(*args, **kwargs))

    return _as(make, method)


def _run_sync(make: Callable[P, Call[T]]) -> Callable[Concatenate[_SyncGroup, P], T]:
    def method(self: _SyncGroup, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._client._run(make(*args, **kwargs))

    return _as(make, method)


def _stream_sync(
    make: Callable[P, Call[T]],
) -> Callable[Concatenate[_SyncGroup, P], Generator[T, None, None]]:
    def method(self: _SyncGroup, /, *args: P.args, **kwargs: P.kwargs) -> Generator[T, None, None]:
        return self._client._stream(make(*args, **kwargs))

    return _as(make, method)


class Cluster(_Group):
    """The cluster as a whole: `client.cluster`."""

    status = _run(calls.status)
    leader = _run(calls.leader)
    create_token = _run(calls.create_token)
    tokens = _run(calls.tokens)
    revoke_token = _run(calls.revoke_token)
    join = _run(calls.join)
    leave = _run(calls.leave)
    replace_voter = _run(calls.replace_voter)
    what_if = _run(places_calls.what_if)


class Nodes(_Group):
    """Its nodes, each named by its id or its name: `client.nodes`."""

    list = _run(calls.list_nodes)
    get = _run(calls.get_node)
    drain = _run(calls.drain)
    undrain = _run(calls.undrain)
    label = _run(calls.label)
    remove = _run(calls.remove)
    disk = _run(disk_calls.disk)
    scrub = _run(disk_calls.scrub)


class Config(_Group):
    """The settings that hold in the whole cluster: `client.config`."""

    get = _run(calls.get_config)
    set = _run(calls.set_config)
    history = _run(calls.config_history)
    rollback = _run(calls.rollback_config)
    watch = _stream(calls.watch_config)


class Routes(_Group):
    """Which node answers, and why: `client.routes`."""

    explain = _run(route_calls.explain)
    decisions = _run(route_calls.decisions)


class ModelPlaces(_Group):
    """Where models are to be and would fit: part of `client.models`."""

    fit = _run(places_calls.fit)
    places = _run(places_calls.places)
    all_places = _run(places_calls.all_places)
    replicas = _run(places_calls.replicas)
    place = _run(places_calls.place)
    pin = _run(places_calls.pin)
    unpin = _run(places_calls.unpin)
    evict = _run(disk_calls.evict)


class SyncCluster(_SyncGroup):
    """The cluster as a whole: `client.cluster`."""

    status = _run_sync(calls.status)
    leader = _run_sync(calls.leader)
    create_token = _run_sync(calls.create_token)
    tokens = _run_sync(calls.tokens)
    revoke_token = _run_sync(calls.revoke_token)
    join = _run_sync(calls.join)
    leave = _run_sync(calls.leave)
    replace_voter = _run_sync(calls.replace_voter)
    what_if = _run_sync(places_calls.what_if)


class SyncNodes(_SyncGroup):
    """Its nodes, each named by its id or its name: `client.nodes`."""

    list = _run_sync(calls.list_nodes)
    get = _run_sync(calls.get_node)
    drain = _run_sync(calls.drain)
    undrain = _run_sync(calls.undrain)
    label = _run_sync(calls.label)
    remove = _run_sync(calls.remove)
    disk = _run_sync(disk_calls.disk)
    scrub = _run_sync(disk_calls.scrub)


class SyncConfig(_SyncGroup):
    """The settings that hold in the whole cluster: `client.config`."""

    get = _run_sync(calls.get_config)
    set = _run_sync(calls.set_config)
    history = _run_sync(calls.config_history)
    rollback = _run_sync(calls.rollback_config)
    watch = _stream_sync(calls.watch_config)


class SyncRoutes(_SyncGroup):
    """Which node answers, and why: `client.routes`."""

    explain = _run_sync(route_calls.explain)
    decisions = _run_sync(route_calls.decisions)


class SyncModelPlaces(_SyncGroup):
    """Where models are to be and would fit: part of `client.models`."""

    fit = _run_sync(places_calls.fit)
    places = _run_sync(places_calls.places)
    all_places = _run_sync(places_calls.all_places)
    replicas = _run_sync(places_calls.replicas)
    place = _run_sync(places_calls.place)
    pin = _run_sync(places_calls.pin)
    unpin = _run_sync(places_calls.unpin)
    evict = _run_sync(disk_calls.evict)
