"""How the groups of calls are made (`client.cluster`, `client.keys` …), for both clients.

A method is its call (`cluster_calls.py` and the like) and the client that runs it, so the two clients
share signatures and documentation. Each names its methods itself, so that type checkers see them.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from ollama_distributed.client.calls import Call

if TYPE_CHECKING:
    from ollama_distributed.client.aio import Client
    from ollama_distributed.client.sync import SyncClient

P = ParamSpec("P")
T = TypeVar("T")
M = TypeVar("M", bound=Callable[..., Any])


class Group:
    def __init__(self, client: Client) -> None:
        self._client = client


class SyncGroup:
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


def run(make: Callable[P, Call[T]]) -> Callable[Concatenate[Group, P], Coroutine[Any, Any, T]]:
    async def method(self: Group, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._client._run(make(*args, **kwargs))

    return _as(make, method)


def stream(make: Callable[P, Call[T]]) -> Callable[Concatenate[Group, P], AsyncGenerator[T]]:
    def method(self: Group, /, *args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[T]:
        return self._client._stream(make(*args, **kwargs))

    return _as(make, method)


def run_sync(make: Callable[P, Call[T]]) -> Callable[Concatenate[SyncGroup, P], T]:
    def method(self: SyncGroup, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._client._run(make(*args, **kwargs))

    return _as(make, method)


def stream_sync(
    make: Callable[P, Call[T]],
) -> Callable[Concatenate[SyncGroup, P], Generator[T, None, None]]:
    def method(self: SyncGroup, /, *args: P.args, **kwargs: P.kwargs) -> Generator[T, None, None]:
        return self._client._stream(make(*args, **kwargs))

    return _as(make, method)
