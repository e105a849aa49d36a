"""Decides whether an answer that lost its source goes on elsewhere, and when (pure).

Rules of `docs/design/failover.md`: what the client has seen is never taken back (R2), so an
answer that cannot be continued token by token ends in an error that says that a new try may
help; a request under which two runners died is not given a third (I13).
"""

from __future__ import annotations

import msgspec

from ollama_distributed.base.errors import (
    DeadlineExceeded,
    DiskFull,
    LoadFailed,
    NoCapacity,
    OllamaDistributedError,
    Quarantined,
    QueueFull,
    RunnerDied,
    Unavailable,
)

LOST: tuple[type[OllamaDistributedError], ...] = (Unavailable, DeadlineExceeded, RunnerDied)
"""Ends of a source that are not the answer's own: it can go on."""
AWAY: tuple[type[OllamaDistributedError], ...] = (
    *LOST,
    QueueFull,
    NoCapacity,
    LoadFailed,
    Quarantined,
    DiskFull,
)
"""Refusals to go on with it that may be over soon: a node that restarts, a queue that empties."""

MOST_MOVES = 8
"""Of one answer: a long one may live through a rolling restart of a few nodes, none through more."""
MOST_DEATHS = 1
"""Runners that may die under an answer before it is the suspect."""
PATIENCE_S = 15.0
"""Until somebody takes it: a node starts in 3 s; clients give up a silent stream after 30 or 60."""
FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 2.0
BURST = 16
"""Continuations that may begin at once, however few answers are alive."""
SHARE = 0.1
"""Of the live answers that may begin their continuation in a second (R5)."""


class Stand(msgspec.Struct, frozen=True, kw_only=True):
    """An answer at the moment it lost its source."""

    began: bool
    """A token came: before the first one the router tries other nodes by itself."""
    sent: bool
    """The client has a part of it."""
    resumable: bool
    moves: int = 0
    """Times it went on elsewhere."""
    tries: int = 0
    """Tries in a row to find it another source; 0: it had one."""
    deaths: int = 0
    """Runners that died under it before this loss."""
    lost_s: float = 0.0
    """Since its last source was lost."""


def wait_before(error: OllamaDistributedError, stand: Stand, chance: float = 1.0) -> float | None:
    """Seconds until the next try; None: `error` is its end. `chance`: 0..1, spreads the tries."""
    if not (stand.began or stand.moves or stand.tries):
        return None
    if not isinstance(error, AWAY if stand.tries else LOST):
        return None
    if isinstance(error, RunnerDied) and stand.deaths >= MOST_DEATHS:
        return None
    if (stand.sent and not stand.resumable) or stand.moves >= MOST_MOVES or stand.lost_s >= PATIENCE_S:
        return None
    if stand.tries == 0:
        return 0.0
    longest = min(FIRST_WAIT_S * 2.0 ** (stand.tries - 1), LONGEST_WAIT_S)
    return longest * (0.5 + 0.5 * chance)


class Budget:
    """How many continuations may begin (R5): those beyond it wait for their turn."""

    __slots__ = ("_spent", "_spent_at")

    def __init__(self) -> None:
        self._spent = 0.0
        self._spent_at = 0.0

    def take(self, now: float, live: int) -> float:
        """Seconds to wait before one more may begin, of `live` answers."""
        rate = max(float(BURST), SHARE * live)
        self._spent = max(0.0, self._spent - rate * (now - self._spent_at)) + 1.0
        self._spent_at = now
        return max(0.0, (self._spent - rate) / rate)
