"""The models that are loaded on this node, and the requests that wait for them.

`acquire` gives a `Lease` on a ready runner: at once when there is one with a free slot,
else after its turn, which the queue decides; a model that has to be loaded takes its engine and
its room by `choosing`, comes and goes by `lifecycle`, once idle when `keeping` says so. Runs on one
event loop; every change of state ends in `_pump`, which is not asynchronous, so that no two changes
interleave.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence

import structlog

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import (
    DeadlineExceeded,
    OllamaDistributedError,
    Unavailable,
)
from ollama_distributed.base.inference import Queued
from ollama_distributed.base.queue import ANYONE, Ask, Run
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.serving.choosing import Choice
from ollama_distributed.serving.holds import Holds
from ollama_distributed.serving.keeping import KeepAlive
from ollama_distributed.serving.lifecycle import Lifecycle
from ollama_distributed.serving.options import Shape, plan_of, serves
from ollama_distributed.serving.plan import (
    Held,
    Load,
    Wait,
    oversized,
    renewed,
    thread_share,
)
from ollama_distributed.serving.ports import Engine, Machine
from ollama_distributed.serving.quarantine import Crashed, Quarantine
from ollama_distributed.serving.queues import Fifo, Waiting, refuse
from ollama_distributed.serving.residents import Lease, LoadKey, Resident, Ticket, load_key
from ollama_distributed.serving.room import Room
from ollama_distributed.serving.settings import ServingSettings
from ollama_distributed.serving.sizes import Estimate

log = structlog.get_logger(__name__)

CLOSING = "the node is shutting down"
TELL_S = 1.0
"""Who waits and wants to know hears of its place so often, if it changed."""


class Fleet:
    def __init__(
        self,
        engines: Sequence[Engine],
        machine: Machine,
        clock: Clock,
        estimate: Estimate,
        settings: ServingSettings,
        queue: Waiting | None = None,
    ) -> None:
        self._room = Room(machine, settings)
        self._clock = clock
        self._settings = settings
        self._cores = settings.threads or machine.cores()
        self._queues: Waiting = queue if queue is not None else Fifo(settings.max_queue)
        self._numbers = itertools.count()
        quarantine = Quarantine(clock)
        self.quarantined: Callable[[], list[Crashed]] = quarantine.held
        self.holds = Holds()
        self._choice = Choice(engines, self._room, self.holds, quarantine, estimate)
        self._lifecycle = Lifecycle(self, clock, quarantine, settings)
        self._residents: Mapping[LoadKey, Resident] = self._lifecycle.residents
        self.keeping = KeepAlive(clock, self.holds, settings.keep_alive_s, self._lifecycle.unload)
        self._closing = False
        self._watchers: list[asyncio.Future[None]] = []

    def configure(self, settings: ServingSettings) -> None:
        """Use other settings from now on. What is loaded stays loaded as it is; those that were
        kept for the default time are kept for the new one. `threads` stays what it was."""
        self._settings = settings
        self._room.configure(settings)
        self._lifecycle.configure(settings)
        self.keeping.configure(settings.keep_alive_s, self.residents)
        self._pump()

    @property
    def residents(self) -> tuple[Resident, ...]:
        return tuple(self._residents.values())

    @property
    def waiting(self) -> int:
        return self._queues.waiting

    def names(self) -> dict[LoadKey, str]:
        """Of the models that are loaded or waited for, as people see them."""
        waited = {key: self._queues.of(key)[0].spec.display for key in self._queues}
        return waited | {resident.key: resident.spec.display for resident in self.residents}

    @property
    def saturated(self) -> bool:
        """No loaded model has a free slot."""
        return all(r.state != "ready" or r.slots_busy >= r.plan.slots for r in self._residents.values())

    def queued(self, key: LoadKey) -> int:
        """Requests that wait for this model."""
        return len(self._queues.of(key))

    def budget_bytes(self) -> int:
        """Memory for models, those that are loaded included."""
        return self._room.budget_bytes(empty=not self._residents)

    # ── requests ────────────────────────────────────────────────────────────────────

    def lease_now(
        self,
        spec: ModelSpec,
        shape: Shape,
        keep_alive_s: float | None,
        *,
        slot: bool = True,
        ask: Ask = ANYONE,
    ) -> Lease | None:
        """As `acquire`, where nobody has to be waited for; None: it has to wait, or to be refused."""
        key = load_key(spec)
        resident = self._residents.get(key)
        if (
            resident is None
            or self._closing
            or resident.drain_from is not None
            or key in self._queues
            or not resident.takes(shape, slot=slot)
        ):
            return None
        return self._lease(resident, keep_alive_s, ask if slot else None)

    async def acquire(
        self,
        spec: ModelSpec,
        shape: Shape,
        keep_alive_s: float | None,
        *,
        slot: bool = True,
        ask: Ask = ANYONE,
        told: Callable[[Queued], None] | None = None,
    ) -> Lease:
        """A lease on a runner of this model. Cancel-safe: the place in the queue is given up.

        `told`: hears where the request stands if it has to wait.

        Raises:
            QueueFull, Quarantined, NoCapacity, LoadFailed, Unavailable, DeadlineExceeded.
        """
        if self._closing:
            raise Unavailable(CLOSING)
        if (lease := self.lease_now(spec, shape, keep_alive_s, slot=slot, ask=ask)) is not None:
            return lease
        key = load_key(spec)
        resident = self._residents.get(key)
        ticket = Ticket(next(self._numbers), spec, shape, keep_alive_s, slot, ask)
        place = self._queues.join(key, ticket)
        self._pump()
        most_s = self._settings.queue_timeout_s
        most_s = most_s if ask.within_s is None else min(most_s, ask.within_s)
        timer = asyncio.get_running_loop().call_later(most_s, self._expire, key, ticket)
        try:
            loads = place.position == 1 and (resident is None or resident.state == "loading")
            if told is not None and not ticket.future.done() and (ask.progress or not loads):
                told(place)
                if ask.progress:
                    await self._tell(key, ticket, place, told)
            return await ticket.future
        except BaseException:  # also when the waiter was cancelled
            self._leave(key, ticket)
            raise
        finally:
            timer.cancel()

    async def _tell(
        self, key: LoadKey, ticket: Ticket, place: Queued, told: Callable[[Queued], None]
    ) -> None:
        """Until it waits no more."""
        while not (await asyncio.wait({ticket.future}, timeout=TELL_S))[0]:
            if (now := self._queues.place(key, ticket)) != place:
                place = now
                told(place)

    def _expire(self, key: LoadKey, ticket: Ticket) -> None:
        if not ticket.future.done():
            error = DeadlineExceeded("the request waited too long for a free slot")
            self._queues.expired(key, ticket, error)
            self._pump()

    def _leave(self, key: LoadKey, ticket: Ticket) -> None:
        if self._queues.leave(key, ticket):
            self._pump()
        elif ticket.future.done() and not ticket.future.cancelled() and not ticket.future.exception():
            # Granted in the very moment that the waiter left.
            ticket.future.result().release()

    def released(self, resident: Resident, run: Run | None) -> None:
        resident.active -= 1
        if run is not None:
            resident.slots_busy -= 1
            self._queues.ended(run)
        resident.last_used = self._clock.monotonic()
        if self._queues.waiting:
            self._pump()
        self.keeping.look_after(resident)
        self._signal()

    def needs_room(self, spec: ModelSpec, shape: Shape) -> bool:
        """Whether it can only be loaded in the place of others.

        Raises:
            NoCapacity: not even so.
        """
        decision, _ = self._choice.of(spec, shape, self._residents.values())
        return isinstance(decision, Wait) or bool(decision.evict)

    # ── what has to happen now ──────────────────────────────────────────────────────

    def _pump(self) -> None:
        """Give leases to whose turn it is; begin the loads and unloads that the others need."""
        self._serve_all()
        drained = [r for r in self._residents.values() if r.drain_from is not None]
        for resident in drained:
            resident.drain_from = None
        if self._queues.waiting and not self._closing:
            self._begin_loads()
        if any(r.drain_from is None for r in drained):
            self._serve_all()
        self._signal()

    def _serve_all(self) -> None:
        for key in self._queues:
            resident = self._residents.get(key)
            if resident is not None:
                self._serve(key, resident)

    def _serve(self, key: LoadKey, resident: Resident) -> None:
        while key in self._queues and resident.state == "ready":
            ticket = self._queues.first(key, resident.drain_from)
            if ticket is None:
                break
            again = resident.oversized and resident.active == 0
            if again or not serves(resident.shape, ticket.shape):
                # Loaded with other options: it goes when it is idle, and comes back as wanted.
                if resident.active == 0:
                    self._lifecycle.unload(resident)
                break
            if not resident.takes(ticket.shape, slot=ticket.slot):
                if self._queues.questions(key):
                    self._serve_questions(key, resident)
                break
            self._grant(key, ticket, resident)

    def _serve_questions(self, key: LoadKey, resident: Resident) -> None:
        """All slots are busy: those who need none (to count tokens) do not wait for one."""
        for ticket in self._queues.of(key):
            drained = resident.drain_from
            waits = drained is not None and self._queues.order_of(key, ticket) >= drained
            if not waits and resident.takes(ticket.shape, slot=ticket.slot):
                self._grant(key, ticket, resident)

    def _grant(self, key: LoadKey, ticket: Ticket, resident: Resident) -> None:
        self._queues.grant(key, ticket)
        if not ticket.future.done():
            ask = ticket.ask if ticket.slot else None
            ticket.future.set_result(self._lease(resident, ticket.keep_alive_s, ask))

    def _lease(self, resident: Resident, keep_alive_s: float | None, ask: Ask | None) -> Lease:
        """`ask`: who gets a slot with it."""
        if resident.active == 0 and resident.on_cores:
            self._look_at_threads(resident)
        if resident.watch is None:
            self._lifecycle.look_after(resident)
        run = None if ask is None else self._queues.began(resident.key, ask, resident.plan.slots)
        return resident.lease(self, keep_alive_s, run)

    def _look_at_threads(self, starting: Resident) -> None:
        """Remember who is busy beside others with too many threads; when idle, it is loaded again."""
        busy = [r for r in self._residents.values() if r.on_cores and (r.active or r is starting)]
        if len(busy) < 2:
            return
        too_many = oversized({r.key: r.plan.threads for r in busy}, self._cores)
        for resident in busy:
            # What the user asked for stays as it is.
            if resident.key in too_many and not resident.shape.threads:
                resident.oversized = True

    def _begin_loads(self) -> None:
        """In the order of the queue; one that must wait for room lets nobody pass it."""
        reserved: list[Held] = []
        absent = [key for key in self._queues if key not in self._residents]
        for order, key in sorted((self._queues.order(key), key) for key in absent):
            ticket = self._queues.first(key)
            assert ticket is not None, "somebody waits"
            try:
                decision, engine = self._choice.of(
                    ticket.spec, ticket.shape, self._residents.values(), tuple(reserved)
                )
            except OllamaDistributedError as error:
                refuse(self._queues, key, error, ticket.shape)
                if key in self._queues:
                    # Another shape of the same model may still do.
                    asyncio.get_running_loop().call_soon(self._pump)
                continue
            if isinstance(decision, Wait):
                for drained in decision.drain:
                    if drained in self._residents:
                        self._residents[drained].drain_from = order
                return
            for evicted in decision.evict:
                log.info("serving.evicted", model=self._residents[evicted].spec.display)
                self._lifecycle.unload(self._residents[evicted])
            if self._room.has(decision.memory_bytes, self._residents.values(), reserved):
                self._begin_load(key, ticket, engine, decision)
            else:
                # Its room is being cleared: hold it against those behind.
                reserved.append(Held(key=key, memory_bytes=decision.memory_bytes, last_used=0.0, busy=True))

    def _begin_load(self, key: LoadKey, ticket: Ticket, engine: Engine, load: Load) -> None:
        others = sum(1 for r in self._residents.values() if r.on_cores and r.state != "unloading")
        threads = thread_share(self._cores, others, ticket.shape.threads)
        plan = plan_of(ticket.shape, slots=load.slots, threads=threads)
        resident = Resident(key, ticket.spec, ticket.shape, plan, load.memory_bytes)
        resident.keep_alive_s = renewed(self.keeping.default_s(ticket.spec), ticket.keep_alive_s)
        self._lifecycle.load(resident, engine)

    # ── what came of it ─────────────────────────────────────────────────────────────

    def loaded(self, resident: Resident) -> None:
        self._pump()
        # Whoever asked for it may have left.
        self.keeping.look_after(resident)

    def refused(self, resident: Resident, error: OllamaDistributedError) -> None:
        refuse(self._queues, resident.key, error, resident.shape)
        self._pump()

    def freed(self) -> None:
        self._pump()

    def died(self, resident: Resident, error: OllamaDistributedError) -> None:
        self._lifecycle.died(resident, error)

    def expire(self, resident: Resident) -> None:
        """Unload as soon as it is idle, whoever wanted it."""
        self.holds.clear(resident.key)
        resident.keep_alive_s = 0.0
        if resident.state == "ready" and resident.active == 0:
            self._lifecycle.unload(resident)

    # ── the end ─────────────────────────────────────────────────────────────────────

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Return when `condition` holds; it is looked at after each change of state."""
        while not condition():
            watcher: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._watchers.append(watcher)
            await watcher

    def _signal(self) -> None:
        if self._watchers:
            watchers, self._watchers = self._watchers, []
            for watcher in watchers:
                if not watcher.done():
                    watcher.set_result(None)

    def refuse_new(self) -> None:
        """From now on nobody gets a lease; those who wait are told."""
        self._closing = True
        for key in self._queues:
            refuse(self._queues, key, Unavailable(CLOSING))

    async def unload_all(self) -> None:
        """End all runners and all loads, whoever uses them. After `refuse_new`."""
        await self._lifecycle.unload_all()
