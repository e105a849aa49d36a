"""Decides what to load, evict, wait for and refuse (pure).

A `Hall` is what runs now. For a model that is to be loaded, `make_room` says: load it
(after evicting these idle ones), wait for those busy ones, or refuse. The least recently
used idle runner goes first, one that placement keeps goes after all others, a busy one never
goes, and the memory budget is never passed.
Traps behind the figures: DESIGN.md, "Inference engine".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import msgspec

from ollama_distributed.base.errors import NoCapacity

# ── room in memory ──────────────────────────────────────────────────────────────────


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """A model that is loading, loaded or unloading."""

    key: str
    memory_bytes: int
    last_used: float
    """Monotonic seconds."""
    busy: bool
    """Loading, unloading, or with requests in flight."""
    kept: bool = False
    """Placement wants it here: it goes after those that only requests wanted."""


class Hall(msgspec.Struct, frozen=True, kw_only=True):
    budget_bytes: int
    """For all runners together, those that run included."""
    max_loaded: int
    held: tuple[Held, ...]


class Load(msgspec.Struct, frozen=True, tag=True):
    """Load now, with so many slots, once `evict` (idle, least recently used first) are gone."""

    slots: int
    memory_bytes: int
    evict: tuple[str, ...] = ()


class Wait(msgspec.Struct, frozen=True, tag=True):
    """Busy models hold the room. `drain` take no new requests until this one has loaded."""

    drain: tuple[str, ...]


Decision = Load | Wait


def make_room(hall: Hall, sizes: Sequence[tuple[int, int]], *, name: str) -> Decision:
    """Choose how `name` gets loaded. `sizes`: (slots, memory bytes), most slots first.

    Prefers most slots beside what runs, then evicting, then fewer slots: evicting an idle
    model costs one reload, a missing slot costs every request. Waits only for what has to
    go. Deterministic: ties in `last_used` break on the key. A model that another server holds
    takes no memory here: it is never in the way, and nothing in its.

    Raises:
        NoCapacity: it does not fit even alone; the message says what would.
    """
    if not sizes[0][1]:
        return Load(*sizes[0])
    hall = msgspec.structs.replace(hall, held=tuple(h for h in hall.held if h.memory_bytes))
    possible = [(slots, size) for slots, size in sizes if size <= hall.budget_bytes]
    if not possible:
        slots, least = sizes[-1]
        raise NoCapacity(
            f"{name} needs {mib(least)} MiB of memory with {slots} slot{'s' if slots > 1 else ''}, "
            f"this node has {mib(hall.budget_bytes)} MiB for models"
        )
    for slots, size in possible:
        evict = _evictions(hall, size)
        if evict is not None:
            return Load(slots, size, evict)
    # Busy ones must end first. The fewest slots need the fewest of them to.
    _, size = possible[-1]
    victims = sorted(hall.held, key=lambda h: (h.busy, h.kept, h.last_used, h.key))
    free, count = hall.budget_bytes - sum(h.memory_bytes for h in hall.held), len(hall.held)
    drain = []
    for victim in victims:
        if free >= size and count < hall.max_loaded:
            break
        free, count = free + victim.memory_bytes, count - 1
        drain.append(victim.key)
    return Wait(tuple(drain))


def _evictions(hall: Hall, size: int) -> tuple[str, ...] | None:
    """The idle models that must go so that `size` fits; None: they do not suffice."""
    free = hall.budget_bytes - sum(h.memory_bytes for h in hall.held)
    count = len(hall.held)
    idle = sorted((h for h in hall.held if not h.busy), key=lambda h: (h.kept, h.last_used, h.key))
    evict = []
    for victim in idle:
        if free >= size and count < hall.max_loaded:
            break
        free, count = free + victim.memory_bytes, count - 1
        evict.append(victim.key)
    return tuple(evict) if free >= size and count < hall.max_loaded else None


def sizes_of(most_slots: int, estimate: Callable[[int], int]) -> tuple[tuple[int, int], ...]:
    """(slots, memory bytes) to try: all of them, then halves down to one."""
    slots, sizes = max(most_slots, 1), []
    while True:
        sizes.append((slots, estimate(slots)))
        if slots == 1:
            return tuple(sizes)
        slots //= 2


def mib(size_bytes: int) -> int:
    return -(-size_bytes // (1 << 20))


# ── cores ───────────────────────────────────────────────────────────────────────────


def thread_share(cores: int, others: int, asked: int = 0) -> int:
    """Threads of a runner beside `others` that are loaded.

    More threads than cores is slower, never faster (4 on 2 cores: 74 -> 26 tok/s), and
    runners that overlap hurt each other most (two at 2 on 2: 72 -> 12 each). Above two
    cores one is left to the node itself, whose event loop every token passes.
    """
    cores = max(cores, 1)
    if asked > 0:
        return min(asked, cores)
    usable = cores - 1 if cores > 2 else cores
    return max(1, usable // (others + 1))


def oversized(threads: Mapping[str, int], cores: int) -> list[str]:
    """Of runners that are busy at the same time (key -> threads), those with more than their share.

    Threads are fixed when a model is loaded, and one that was there first has most cores.
    Beside a busy neighbour that is worse than few: 2 and 1 on 2 cores give 8 and 47 tok/s
    where 1 and 1 give 33 and 52.
    """
    if sum(threads.values()) <= max(cores, len(threads)):
        return []
    share = thread_share(cores, len(threads) - 1)
    return [key for key, count in threads.items() if count > share]


# ── keep alive ──────────────────────────────────────────────────────────────────────


def renewed(current_s: float, asked_s: float | None) -> float:
    """Keep-alive of a loaded model after a request: what it asked, else as it was."""
    return current_s if asked_s is None else asked_s


def expires_at(idle_since: float, keep_alive_s: float) -> float | None:
    """When an idle model goes; None: never. Same clock as `idle_since`."""
    return idle_since + keep_alive_s if 0 <= keep_alive_s < math.inf else None


# ── models that crash ───────────────────────────────────────────────────────────────

CRASHES = 3
CRASH_WINDOW_S = 300.0
"""Three crashes in five minutes: a model that keeps dying takes its neighbours' time."""


class Crashes(msgspec.Struct, frozen=True):
    """Recent crashes of one model, oldest first (monotonic seconds), and the last reason."""

    times: tuple[float, ...] = ()
    reason: str = ""

    def add(self, now: float, reason: str) -> Crashes:
        times = (*(t for t in self.times if now - t < CRASH_WINDOW_S), now)
        return Crashes(times[-CRASHES:], reason)

    def quarantined_for(self, now: float) -> float:
        """Seconds until the model may be loaded again; 0: it may."""
        if len(self.times) < CRASHES or self.times[-1] - self.times[-CRASHES] >= CRASH_WINDOW_S:
            return 0.0
        return max(0.0, self.times[-1] + CRASH_WINDOW_S - now)
