"""Keeps the lease, or waits for its turn, as `plan` says."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence

import anyio
import msgspec
import structlog

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import Conflict, DeadlineExceeded, OllamaDistributedError, Unavailable
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.leadership.plan import (
    RENEW_S,
    SPREAD_S,
    Hold,
    Renew,
    Seen,
    Standing,
    StepDown,
    Take,
    Wait,
    decide,
    leader,
    leads,
    valid_lease,
)
from ollama_distributed.cluster.loops import keep_going
from ollama_distributed.cluster.mirror import Mirror
from ollama_distributed.cluster.ports import Coordination, Fence, Write
from ollama_distributed.cluster.tasks import end
from ollama_distributed.state import keys
from ollama_distributed.state.cluster import ClusterState
from ollama_distributed.state.codec import decode, encode
from ollama_distributed.state.records import Lease, Term

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

TAKEN = "leader.taken"
STEPPED_DOWN = "leader.stepped_down"
RENEWAL_FAILED = "leader.renewal_failed"
TAKEOVER_FAILED = "leader.takeover_failed"
LOOK_FAILED = "leader.look_failed"
NOT_RELEASED = "leader.lease_not_released"
LISTENER_FAILED = "leader.listener_failed"

RETRY_S = (0.1, 0.3)
"""Between attempts while the engine refuses, by chance: writes are back so soon after it."""
ATTEMPT_S = 0.7
"""For one renewal: a message that is lost leaves time for a second try before the lease ends."""
RELEASE_S = 0.5
"""A leader that stops gives its lease back in this time, or leaves it to run out."""
MIN_SLEEP_S = 0.001
"""A clock that runs slower than the loop's must not make a spin of the last nanoseconds."""

Listener = Callable[[bool], None]


