"""Decides whether a node takes work now, or leaves the machine to its owner (pure).

Each cause has its own hysteresis: it must hold for `HOLDS_S` before the node rests, and be gone for
`GONE_S` before it comes back, so that a short compilation or a pulled plug drives no models about.

| cause   | rests while                                              | holds | gone |
| ------- | -------------------------------------------------------- | ----- | ---- |
| hours   | the time of day is outside `hours`                       | 0     | 0    |
| owner   | keyboard, mouse or terminal were used in `owner_idle_s`  | 0     | 0    |
| battery | the machine runs on its battery                          | 10 s  | 60 s |
| cpu     | others use more than `cpu` of the processor              | 30 s  | 2 min |

Coming back after `cpu` needs others to be below two thirds of the share. What cannot be measured is no
cause: a machine without a battery is never on it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

HOLDS_S: Mapping[str, float] = {"hours": 0.0, "owner": 0.0, "battery": 10.0, "cpu": 30.0}
GONE_S: Mapping[str, float] = {"hours": 0.0, "owner": 0.0, "battery": 60.0, "cpu": 120.0}
BACK_SHARE = 2 / 3
MINUTES_A_DAY = 24 * 60
_SPAN = re.compile(r"(\d{1,2}):(\d{2})\s*-\s*(\d{1,2}):(\d{2})")


class Span(msgspec.Struct, frozen=True):
    """From one minute of the day to before another, over midnight where that one is earlier."""

    start: int
    end: int

    def has(self, minute: int) -> bool:
        if self.start <= self.end:
            return self.start <= minute < self.end
        return minute >= self.start or minute < self.end


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    hours: tuple[Span, ...] = ()
    """When it takes work; empty: always."""
    owner_idle_s: float = 0.0
    """How long its owner must have been away; 0: whether somebody is there does not matter."""
    battery: bool = False
    """Rest on battery."""
    cpu: float = 0.0
    """0..1 of the processor that others may use; 0: as much as they like."""

    def __bool__(self) -> bool:
        return bool(self.hours or self.owner_idle_s or self.battery or self.cpu)


class Signs(msgspec.Struct, frozen=True, kw_only=True):
    """What is seen of the machine. None: it cannot be seen here."""

    minute: int
    """Of the day, by the machine's own time zone."""
    owner_idle_s: float | None = None
    on_battery: bool | None = None
    others_cpu: float | None = None
    """0..1: what programs other than this node and its children use."""


class Polite:
    """The causes that hold, over time. `now`: a monotonic clock, in seconds."""

    def __init__(self) -> None:
        self._resting: dict[str, str] = {}
        """Causes that make it rest, and their words."""
        self._turning: dict[str, float] = {}
        """Since when a cause is not what it counts as."""

    def look(self, signs: Signs, policy: Policy, now: float) -> str:
        """Why the node rests, in words; empty: it works."""
        held = self._causes(signs, policy)
        for cause in HOLDS_S:
            self._turn(cause, held.get(cause), now)
        return "; ".join(self._resting[cause] for cause in HOLDS_S if cause in self._resting)

    def _turn(self, cause: str, words: str | None, now: float) -> None:
        rests = cause in self._resting
        if (words is not None) == rests:
            self._turning.pop(cause, None)
            if words is not None:
                self._resting[cause] = words
            return
        since = self._turning.setdefault(cause, now)
        if now - since < (GONE_S if rests else HOLDS_S)[cause]:
            return
        del self._turning[cause]
        if words is None:
            del self._resting[cause]
        else:
            self._resting[cause] = words

    def _causes(self, signs: Signs, policy: Policy) -> dict[str, str]:
        found: dict[str, str] = {}
        if policy.hours and not any(span.has(signs.minute) for span in policy.hours):
            found["hours"] = f"outside its hours ({spell_hours(policy.hours)})"
        if (
            policy.owner_idle_s
            and signs.owner_idle_s is not None
            and signs.owner_idle_s < policy.owner_idle_s
        ):
            found["owner"] = "its owner is at work"
        if policy.battery and signs.on_battery:
            found["battery"] = "it runs on battery"
        most = policy.cpu * (BACK_SHARE if "cpu" in self._resting else 1.0)
        if policy.cpu and signs.others_cpu is not None and signs.others_cpu > most:
            found["cpu"] = f"other programs use more than {policy.cpu:.0%} of the processor"
        return found


def parse_hours(text: str) -> tuple[Span, ...]:
    """`22:00-07:00, 12:00-13:00`; empty text: none.

    Raises:
        ValueError: it is nothing of the kind.
    """
    spans = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        found = _SPAN.fullmatch(part)
        if found is None:
            raise ValueError(f"{part!r} is no span of hours; write e.g. 22:00-07:00")
        start_h, start_m, end_h, end_m = map(int, found.groups())
        start, end = start_h * 60 + start_m, end_h * 60 + end_m
        if max(start_m, end_m) > 59 or max(start, end) > MINUTES_A_DAY or start == end:
            raise ValueError(f"{part!r} is no span of hours; from 00:00 to 24:00, and not of no length")
        spans.append(Span(start, end))
    return tuple(spans)


def spell_hours(spans: tuple[Span, ...]) -> str:
    def clock(minute: int) -> str:
        return f"{minute // 60:02}:{minute % 60:02}"

    return ", ".join(f"{clock(span.start)}-{clock(span.end)}" for span in spans)
