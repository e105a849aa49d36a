"""One answer on its way out of the door: frames, pings, backpressure, the caller's going away.

Events of one turn of the loop leave in one frame. While the caller does not read, the
generation is paused and at most `MOST_WAITING` events wait here; if that lasts, the answer
is given up, so that its slot does not belong to a caller that hangs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, TypeAlias

from ollama_distributed.adapters.peers import wire
from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.inference import Generation
from ollama_distributed.base.tokens import Done, EngineFailed, Prepared, Skipped, SourceEvent
from ollama_distributed.cluster.tasks import end

Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]

MOST_WAITING = 256
"""Events that wait for a caller which does not read; then the generation is paused."""
READER_DEADLINE_S = 60.0
"""A caller that takes nothing for so long: twice what the gateway allows its own clients."""

_LAST = (Done, Skipped, EngineFailed)
_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", wire.FRAMES_TYPE.encode())],
}


class Outlet:
    """`tick` is called every second or so by the door."""

    def __init__(self, caller: NodeId, send: Send) -> None:
        self.caller = caller
        self.started = False
        self.sent: list[bytes] = []
        """Frames of a generation; nothing of its text is missing in them that the caller has."""
        self.model = ""
        self.movable = True
        """Another node can go on with it, as far as is known."""
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._main = asyncio.current_task()
        self._events: list[SourceEvent] = []
        self._due = False
        """Something among them must not wait."""
        self._complete = False
        """The last event is among them, or was."""
        self._gone = False
        self._gave_up = False
        self._wake: asyncio.Future[None] | None = None
        self._generation: Generation | None = None
        self._paused = False
        self._work: asyncio.Task[bytes] | None = None
        self._error: OllamaDistributedError | None = None
        self._sent_at = self._loop.time()
        self._sending = 0
        """Writes that wait for the caller to read."""

    @property
    def complete(self) -> bool:
        """The last event came."""
        return self._complete

    @property
    def generates(self) -> bool:
        return self._generation is not None and not self._complete

    # ── what goes out ───────────────────────────────────────────────────────────────

    def hear(self, event: SourceEvent) -> None:
        """The sink of the generation."""
        if self._complete or self._gone:
            return
        self._events.append(event)
        if isinstance(event, _LAST):
            self._complete = True
        elif len(self._events) >= MOST_WAITING and not self._paused and self._generation is not None:
            self._paused = True
            self._generation.pause()
        if type(event) is Prepared:  # goes with what it prepares, or in place of a ping
            self.movable = event.resumable
        else:
            self._due = True
            self._stir()

    def end_with(self, error: OllamaDistributedError) -> None:
        """End the answer with an error, and what makes it."""
        if self._generation is not None:
            if not self._complete:
                self._generation.cancel()
                self.hear(EngineFailed(error))
        elif self._work is not None:
            self._error = error
            self._work.cancel()

    def gone(self) -> None:
        """The caller is not there any more."""
        if self._gone:
            return
        self._gone = True
        if self._generation is not None and not self._complete:
            self._generation.cancel()
        if self._work is not None:
            self._work.cancel()
        self._stir()

    def tick(self, now: float) -> None:
        quiet_s = now - self._sent_at
        if self._sending:
            if quiet_s > READER_DEADLINE_S and not self._gave_up and self._main is not None:
                self._gave_up = True
                self.gone()
                self._main.cancel()
        elif quiet_s > wire.PING_S:
            self._stir()

    async def put(self, frame: bytes, *, more: bool = True) -> None:
        """Write one frame; waits while the caller does not read."""
        self._sent_at = self._loop.time()
        self._sending += 1
        try:
            if not self.started:
                self.started = True
                await self._send(_START)
            await self._send({"type": "http.response.body", "body": frame, "more_body": more})
        finally:
            self._sending -= 1
        self._sent_at = self._loop.time()

    # ── the two kinds of answer ─────────────────────────────────────────────────────

    async def run(self, generation: Generation) -> None:
        """Send the events of this generation until its last. Cancels it when it returns early."""
        self._generation = generation
        try:
            while not self._gone:
                if not self._due and not await self._woken():
                    return
                events, self._events, self._due = self._events, [], False
                if not events:
                    await self.put(wire.PING)
                    continue
                last, frame = self._complete, wire.events_frame(events)
                self.sent.append(frame)
                await self.put(frame, more=not last)
                if last:
                    return
                if self._paused and not self._events:
                    self._paused = False
                    generation.resume()
        except asyncio.CancelledError:
            self._given_up()
        finally:
            if not self._complete:
                generation.cancel()

    async def answer(self, work: Coroutine[Any, Any, bytes]) -> None:
        """Do the work, which may `put` frames and returns the last one; meanwhile pings, and an
        end when the caller goes."""
        self._work = task = self._loop.create_task(work)
        task.add_done_callback(lambda _: self._stir())
        try:
            while not (task.done() or self._gone):
                if await self._woken() and not task.done():
                    await self.put(wire.PING)
            if self._gone:
                return
            last = task.result() if self._error is None else wire.refusal_frame(self._error)
            await self.put(last, more=False)  # in one write: the caller can use the connection again
        except asyncio.CancelledError:
            self._given_up()
        finally:
            await end((task,))

    # ── inside ──────────────────────────────────────────────────────────────────────

    def _given_up(self) -> None:
        """The cancellation was our own, to leave a write that nobody reads; any other goes on."""
        if not self._gave_up or self._main is None:
            raise
        self._main.uncancel()

    def _stir(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def _woken(self) -> bool:
        """Wait until there is something to send, if only a ping; False: nobody wants it any more."""
        self._wake = wake = self._loop.create_future()
        try:
            await wake
        finally:
            self._wake = None
        return not self._gone