class Leadership:
    """An async context manager; inside, this node takes part."""

    def __init__(
        self,
        coordination: Coordination,
        mirror: Mirror,
        *,
        node: NodeId,
        candidate: bool,
        clock: Clock,
        chance: random.Random,
    ) -> None:
        self._coordination = coordination
        self._mirror = mirror
        self._clock = clock
        self._chance = chance
        self._standing = Standing(node=node, candidate=candidate)
        self._news = anyio.Event()
        self._failures = 0
        self._listeners: list[Listener] = []
        self._forget: Callable[[], None] = lambda: None
        self._running: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Leadership:
        self._forget = self._mirror.on_change(self._look)
        if self._mirror.ready:
            self._see(self._mirror.state)
        run = keep_going("leadership", self._step, self._chance, max_wait_s=RETRY_S[1])
        self._running = asyncio.create_task(run, name="leadership")
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._running is not None
        await end([self._running])
        self._forget()
        hold = self._standing.hold
        self._step_down("this node stops", level=logging.INFO)
        if hold is not None:
            with anyio.move_on_after(RELEASE_S, shield=True):
                await self._release(hold)

    # ── what others ask ─────────────────────────────────────────────────────────────

    @property
    def leads(self) -> bool:
        """At this very moment: false as soon as the lease ran out, whatever the loop does."""
        return leads(self._standing, self._clock.monotonic())

    @property
    def leader(self) -> NodeId | None:
        return leader(self._standing, self._clock.monotonic())

    @property
    def lease(self) -> Lease | None:
        """By which the leader leads."""
        return valid_lease(self._standing, self._clock.monotonic())

    def fence(self) -> Fence | None:
        """What each write of the leader must carry; None: this node does not lead."""
        hold = self._standing.hold
        return Fence(keys.FENCE, hold.fence_revision) if hold is not None and self.leads else None

    def on_change(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` with whether this node leads: now if it does, then at each change.
        On the loop; it must be quick. The result takes it away again."""
        self._listeners.append(listener)
        if self.leads:
            listener(True)

        def forget() -> None:
            if listener in self._listeners:
                self._listeners.remove(listener)

        return forget

    async def changed(self) -> None:
        """Wait until something about the lease was seen, or was done here."""
        await self._news.wait()

    async def write(self, writes: Sequence[Write]) -> tuple[int, ...]:
        """A batch under the fence.

        Raises:
            Unavailable: it did not happen; among others because this node no longer leads.
            Conflict: a revision does not hold.
            DeadlineExceeded: it may have happened.
        """
        fence = self.fence()
        if fence is None:
            raise Unavailable("this node does not lead")
        try:
            return await self._coordination.batch(writes, fence=fence)
        except Conflict as exc:
            if await self.replaced():
                raise Unavailable("this node no longer leads") from exc
            raise

    async def replaced(self) -> bool:
        """After a fenced write met a conflict: looks whether the fence moved on, and steps
        down if so. True: this node does not lead any more."""
        hold = self._standing.hold
        if hold is not None:
            entry = await self._coordination.get(keys.FENCE)
            if entry is not None and entry.revision > hold.fence_revision and self._standing.hold is hold:
                self._step_down("a fenced write was refused")
        return not self.leads

    # ── seeing ──────────────────────────────────────────────────────────────────────

    def _look(self, before: ClusterState, after: ClusterState) -> None:
        if self._standing.seen is None or after.lease is not before.lease or after.term is not before.term:
            self._see(after)

    def _see(self, state: ClusterState) -> None:
        if keys.LEASE in state.rejected or keys.FENCE in state.rejected:
            seen = None  # a newer version leads, in words unknown here: nothing to take over
        else:
            seen = Seen(
                lease=state.lease,
                lease_revision=state.revision_of(keys.LEASE),
                term=state.term,
                term_revision=state.revision_of(keys.FENCE),
            )
        self._note(seen)

    def _note(self, seen: Seen | None) -> None:
        standing, now = self._standing, self._clock.monotonic()
        old = standing.seen
        spread_s = standing.spread_s
        if seen is not None:
            same = old is not None and old.lease_revision == seen.lease_revision
            seen = msgspec.structs.replace(seen, at=old.at if old is not None and same else now)
            if old is None or old.epoch != seen.epoch:
                spread_s = SPREAD_S * self._chance.random()
        self._standing = msgspec.structs.replace(standing, seen=seen, spread_s=spread_s)
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = anyio.Event()

    # ── acting ──────────────────────────────────────────────────────────────────────

    async def _step(self) -> None:
        now = self._clock.monotonic()
        match decide(self._standing, now, since=self._clock.time()):
            case Wait(None):
                await self._news.wait()
            case Wait(float(until)):
                with anyio.move_on_after(max(until - now, MIN_SLEEP_S)):
                    await self._news.wait()
            case Take() as take:
                await self._take(take, now)
            case Renew(lease, revision):
                await self._renew(lease, revision, now)
            case StepDown(reason):
                self._step_down(reason)

    async def _take(self, take: Take, now: float) -> None:
        writes = [
            Write(keys.LEASE, encode(take.lease), take.seen.lease_revision),
            Write(keys.FENCE, encode(take.term), take.seen.term_revision),
        ]
        try:
            lease_revision, fence_revision = await self._coordination.batch(writes)
        except OllamaDistributedError as exc:
            self._failures += 1
            if self._failures & (self._failures - 1) == 0:  # the 1st, 2nd, 4th …: outages can be long
                log.info(
                    TAKEOVER_FAILED,
                    epoch=take.lease.epoch,
                    code=exc.code,
                    error=exc.message,
                    failures=self._failures,
                )
            self._try_later()
            if isinstance(exc, Conflict):
                await self._ask()
            return
        self._failures = 0
        hold = Hold(
            lease=take.lease,
            lease_revision=lease_revision,
            fence_revision=fence_revision,
            confirmed_at=now,
            next_at=now + RENEW_S,
        )
        standing = msgspec.structs.replace(self._standing, hold=hold)
        if leads(standing, self._clock.monotonic()):
            self._standing = standing
            log.info(TAKEN, epoch=hold.epoch)
            self._tell(True)

    async def _renew(self, lease: Lease, revision: int, now: float) -> None:
        hold = self._standing.hold
        assert hold is not None
        renewed = None
        try:
            with anyio.move_on_after(max(min(hold.until - now, ATTEMPT_S), MIN_SLEEP_S)) as attempt:
                renewed = await self._coordination.put(keys.LEASE, encode(lease), revision=revision)
            if attempt.cancelled_caught:
                log.warning(RENEWAL_FAILED, epoch=hold.epoch, error="no answer in time")
        except Conflict:
            await self._reconcile(hold)
            return
        except (Unavailable, DeadlineExceeded) as exc:
            log.warning(RENEWAL_FAILED, epoch=hold.epoch, code=exc.code, error=exc.message)
        if self._standing.hold is not hold:
            return  # a write was refused meanwhile: another node leads
        if renewed is None:
            hold = msgspec.structs.replace(hold, next_at=self._clock.monotonic() + self._pause_s())
        else:
            hold = msgspec.structs.replace(
                hold, lease=lease, lease_revision=renewed, confirmed_at=now, next_at=now + RENEW_S
            )
        self._standing = msgspec.structs.replace(self._standing, hold=hold)

    async def _reconcile(self, hold: Hold) -> None:
        """A renewal met another revision: an earlier one of this node that was given up as lost,
        or the end of this leader."""
        await self._ask()
        seen, standing = self._standing.seen, self._standing
        if standing.hold is not hold:
            return
        own = seen is not None and seen.lease is not None and seen.lease.node == standing.node
        if seen is None or not own or seen.epoch != hold.epoch:
            self._step_down("the lease was taken or deleted")
            return
        known = msgspec.structs.replace(
            hold,
            lease=seen.lease or hold.lease,
            lease_revision=max(seen.lease_revision, hold.lease_revision),
            next_at=self._clock.monotonic()
            + (0.0 if seen.lease_revision > hold.lease_revision else RETRY_S[0]),
        )
        self._standing = msgspec.structs.replace(standing, hold=known)

    async def _ask(self) -> None:
        """Look at the lease itself: the mirror may lag behind."""
        seen = self._standing.seen
        try:
            lease, fence = await self._coordination.get(keys.LEASE), await self._coordination.get(keys.FENCE)
        except (Unavailable, DeadlineExceeded) as exc:
            log.debug(LOOK_FAILED, code=exc.code, error=exc.message)
            return
        if seen is None or seen is not self._standing.seen:
            return  # the mirror was faster
        if lease is not None and lease.revision > seen.lease_revision:
            found = decode(lease.value, Lease)
            seen = msgspec.structs.replace(seen, lease=found, lease_revision=lease.revision)
        if fence is not None and fence.revision > seen.term_revision:
            found_term = decode(fence.value, Term)
            seen = msgspec.structs.replace(seen, term=found_term, term_revision=fence.revision)
        self._note(seen)

    async def _release(self, hold: Hold) -> None:
        """So that the next leader need not wait."""
        try:
            await self._coordination.delete(keys.LEASE, revision=hold.lease_revision)
        except OllamaDistributedError as exc:
            log.info(NOT_RELEASED, code=exc.code, error=exc.message)

    def _step_down(self, reason: str, *, level: int = logging.WARNING) -> None:
        hold = self._standing.hold
        if hold is None:
            return
        self._standing = msgspec.structs.replace(self._standing, hold=None)
        self._try_later()
        log.log(level, STEPPED_DOWN, epoch=hold.epoch, reason=reason)
        self._tell(False)

    def _try_later(self) -> None:
        not_before = self._clock.monotonic() + self._pause_s()
        self._standing = msgspec.structs.replace(self._standing, not_before=not_before)

    def _pause_s(self) -> float:
        return self._chance.uniform(*RETRY_S)

    def _tell(self, leads: bool) -> None:
        self._wake()
        for listener in tuple(self._listeners):
            try:
                listener(leads)
            except Exception:  # one listener's defect must not cost the cluster its leader
                log.exception(LISTENER_FAILED)
