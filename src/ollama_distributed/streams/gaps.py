"""Decides when an answer that says nothing has stalled (pure).

Time is counted in looks of the watch, four a second: a token costs no look at a clock, and a
gateway that itself stood still sees no stall in it. A gap that begins and ends between two
looks counts as none, for the limit is never below eight of them.
"""

from __future__ import annotations

LOOK_S = 0.25
SPEAKING_LOOKS = 8
"""2 s: no shorter silence between two tokens is a stall."""
READING_LOOKS = 120
"""30 s between two steps of reading a prompt: a step is 256 tokens, and slow machines read ten a
second. A runner that hangs is found sooner by its own node (`serving/watch.py`)."""
TIMES = 8
"""A stall is so many times as long as the 99th percentile of the gaps."""
_LONGEST = 480
"""Longer gaps count as this one: two minutes."""
_MEMORY = 20_000.0
"""Gaps remembered; older ones fade."""


class Gaps:
    """How long one model lets wait for its next token, or its next step of reading."""

    __slots__ = ("_counts", "_least", "_limit", "_total")

    def __init__(self, least: int = SPEAKING_LOOKS) -> None:
        self._least = self._limit = least
        self._counts: dict[int, float] = {}
        self._total = 0.0

    @property
    def limit(self) -> int:
        """Looks without a sign after which an answer has stalled."""
        return self._limit

    def passed(self, signs: int, quiet: int) -> None:
        """`signs` tokens came since the last look, the first of them after `quiet` looks without."""
        if quiet:
            self._note(min(quiet + 1, _LONGEST), 1.0)
            signs -= 1
        if signs:
            self._note(0, float(signs))
        if quiet or self._limit > self._least:
            self._limit = max(self._least, TIMES * self._p99())

    def _note(self, looks: int, count: float) -> None:
        self._counts[looks] = self._counts.get(looks, 0.0) + count
        self._total += count
        if self._total > _MEMORY:
            self._counts = {gap: count / 2 for gap, count in self._counts.items() if count > 0.5}
            self._total = sum(self._counts.values())

    def _p99(self) -> int:
        above = 0.0
        for looks in sorted(self._counts, reverse=True):
            above += self._counts[looks]
            if above > 0.01 * self._total:
                return looks
        return 0


ASK_AGAIN_LOOKS = 4
"""An answer that stalled and has nowhere to go looks for a place once a second."""


class Quiet:
    """How long one answer has said nothing."""

    __slots__ = ("_looks", "_speaks", "_told", "gaps", "spoken")

    def __init__(self, told: int, *, speaks: bool) -> None:
        """From its first look on; as in `look`."""
        self._told = told
        self._looks = 0
        self._speaks = speaks
        self.gaps: Gaps | None = None
        """Those that the answer is measured by now."""
        self.spoken: int | None = None
        """Tokens between the last two looks; None: it was reading."""

    def look(self, told: int, speaking: Gaps, reading: Gaps, *, speaks: bool) -> bool:
        """Whether to leave. `told`: signs of life so far; `speaks`: tokens come, so that it has
        less time than one that reads its prompt."""
        passed, self._told = told - self._told, told
        gaps = self.gaps = speaking if self._speaks else reading
        self.spoken = passed if self._speaks else None
        if passed > 0:
            gaps.passed(passed, self._looks)
            self._looks, self._speaks = 0, speaks
            return False
        self._looks += 1
        late = self._looks - gaps.limit
        return late >= 0 and late % ASK_AGAIN_LOOKS == 0

    def left(self) -> None:
        """The silence was a gap of the model, too."""
        if self.gaps is not None:
            self.gaps.passed(1, self._looks)
