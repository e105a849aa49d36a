"""Decides whether what clients saw of a key can have happened one step at a time.

Pure but for the recorder at the end. The model is what `cluster/ports.py` promises of a key: a
register that is written by compare-and-set on its revision; revisions rise and a deleted key
stands at `ABSENT`. An operation takes effect at one moment between its call and its return; one
of unknown outcome at any moment after its call, or never; a refused one never.

Source: Wing and Gong, "Testing and Verifying Concurrent Objects" (1993), with Lowe's cache of
(operations done, state) (2017). The search is exponential at worst; compare-and-set leaves it
few choices, so a thousand operations on a key take well under a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from ollama_distributed.base.errors import Conflict, DeadlineExceeded, Unavailable
from ollama_distributed.cluster.ports import ABSENT, Coordination, Entry

MAX_STEPS = 5_000_000
"""Of the search on one key, about ten seconds; a history that needs more is not decided."""
_SHOWN = 8
"""Operations shown around the one that does not fit."""

Kind = Literal["read", "write"]
Outcome = Literal["done", "conflict", "unknown", "refused"]


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One call of one client on one key, with what came of it."""

    client: str
    key: str
    kind: Kind
    called: int
    """Place in the order of all calls and returns."""
    returned: int | None
    """None: unknown outcome."""
    outcome: Outcome
    value: bytes | None = None
    """Written or read; None: a deletion, or nothing was there."""
    expected: int | None = None
    """The revision that a write names; None: it writes whatever is there."""
    revision: int | None = None
    """Of what was written or read; of a conflict where the key stood, None: not told."""


class State(msgspec.Struct, frozen=True):
    value: bytes | None
    floor: int
    """The key's last revision, or one that is not larger."""
    exact: bool
    """False: a write of unknown outcome put it; its revision is some one above `floor`."""


START = State(None, ABSENT, True)


class Violation(Exception):
    """No order of the operations explains what the clients saw."""


class Undecided(Exception):
    """The search was given up."""


def check(operations: Iterable[Operation], *, max_steps: int = MAX_STEPS) -> None:
    """Check each key's history by itself.

    Raises:
        Violation, Undecided
    """
    keys: dict[str, list[Operation]] = {}
    for operation in operations:
        keys.setdefault(operation.key, []).append(operation)
    for history in keys.values():
        _check_key(history, max_steps)


def step(state: State, operation: Operation) -> State | None:
    """The state after `operation`, if it can take effect now with what came of it."""
    if operation.kind == "read":
        return _seen(state, operation)
    if operation.outcome == "conflict":
        return _refused(state, operation)
    stands = state if operation.expected is None else _standing(state, operation.expected)
    if stands is None:
        return None
    if operation.outcome == "unknown":
        return State(operation.value, stands.floor, False)
    assert operation.revision is not None, "a finished write tells its revision"
    if operation.revision <= stands.floor:
        return None
    return State(operation.value, operation.revision, True)


def _standing(state: State, revision: int) -> State | None:
    """The state, now known to stand at `revision`, if it can."""
    if state.value is None or revision == ABSENT:
        return state if state.value is None and revision == ABSENT else None
    if state.exact:
        return state if state.floor == revision else None
    return State(state.value, revision, True) if revision > state.floor else None


def _seen(state: State, read: Operation) -> State | None:
    if read.value != state.value:
        return None
    return state if read.revision is None else _standing(state, read.revision)


def _refused(state: State, write: Operation) -> State | None:
    assert write.expected is not None, "an unconditional write has no conflict"
    if write.revision is not None:
        return _standing(state, write.revision) if write.revision != write.expected else None
    sure = state.value is None or state.exact
    return None if sure and _standing(state, write.expected) is not None else state


