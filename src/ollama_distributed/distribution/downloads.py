"""Pulls and copies that go on without anybody waiting: begun, looked at and cancelled by id."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from types import TracebackType
from typing import Literal, Self

import msgspec
import structlog

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import Internal, NotFound, OllamaDistributedError, QueueFull
from ollama_distributed.base.ids import random_id
from ollama_distributed.cluster.tasks import end
from ollama_distributed.distribution.ports import Status
from ollama_distributed.models.names import name_key

log = structlog.get_logger()

KEPT = 256
"""Ended ones that can still be asked about; the oldest go."""
MOST = 64
"""That run at once on one node."""
RATE_S = 5.0
"""What a rate is the mean of."""
_DEFECT = "internal error; the node's log has the details"


class Transfer(msgspec.Struct, frozen=True, kw_only=True):
    """One model on its way to this node, as REST shows it."""

    id: str
    model: str
    state: Literal["running", "done", "failed", "cancelled"]
    status: str = ""
    """Ollama's words for the step it is at."""
    total: int = 0
    """Bytes of the blobs seen so far."""
    completed: int = 0
    started_at: float = 0.0
    """Seconds since the Unix epoch."""
    ended_at: float | None = None
    error: str = ""
    code: str = ""
    """Of the error, as in error bodies."""
    kind: Literal["download", "copy"] = "download"
    """From a registry, or from other nodes."""
    node: str = ""
    """Where it is going; empty: this node."""
    rate: float = 0.0
    """Bytes per second, of the last seconds."""
    eta_s: float | None = None
    """None: not known."""
    peers: Mapping[str, int] = {}
    """Bytes that came from each node."""
    dropped: tuple[str, ...] = ()
    """Nodes that sent wrong bytes."""


class Origins(msgspec.Struct, frozen=True):
    """Where a model's bytes come from."""

    peers: Mapping[str, int] = {}
    dropped: tuple[str, ...] = ()


class Downloads:
    """`pull`: `Pulls.pull`. A context: what runs is ended with it."""

    def __init__(
        self,
        pull: Callable[[str], AsyncGenerator[Status]],
        check: Callable[[str], None],
        clock: Clock,
        *,
        make_id: Callable[[], str] = random_id,
        kind: Literal["download", "copy"] = "download",
        node: str = "",
        origins: Callable[[str], Origins] = lambda _: Origins(),
    ) -> None:
        self._pull = pull
        self._check = check
        self._clock = clock
        self._make_id = make_id
        self._kind = kind
        self._node = node
        self._origins = origins
        self._known: dict[str, Transfer] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def ask_origins(self, origins: Callable[[str], Origins]) -> None:
        """Where what comes from now on comes from."""
        self._origins = origins

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await end(list(self._tasks.values()))

    def start(self, name: str) -> Transfer:
        """Begin; the same model again while it runs is the same transfer.

        Raises:
            InvalidName, Forbidden: the name is none, or its registry may not be asked.
            QueueFull: too many run already.
        """
        for transfer in self.list():
            if transfer.state == "running" and name_key(transfer.model) == name_key(name):
                return transfer
        self._check(name)
        if len(self._tasks) >= MOST:
            raise QueueFull(f"{MOST} transfers run on this node already")
        transfer = Transfer(
            id=self._make_id(),
            model=name,
            state="running",
            started_at=self._clock.time(),
            kind=self._kind,
            node=self._node,
        )
        self._known[transfer.id] = transfer
        self._tasks[transfer.id] = asyncio.create_task(self._run(transfer), name="download")
        self._tasks[transfer.id].add_done_callback(lambda _: self._tasks.pop(transfer.id))
        return transfer

    def list(self) -> list[Transfer]:
        """Newest first."""
        return list(reversed(self._known.values()))

    def get(self, transfer_id: str) -> Transfer:
        """
        Raises:
            NotFound: there was none of this id, or too long ago.
        """
        found = self._known.get(transfer_id)
        if found is None:
            raise NotFound(f"there is no transfer {transfer_id[:64]!r}")
        return found

    async def ended(self, transfer_id: str) -> Transfer:
        """Wait until it is over, whichever way. Raises as `get`."""
        self.get(transfer_id)
        if (task := self._tasks.get(transfer_id)) is not None:
            await asyncio.wait({task})
        return self.get(transfer_id)

    def cancel(self, transfer_id: str) -> Transfer:
        """End it, if it still runs; what was fetched stays for the next time. Raises as `get`."""
        self.get(transfer_id)
        if (task := self._tasks.get(transfer_id)) is not None:
            task.cancel()
        return self.get(transfer_id)

    async def _run(self, transfer: Transfer) -> None:
        sizes: dict[str, tuple[int, int]] = {}
        rate = _Rate(self._clock)

        def now(**changes: object) -> None:
            known = self._known.get(transfer.id)
            if known is not None:
                self._known[transfer.id] = msgspec.structs.replace(known, **changes)

        try:
            async with aclosing(self._pull(transfer.model)) as lines:
                async for line in lines:
                    if line.digest:
                        sizes[line.digest] = (line.total, line.completed)
                    total, completed = (
                        (sum(column) for column in zip(*sizes.values(), strict=True)) if sizes else (0, 0)
                    )
                    per_s = rate.of(completed)
                    origins = self._origins(transfer.model)
                    now(
                        status=line.status,
                        total=total,
                        completed=completed,
                        rate=per_s,
                        eta_s=(total - completed) / per_s if per_s else None,
                        peers=origins.peers,
                        dropped=origins.dropped,
                    )
            now(state="done", ended_at=self._clock.time(), eta_s=None)
        except asyncio.CancelledError:
            now(state="cancelled", ended_at=self._clock.time())
            raise
        except OllamaDistributedError as exc:
            now(state="failed", ended_at=self._clock.time(), error=exc.message, code=exc.code)
            log.info("distribution.download_failed", model=transfer.model, code=exc.code, error=exc.message)
        except Exception:  # the task's root: else it would be under way for ever, and for all who ask again
            log.exception("distribution.download_broke", model=transfer.model)
            now(state="failed", ended_at=self._clock.time(), error=_DEFECT, code=Internal.code)
        finally:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        ended = [key for key, known in self._known.items() if known.state != "running"]
        for key in ended[: max(0, len(ended) - KEPT)]:
            del self._known[key]


class _Rate:
    """Bytes per second over the last `RATE_S`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()

    def of(self, completed: int) -> float:
        now = self._clock.monotonic()
        self._seen.append((now, completed))
        while len(self._seen) > 2 and now - self._seen[1][0] > RATE_S:
            self._seen.popleft()
        began, before = self._seen[0]
        return max(0.0, completed - before) / (now - began) if now > began else 0.0
