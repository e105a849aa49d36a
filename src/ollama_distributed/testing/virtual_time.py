"""An asyncio event loop in virtual time: hours pass in milliseconds, every run is the same.

    async def main() -> float:
        with anyio.move_on_after(3600):
            await anyio.Event().wait()
        return anyio.current_time()

    assert virtual_time.run(main, seed=7) == 3600.0

Time stands still while anything is ready and then jumps to the next timer. What makes runs
equal: timers due together run in the order they were made, and the order of a set of tasks or
of nested cancel scopes comes from numbers, not from addresses in memory. Chance comes from
`loop_random()`, which `seed` seeds. No selector is there: sockets, files, signals, processes
and worker threads are refused. A loop where nothing will ever happen raises `Deadlock`, one
whose time never moves `Livelock`; an exception that reaches nobody fails the run.

Async tests get it for a whole module with

    @pytest.fixture(scope="module")
    def anyio_backend() -> tuple[str, dict[str, object]]:
        return "asyncio", {"loop_factory": VirtualLoop}
"""

from __future__ import annotations

import asyncio
import heapq
import random
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context
from typing import Any, NoReturn, TypeVar, TypeVarTuple, Unpack

from anyio._backends._asyncio import CancelScope

EPOCH = 1_767_225_600.0
"""What the wall clock shows at virtual zero: 2026-01-01 00:00 UTC."""
MAX_STEPS_AT_ONE_MOMENT = 10_000_000
"""A thousand simulated nodes that all react at once need a hundredth."""
_SWEEP_AT = 1_000
"""Cancelled timers are swept out when there are so many and they are the larger half."""
_SHOWN_TASKS = 12

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Deadlock(RuntimeError):
    """Nothing is ready and no timer runs: the loop would wait for ever."""


class Livelock(RuntimeError):
    """Callbacks follow each other without end and time does not move."""


class Overtime(RuntimeError):
    """Virtual time passed the run's limit."""


class _Task(asyncio.Task[T]):
    """Hashes by number: asyncio and anyio keep tasks in sets and cancel them in that order."""

    def __init__(
        self,
        coroutine: Coroutine[Any, Any, T],
        *,
        loop: VirtualLoop,
        name: str | None = None,
        context: Context | None = None,
    ) -> None:
        loop.tasks_made += 1
        self._number = loop.tasks_made
        super().__init__(coroutine, loop=loop, name=name or f"task {self._number}", context=context)

    def __hash__(self) -> int:
        return self._number


