"""Where one answer's tokens come from: the source at work, its loss, and the next one.

What is known of the answer itself (journal, whether the client has a part) is the answer's and
is told; when and whether to go on `failover.py` decides.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

import msgspec
import structlog

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import OllamaDistributedError, RunnerDied, Unavailable
from ollama_distributed.base.inference import Generation
from ollama_distributed.base.paced import Paced
from ollama_distributed.base.tokens import Resume, SourceSink
from ollama_distributed.streams.gaps import Gaps, Quiet
from ollama_distributed.streams.journal import Journal
from ollama_distributed.streams.losses import Losses
from ollama_distributed.streams.ports import Source

log = structlog.get_logger(__name__)

MOST_STALLS = 3
"""Of one answer: a model that is slow everywhere is not moved round and round."""
STALLED = "the node that answered said nothing any more"
DRAINS = "the node that answered drains"

_NO_LOSSES = Losses()
"""Of every answer that lost nothing yet."""


class Home(Protocol):
    """What an answer needs of the node's `Answers`."""

    clock: Clock
    source: Source

    def turn(self) -> float:
        """Seconds until one more continuation may begin."""
        ...

    def chance(self) -> float:
        """0..1"""
        ...


class Next(msgspec.Struct, frozen=True):
    """What comes after a loss."""

    resume: Resume
    wait_s: float


class Sourcing(Paced[Generation]):
    """Of one answer. Does not keep who hears: two that hold each other would be left to the
    garbage collector, which stops the loop."""

    __slots__ = (
        "_asked",
        "_home",
        "_journal",
        "_losses",
        "_quiet",
        "_timer",
        "replica",
    )

    def __init__(self, home: Home, journal: Journal) -> None:
        super().__init__()
        self._home = home
        self._journal = journal
        self._asked = 0
        """Sources asked so far: a number for the one at work."""
        self._timer: asyncio.TimerHandle | None = None
        """Until the next one is asked."""
        self._losses = _NO_LOSSES
        self._quiet: Quiet | None = None
        """The watch's, from its first look on: most answers end before it."""
        self.replica: str | None = None
        """Of the source at work; None: it has not said."""

    # ── the source at work ──────────────────────────────────────────────────────────

    def ask(self, resume: Resume | None, hear: SourceSink) -> None:
        """`hear`: takes its events. Raises what the source raises, which then is none."""
        self._timer = None
        self._asked += 1
        this = self._asked
        generation = self._home.source.start(self._journal.request, hear, resume)
        if self._asked != this:
            # It ended, was cancelled or was lost before the source had returned the handle.
            generation.cancel()
            return
        self._stand_before(generation)

    def ended(self) -> None:
        """The source has said its last word."""
        self._generation = None

    def stop(self) -> None:
        """Nothing more comes. Idempotent."""
        self._asked += 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        generation, self._generation = self._generation, None
        if generation is not None:
            generation.cancel()

    # ── its loss ────────────────────────────────────────────────────────────────────

    @property
    def moves(self) -> int:
        return self._losses.moves

    @property
    def searching(self) -> bool:
        """The last source was lost and the next one has said nothing yet."""
        return self._losses.tries > 0

    def lost(
        self, error: OllamaDistributedError, *, began: bool, sent: bool, stalled: bool = False
    ) -> Next | OllamaDistributedError:
        """The source at work is gone: what comes next, or the error that ends the answer."""
        losses, now = self._losses, self._home.clock.monotonic()
        if losses is _NO_LOSSES:
            losses = self._losses = Losses()
        self._generation = None
        self._asked += 1
        wait_s = self._wait_before(error, now, began=began, sent=sent)
        if isinstance(error, RunnerDied) and began and not self._elsewhere(stalled=stalled):
            wait_s = None  # a new runner for what may have killed the last one: only on request
        if wait_s is None:
            # What the client lost, rather than why nobody else took it.
            return losses.why if losses.tries else error
        log.warning(
            "streams.lost",
            request_id=self._journal.request.request_id,
            node=self.replica,
            tokens=len(self._journal.ids),
            code=error.code,
            reason=error.message,
            tries=losses.tries,
        )
        losses.lost(error, now, self.replica, stalled=stalled)
        self.replica = self._quiet = None
        resume = self._journal.resume(losses.left, losses.deaths)
        return Next(resume, max(wait_s, self._home.turn()))

    def go_on(self, step: Next, ask: AskLater) -> None:
        """`ask` at once, or when its turn comes."""
        if step.wait_s:
            self._timer = asyncio.get_running_loop().call_later(step.wait_s, ask, step.resume)
        else:
            ask(step.resume)

    def went_on(self, tokens: int) -> None:
        """The first word of a new source."""
        self._losses.went_on()
        log.info(
            "streams.went_on",
            request_id=self._journal.request.request_id,
            node=self.replica,
            tokens=tokens,
            took_s=round(self._home.clock.monotonic() - self._losses.lost_s, 3),
        )

    def _wait_before(
        self, error: OllamaDistributedError, now: float, *, began: bool, sent: bool
    ) -> float | None:
        resumable = self._journal.resumable
        return self._losses.wait_before(
            error, now, self._home.chance(), began=began, sent=sent, resumable=resumable
        )

    @property
    def spoken(self) -> int | None:
        """Tokens between the last two looks of the watch; None: it was not speaking, or not heard."""
        return self._quiet.spoken if self._quiet is not None else None

    # ── the watch ───────────────────────────────────────────────────────────────────

    def stalled(self, told: int, speaking: Gaps, reading: Gaps, *, speaks: bool, sent: bool) -> bool:
        """Every `LOOK_S`: whether the answer should leave its source, and can. `told`: signs of life
        so far. A client that reads slowly is no stall."""
        if self._paused or self._generation is None or not (told or self.searching):
            self._quiet = None
            return False
        if self._quiet is None:
            self._quiet = Quiet(told, speaks=speaks)
            return False
        if not self._quiet.look(told, speaking, reading, speaks=speaks) or not self._can_leave(sent=sent):
            return False
        self._quiet.left()
        self.stop()
        return True

    def _can_leave(self, *, sent: bool) -> bool:
        return self._losses.stalls < MOST_STALLS and self._can_go(STALLED, sent=sent, stalled=True)

    def can_move(self, *, sent: bool) -> bool:
        """Whether the answer can leave its source, and another one has the model."""
        return self._generation is not None and self._can_go(DRAINS, sent=sent, stalled=False)

    def _can_go(self, why: str, *, sent: bool, stalled: bool) -> bool:
        if self.replica is None:
            return False
        now = self._home.clock.monotonic()
        if self._wait_before(Unavailable(why), now, began=True, sent=sent) is None:
            return False
        return self._elsewhere(stalled=stalled)

    def _elsewhere(self, *, stalled: bool) -> bool:
        left = self._losses.leaving(self.replica or "", stalled=stalled)
        resume = self._journal.resume(left, self._losses.deaths)
        return self._home.source.elsewhere(self._journal.request, resume)


class AskLater(Protocol):
    def __call__(self, resume: Resume, /) -> None: ...