class _Line:
    """Calls and returns in order, as a linked list that operations are lifted out of."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        marks: list[tuple[int, int, bool]] = []
        for index, operation in enumerate(operations):
            marks.append((operation.called, index, True))
            if operation.returned is not None:
                marks.append((operation.returned, index, False))
        marks.sort()
        self.operation = [-1, *(index for _, index, _ in marks)]
        self.is_call = [False, *(is_call for _, _, is_call in marks)]
        size = len(self.operation)
        self.next = [*range(1, size), 0]
        self.previous = [size - 1, *range(size - 1)]
        self._return_of = {
            self.operation[place]: place for place in range(1, size) if not self.is_call[place]
        }

    def lift(self, call: int) -> None:
        for place in self._both(call):
            self.next[self.previous[place]] = self.next[place]
            self.previous[self.next[place]] = self.previous[place]

    def unlift(self, call: int) -> None:
        for place in reversed(self._both(call)):
            self.next[self.previous[place]] = place
            self.previous[self.next[place]] = place

    def _both(self, call: int) -> tuple[int, ...]:
        end = self._return_of.get(self.operation[call])
        return (call,) if end is None else (call, end)


def _check_key(history: Sequence[Operation], max_steps: int) -> None:
    operations = [
        o for o in history if o.outcome != "refused" and not (o.kind == "read" and o.outcome == "unknown")
    ]
    line = _Line(operations)
    state, done, left = START, 0, sum(o.returned is not None for o in operations)
    tried: set[tuple[int, State]] = set()
    path: list[tuple[int, State]] = []
    best: tuple[int, int, State] = (-1, 0, START)
    place = line.next[0]
    for _ in range(max_steps):
        if not left:
            return
        index = line.operation[place]
        if line.is_call[place]:
            after = step(state, operations[index])
            if after is not None and (attempt := (done | 1 << index, after)) not in tried:
                tried.add(attempt)
                path.append((place, state))
                done, state = attempt
                left -= operations[index].returned is not None
                line.lift(place)
                place = line.next[0]
            else:
                place = line.next[place]
            continue
        # This operation had returned before anything that is left was called: a dead end.
        best = max(best, (len(path), index, state), key=lambda item: item[0])
        if not path:
            raise Violation(_explain(operations, best[1], best[2]))
        place, state = path.pop()
        index = line.operation[place]
        done ^= 1 << index
        left += operations[index].returned is not None
        line.unlift(place)
        place = line.next[place]
    raise Undecided(f"{history[0].key}: not decided after {max_steps} steps")


def _explain(operations: Sequence[Operation], stuck: int, state: State) -> str:
    wrong = operations[stuck]
    near = sorted(operations, key=lambda o: abs(o.called - wrong.called))[: 2 * _SHOWN]
    lines = [
        ("> " if o is wrong else "  ") + _line(o)
        for o in sorted(near, key=lambda operation: operation.called)
    ]
    stands = f"{_short(state.value)} at {'' if state.exact else 'more than '}{state.floor}"
    return f"{wrong.key} stood at {stands}, then nothing explains:\n" + "\n".join(lines)


def _line(o: Operation) -> str:
    did = "read" if o.kind == "read" else "delete" if o.value is None else "put"
    what = f"{did} {_short(o.value)}" + (f" at {o.expected}" if o.expected is not None else "")
    came = f"{o.outcome} {'' if o.revision is None else o.revision}".strip()
    return f"[{o.called}..{'?' if o.returned is None else o.returned}] {o.client}: {what} -> {came}"


def _short(value: bytes | None) -> str:
    return "nothing" if value is None else repr(value if len(value) <= 24 else value[:21] + b"...")[1:]


# ── recording ───────────────────────────────────────────────────────────────────────


class Call:
    """An operation that was called; say once what came of it, or leave it unknown."""

    def __init__(self, history: History, operation: Operation) -> None:
        self._history = history
        self._slot = len(history.slots)
        history.slots.append(operation)

    def done(self, revision: int | None, value: bytes | None = None) -> None:
        """It happened; `value` is what a read saw."""
        before = self._history.slots[self._slot]
        self._return("done", revision, before.value if before.kind == "write" else value)

    def conflict(self, revision: int | None = None) -> None:
        """It did not: the key stood at another revision."""
        self._return("conflict", revision, self._history.slots[self._slot].value)

    def refused(self) -> None:
        """It did not happen and will not."""
        self._return("refused", None, self._history.slots[self._slot].value)

    def _return(self, outcome: Outcome, revision: int | None, value: bytes | None) -> None:
        before = self._history.slots[self._slot]
        assert before.outcome == "unknown", "an operation returns once"
        self._history.slots[self._slot] = msgspec.structs.replace(
            before, outcome=outcome, revision=revision, value=value, returned=self._history.tick()
        )


class History:
    """What concurrent clients of one event loop did; for a simulation and for real processes.

    history = History()
    one = Client(history, "one", coordination)
    await one.write("k", b"1", expected=ABSENT)
    history.check()
    """

    def __init__(self) -> None:
        self.slots: list[Operation] = []
        self._moment = 0

    def tick(self) -> int:
        self._moment += 1
        return self._moment

    def call(
        self, client: str, key: str, kind: Kind, *, value: bytes | None = None, expected: int | None = None
    ) -> Call:
        """Note the call, before anything is sent."""
        return Call(
            self,
            Operation(
                client=client,
                key=key,
                kind=kind,
                called=self.tick(),
                returned=None,
                outcome="unknown",
                value=value,
                expected=expected,
            ),
        )

    def check(self, *, max_steps: int = MAX_STEPS) -> None:
        """
        Raises:
            Violation, Undecided
        """
        check(self.slots, max_steps=max_steps)

    def counts(self) -> dict[Outcome, int]:
        """How the writes ended; a test of faults looks that each kind is there."""
        counts: dict[Outcome, int] = {"done": 0, "conflict": 0, "unknown": 0, "refused": 0}
        for operation in self.slots:
            if operation.kind == "write":
                counts[operation.outcome] += 1
        return counts


class Client:
    """A coordination connection whose writes are recorded. A cancelled call stays unknown."""

    def __init__(
        self, history: History, name: str, coordination: Coordination, *, exact_conflicts: bool = False
    ) -> None:
        self._history = history
        self._name = name
        self._coordination = coordination
        self._exact_conflicts = exact_conflicts
        """A conflict's revision is from the moment of the conflict, not from a later read."""

    async def write(self, key: str, value: bytes | None, *, expected: int) -> int | None:
        """Put, or delete for None; the new revision, or None where there is none.

        Conflicts, refusals and uncertain ends are recorded, not raised.
        """
        call = self._history.call(self._name, key, "write", value=value, expected=expected)
        try:
            if value is None:
                revision = await self._coordination.delete(key, revision=expected)
            else:
                revision = await self._coordination.put(key, value, revision=expected)
        except Conflict as exc:
            call.conflict(exc.revision if self._exact_conflicts else None)
        except Unavailable:
            call.refused()
        except DeadlineExceeded:
            pass  # unknown, as it was recorded
        else:
            call.done(revision)
            return revision
        return None

    async def look(self, key: str) -> Entry | None:
        """As of some recent moment: not recorded, since such a read promises nothing.

        Raises:
            Unavailable
        """
        return await self._coordination.get(key)

    async def read_last(self, key: str) -> Entry | None:
        """What is there when all is over and quiet: recorded, so that a lost write shows.

        Raises:
            Unavailable
        """
        call = self._history.call(self._name, key, "read")
        try:
            entry = await self._coordination.get(key)
        except Unavailable:
            call.refused()
            raise
        if entry is None:
            call.done(ABSENT)
        else:
            call.done(entry.revision, entry.value)
        return entry