class VirtualLoop(asyncio.BaseEventLoop):
    """The loop; `run` is the usual way to one."""

    # Of the base class, which keeps callbacks that are ready and asks `_run_once` to run them.
    _ready: deque[asyncio.Handle]
    _scheduled: list[tuple[float, int, asyncio.TimerHandle]]
    _stopping: bool

    def __init__(self, seed: int = 0, *, limit_s: float | None = None) -> None:
        super().__init__()
        self.random = random.Random(seed)  # noqa: S311  # repeatable by intent
        self.tasks_made = 0
        self.unhandled: list[BaseException] = []
        """Exceptions that reached nobody."""
        self._now = 0.0
        self._limit_s = limit_s
        self._timers_made = 0
        self._cancelled = 0
        self._steps = 0
        self._thread = threading.get_ident()
        self.set_task_factory(_make_task)
        self.set_exception_handler(_note_unhandled)

    def time(self) -> float:
        return self._now

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._timers_made += 1
        heapq.heappush(self._scheduled, (when, self._timers_made, timer))
        timer._scheduled = True  # type: ignore[attr-defined]  # it tells us of its cancellation
        return timer

    def call_soon_threadsafe(
        self,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.Handle:
        if threading.get_ident() != self._thread:
            raise RuntimeError("virtual time has one thread")
        return self.call_soon(callback, *args, context=context)

    # ── what the base class calls ───────────────────────────────────────────────────

    def _run_once(self) -> None:
        ready, timers = self._ready, self._scheduled
        if not ready and not self._stopping:
            self._jump()
        now = self._now
        while timers and timers[0][0] <= now:
            timer = heapq.heappop(timers)[2]
            timer._scheduled = False  # type: ignore[attr-defined]  # as above
            if timer.cancelled():
                self._cancelled -= 1
            else:
                ready.append(timer)
        batch = len(ready)
        self._steps += batch
        if self._steps > MAX_STEPS_AT_ONE_MOMENT:
            self._steps = 0
            raise Livelock(f"{MAX_STEPS_AT_ONE_MOMENT} callbacks at {now} s; {_waiting(self)}")
        for _ in range(batch):
            handle = ready.popleft()
            if not handle._cancelled:
                handle._run()

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:  # noqa: ARG002  # the base's
        self._cancelled += 1
        if self._cancelled > _SWEEP_AT and self._cancelled * 2 > len(self._scheduled):
            self._scheduled[:] = [item for item in self._scheduled if not item[2].cancelled()]
            heapq.heapify(self._scheduled)
            self._cancelled = 0

    def _jump(self) -> None:
        timers = self._scheduled
        while timers and timers[0][2].cancelled():
            heapq.heappop(timers)
            self._cancelled -= 1
        if not timers:
            raise Deadlock(f"nothing will ever happen after {self._now} s; {_waiting(self)}")
        when = timers[0][0]
        if self._limit_s is not None and when > self._limit_s:
            limit_s, self._limit_s = self._limit_s, None  # the cleaning up may take its time
            raise Overtime(f"still running after {limit_s} s; {_waiting(self)}")
        if when > self._now:
            self._now = when
            self._steps = 0


def _refuse(name: str) -> Callable[..., NoReturn]:
    def refuse(self: VirtualLoop, *args: object, **kwargs: object) -> NoReturn:  # noqa: ARG001  # any
        raise RuntimeError(f"virtual time has no {name}: nothing real is waited for")

    return refuse


for _name in (
    "add_reader", "add_signal_handler", "add_writer", "connect_accepted_socket", "connect_read_pipe",
    "connect_write_pipe", "create_connection", "create_datagram_endpoint", "create_server",
    "create_unix_connection", "create_unix_server", "getaddrinfo", "getnameinfo", "run_in_executor",
    "sendfile", "sock_accept", "sock_connect", "sock_recv", "sock_recv_into", "sock_recvfrom",
    "sock_sendall", "sock_sendfile", "sock_sendto", "start_tls", "subprocess_exec", "subprocess_shell",
):  # fmt: skip
    setattr(VirtualLoop, _name, _refuse(_name))


def run(main: Callable[[], Coroutine[Any, Any, T]], seed: int = 0, *, limit_s: float | None = None) -> T:
    """Run `main()` to its end in virtual time, from zero.

    Raises:
        Deadlock, Livelock: as above, with where the tasks wait.
        Overtime: `limit_s` virtual seconds passed.
        ExceptionGroup: a callback or task raised and nobody was there to see.
    """
    loop = VirtualLoop(seed, limit_s=limit_s)
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        result = runner.run(main())
    if loop.unhandled:
        raise BaseExceptionGroup("raised where nobody saw it", loop.unhandled)
    return result


def loop_random() -> random.Random:
    """The running virtual loop's source of chance."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop), "not in virtual time"
    return loop.random


class VirtualClock:
    """The running loop's time as one node's clocks show it; a `base.clock.Clock`."""

    def __init__(self, *, skew_s: float = 0.0, drift: float = 0.0) -> None:
        self.skew_s = skew_s
        """The wall clock is so far ahead; may be changed at any time."""
        self._drift = drift
        """0.01: this node's second is a hundredth too short, its clocks run ahead."""

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time() * (1 + self._drift)

    def time(self) -> float:
        return EPOCH + self.skew_s + self.monotonic()


class _InOrder(dict[CancelScope, None]):
    """As much of a set as anyio uses, with an order."""

    def add(self, scope: CancelScope) -> None:
        self[scope] = None

    def remove(self, scope: CancelScope) -> None:
        del self[scope]

    def discard(self, scope: CancelScope) -> None:
        self.pop(scope, None)


_init_scope = CancelScope.__init__


def _init_scope_in_order(self: CancelScope, *args: Any, **kwargs: Any) -> None:
    _init_scope(self, *args, **kwargs)
    if type(asyncio._get_running_loop()) is VirtualLoop:
        self._child_scopes = _InOrder()  # type: ignore[assignment]  # set-like


CancelScope.__init__ = _init_scope_in_order  # type: ignore[method-assign]  # see below
"""anyio cancels nested scopes in the order of a set of addresses; here in that of their making."""


def _make_task(
    loop: asyncio.AbstractEventLoop,
    coroutine: Coroutine[Any, Any, T] | Generator[Any, None, T],
    **options: Any,
) -> asyncio.Task[T]:
    assert isinstance(loop, VirtualLoop)
    assert isinstance(coroutine, Coroutine)
    return _Task(coroutine, loop=loop, **options)


def _note_unhandled(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    assert isinstance(loop, VirtualLoop)
    loop.unhandled.append(context.get("exception") or RuntimeError(context["message"]))


def _waiting(loop: VirtualLoop) -> str:
    tasks = sorted(asyncio.all_tasks(loop), key=hash)
    shown = [_place(task) for task in tasks[:_SHOWN_TASKS]]
    more = [f"and {len(tasks) - _SHOWN_TASKS} more"] if len(tasks) > _SHOWN_TASKS else []
    return "waiting: " + "; ".join(shown + more or ["nobody"])


def _place(task: asyncio.Task[Any]) -> str:
    """Name and innermost line of a task."""
    inner: Any = task.get_coro()
    while (awaited := getattr(inner, "cr_await", None)) is not None and hasattr(awaited, "cr_frame"):
        inner = awaited
    frame = getattr(inner, "cr_frame", None)
    at = f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else "its end"
    return f"{task.get_name()} at {at}"
