"""What happened to an answer's sources: how often they were lost, and which nodes it left."""

from __future__ import annotations

from ollama_distributed.base.errors import OllamaDistributedError, RunnerDied, Unavailable
from ollama_distributed.base.tokens import Left
from ollama_distributed.streams.failover import Stand, wait_before


class Losses:
    """Of one answer. Times are a monotonic clock's, in seconds."""

    __slots__ = ("deaths", "left", "lost_s", "moves", "stalls", "tries", "why")

    def __init__(self) -> None:
        self.moves = 0
        """Times that it went on elsewhere."""
        self.tries = 0
        """In a row to find it another source; 0: it has one."""
        self.deaths = 0
        """Runners that died under it."""
        self.stalls = 0
        self.left: tuple[Left, ...] = ()
        self.lost_s = 0.0
        self.why: OllamaDistributedError = Unavailable()
        """How the last source that worked was lost."""

    def wait_before(
        self,
        error: OllamaDistributedError,
        now: float,
        chance: float = 1.0,
        *,
        began: bool,
        sent: bool,
        resumable: bool,
    ) -> float | None:
        """As `failover.wait_before`."""
        stand = Stand(
            began=began,
            sent=sent,
            resumable=resumable,
            moves=self.moves,
            tries=self.tries,
            deaths=self.deaths,
            lost_s=now - self.lost_s if self.tries else 0.0,
        )
        return wait_before(error, stand, chance)

    def lost(self, error: OllamaDistributedError, now: float, replica: str | None, *, stalled: bool) -> None:
        """One more; `replica`: where, if that is known."""
        if not self.tries:
            self.lost_s, self.why = now, error
        self.tries += 1
        self.deaths += isinstance(error, RunnerDied)
        self.stalls += stalled
        if replica is not None:
            self.left = self.leaving(replica, stalled=stalled)

    def leaving(self, replica: str, *, stalled: bool) -> tuple[Left, ...]:
        """Where it stalled earlier it may be asked again: that was another time."""
        return (*(Left(one.replica) for one in self.left), Left(replica, stalled))

    def went_on(self) -> None:
        self.tries = 0
        self.moves += 1
