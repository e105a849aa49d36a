"""Loads the models of the setting `preload` once the node listens; fetches those that are not here.

What fails is said in the log and in `/api/v1/health`, and stops nothing. What may work a little
later is tried again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self

import anyio
import structlog

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import ModelNotFound, OllamaDistributedError
from ollama_distributed.base.refusal import Refusal, error_of
from ollama_distributed.cluster.tasks import end
from ollama_distributed.distribution.downloads import Transfer
from ollama_distributed.distribution.exchange import CopyAsk
from ollama_distributed.gateway.ports import Preloaded, PreloadState
from ollama_distributed.models.names import name_key
from ollama_distributed.state.cluster import ClusterState

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

FAILED = "node.preload_failed"
LOADED = "node.preloaded"

AGAIN_S = (2.0, 10.0, 30.0, 120.0)
"""Waits before what failed is tried again; a cluster or a registry that starts too is there by then."""
LOOK_S, LOOKS = 0.1, 150
"""15 s a node waits to see who holds what, before it asks a registry."""


class Copies(Protocol):
    """From other nodes (`distribution.service.ModelTransfer`)."""

    async def copy_here(self, ask: CopyAsk) -> Transfer: ...

    async def ended(self, transfer_id: str) -> Transfer: ...


class Downloads(Protocol):
    """From registries (`distribution.downloads.Downloads`)."""

    def start(self, name: str) -> Transfer: ...

    async def ended(self, transfer_id: str) -> Transfer: ...


class Preload:
    """Use as a context: what runs is ended with it. `resolve`: of this node's own models; `load`:
    `Serving.preload`; `settled`: this node sees its cluster."""

    def __init__(
        self,
        names: Sequence[str],
        *,
        resolve: Callable[[str], Awaitable[object]],
        load: Callable[[str], Awaitable[None]],
        copies: Copies,
        downloads: Downloads,
        state: Callable[[], ClusterState],
        settled: Callable[[], bool],
        clock: Clock,
    ) -> None:
        self._resolve = resolve
        self._load = load
        self._copies = copies
        self._downloads = downloads
        self._state = state
        self._settled = settled
        self._clock = clock
        self._rows = dict.fromkeys(names, Preloaded(state="waiting"))
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            await end((self._task,))

    def begin(self) -> None:
        if self._rows:
            self._task = asyncio.create_task(self.run(), name="preload")

    def rows(self) -> Mapping[str, Preloaded]:
        return self._rows

    async def run(self) -> None:
        """Until all are loaded, or nothing more can be tried."""
        left = list(self._rows)
        for wait_s in (*AGAIN_S, None):
            left = [name for name in left if await self._failed(name)]
            if not left or wait_s is None:
                return
            await anyio.sleep(wait_s)

    async def _failed(self, name: str) -> bool:
        """Bring and load one. True: it did not work, and may later."""
        began = self._clock.monotonic()
        try:
            await self._have(name)
            self._tell(name, "loading")
            await self._load(name)
        except OllamaDistributedError as exc:
            again = exc.retryable or isinstance(exc, ModelNotFound)
            self._tell(name, "failed", exc.message)
            log.warning(FAILED, model=name, code=exc.code, error=exc.message, again=again)
            return again
        except Exception:  # the task's root: the other models are still to be loaded
            log.exception(FAILED, model=name)
            self._tell(name, "failed", "internal error; the node's log has the details")
            return False
        self._tell(name, "loaded")
        log.info(LOADED, model=name, took_s=round(self._clock.monotonic() - began, 3))
        return False

    async def _have(self, name: str) -> None:
        """
        Raises:
            OllamaDistributedError: it is not here, and could not be fetched; says why.
        """
        try:
            await self._resolve(name)
        except ModelNotFound:
            self._tell(name, "fetching")
        else:
            return
        for _ in range(LOOKS):
            if self._settled():
                break
            await anyio.sleep(LOOK_S)
        ended = await self._fetched(name)
        if ended.state != "done":
            raise error_of(Refusal(code=ended.code or "unavailable", message=ended.error or ended.state))

    async def _fetched(self, name: str) -> Transfer:
        state, key = self._state(), name_key(name)
        current = state.current(key)
        holders = [node for node in state.holders(key) if state.nodes[node].alive]
        if current is None or not holders:
            return await self._downloads.ended(self._downloads.start(name).id)
        ask = CopyAsk(name=current.display, sources=tuple(holders), digest=current.digest)
        return await self._copies.ended((await self._copies.copy_here(ask)).id)

    def _tell(self, name: str, state: PreloadState, error: str = "") -> None:
        self._rows[name] = Preloaded(state=state, error=error)
