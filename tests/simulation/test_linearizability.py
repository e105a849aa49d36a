"""The checker: known histories, a brute-force twin, real registers, and how its work grows."""

from __future__ import annotations

import itertools
import random

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.adapters.coordination.memory import MemoryEngine
from ollama_distributed.cluster.ports import ABSENT
from ollama_distributed.testing import virtual_time
from ollama_distributed.testing.linearizability import (
    START,
    Client,
    History,
    Operation,
    State,
    Undecided,
    Violation,
    check,
    step,
)


def put(
    called: int, returned: int | None, expected: int, revision: int | None, value: bytes = b""
) -> Operation:
    return Operation(
        client="c",
        key="k",
        kind="write",
        called=called,
        returned=returned,
        outcome="unknown" if returned is None else "done",
        value=value or str(revision or called).encode(),
        expected=expected,
        revision=revision,
    )


def conflict(called: int, returned: int, expected: int, revision: int | None = None) -> Operation:
    return Operation(
        client="c", key="k", kind="write", called=called, returned=returned, outcome="conflict",
        value=b"never", expected=expected, revision=revision,
    )  # fmt: skip


def read(called: int, returned: int, value: bytes | None, revision: int | None = None) -> Operation:
    return Operation(
        client="c", key="k", kind="read", called=called, returned=returned, outcome="done",
        value=value, revision=revision,
    )  # fmt: skip


GOOD: dict[str, list[Operation]] = {
    "nothing": [],
    "one after the other": [put(1, 2, 0, 5), put(3, 4, 5, 6), read(5, 6, b"6", 6)],
    "overlapping, in either order": [put(1, 6, 7, 9), put(2, 5, 0, 7)],
    "unknown, and it happened": [put(1, None, 0, None, b"x"), read(2, 3, b"x", 4), put(4, 5, 4, 6)],
    "unknown, and it did not": [put(1, None, 0, None, b"x"), read(2, 3, None), put(4, 5, 0, 6)],
    "unknown, and it happened late": [
        put(1, None, 4, None, b"x"), put(2, 3, 0, 4), read(4, 5, b"4"), read(6, 7, b"x"),
    ],
    "conflict with what came between": [put(1, 2, 0, 3), conflict(3, 4, 0, 3), read(5, 6, b"3", 3)],
    "conflict with an unknown write": [put(1, None, 0, None), conflict(2, 3, 0, 8), put(4, 5, 8, 9)],
    "deleted and made again": [
        put(1, 2, 0, 3),
        Operation(client="c", key="k", kind="write", called=3, returned=4, outcome="done",
                  value=None, expected=3, revision=4),
        conflict(5, 6, 3, ABSENT),
        put(7, 8, ABSENT, 9),
    ],
}  # fmt: skip

BAD: dict[str, list[Operation]] = {
    "an acknowledged write is lost": [put(1, 2, 0, 3), read(3, 4, None)],
    "an acknowledged write is undone": [put(1, 2, 0, 3), put(3, 4, 3, 5), read(5, 6, b"3", 3)],
    "two replace the same revision": [put(1, 2, 0, 3), put(3, 5, 3, 6), put(4, 7, 3, 8)],
    "a conflict with nothing": [put(1, 2, 0, 3), conflict(3, 4, 3)],
    "a refused write is read": [
        Operation(client="c", key="k", kind="write", called=1, returned=2, outcome="refused",
                  value=b"x", expected=0),
        read(3, 4, b"x"),
    ],
    "revisions go back": [put(1, 2, 0, 9), put(3, 4, 9, 5)],
    "an unknown write before its call": [read(1, 2, b"x"), put(3, None, 0, None, b"x")],
    "an unknown write twice": [
        put(1, None, 0, None, b"x"), read(2, 3, b"x", 4), put(4, 5, 4, 6), read(6, 7, b"x"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_good_histories_pass(name: str) -> None:
    check(GOOD[name])


@pytest.mark.parametrize("name", BAD)
def test_bad_histories_do_not(name: str) -> None:
    with pytest.raises(Violation, match="stood at"):
        check(BAD[name])


def test_keys_are_apart() -> None:
    check([*GOOD["one after the other"], Operation(
        client="c", key="other", kind="read", called=9, returned=10, outcome="done")])  # fmt: skip


def _explained(operations: list[Operation]) -> bool:
    """By trying every order of every subset: the search's naive twin."""
    sure = [o for o in operations if o.returned is not None and o.outcome != "refused"]
    open_ones = [o for o in operations if o.returned is None and o.kind == "write"]
    for size in range(len(open_ones) + 1):
        for chosen in itertools.combinations(open_ones, size):
            for order in itertools.permutations([*sure, *chosen]):
                if _in_time(order) and _runs(order):
                    return True
    return False


def _in_time(order: tuple[Operation, ...]) -> bool:
    return not any(
        later.returned is not None and later.returned < earlier.called
        for i, earlier in enumerate(order)
        for later in order[i + 1 :]
    )


def _runs(order: tuple[Operation, ...]) -> bool:
    state: State | None = START
    for operation in order:
        assert state is not None
        if (state := step(state, operation)) is None:
            return False
    return True


@st.composite
def histories(draw: st.DrawFn) -> list[Operation]:
    """Up to six operations of any outcome, plausible enough that about half can be explained."""
    count = draw(st.integers(1, 6))
    places = draw(st.permutations(range(2 * count)))
    operations = []
    for i in range(count):
        called, returned = sorted(places[2 * i : 2 * i + 2])
        outcome = draw(st.sampled_from(["done", "done", "done", "conflict", "unknown", "refused"]))
        kind = draw(st.sampled_from(["read", "write", "write"])) if outcome == "done" else "write"
        revision = draw(st.integers(1, 4))
        absent = kind == "read" and draw(st.booleans())
        operations.append(
            Operation(
                client=f"c{i}",
                key="k",
                kind=kind,
                called=called,
                returned=None if outcome == "unknown" else returned,
                outcome=outcome,
                value=None if absent else str(revision).encode(),
                expected=draw(st.integers(0, 3)) if kind == "write" else None,
                revision=None if absent or outcome in ("unknown", "refused") else revision,
            )
        )
    return operations


@given(histories())
def test_the_search_agrees_with_trying_everything(operations: list[Operation]) -> None:
    try:
        check(operations)
        explained = True
    except Violation:
        explained = False
    assert explained == _explained(operations)


def _real_history(seed: int, count: int, clients: int = 8) -> list[Operation]:
    """What clients see of a real register whose answers get lost at times."""
    chance = random.Random(seed)
    history, state, revision = History(), (None, ABSENT), 0
    pending: dict[int, object] = {}
    while len(history.slots) < count or pending:
        client = chance.randrange(clients)
        if client in pending:
            pending.pop(client)()  # type: ignore[operator]
            continue
        if len(history.slots) >= count:
            continue
        guess = state[1] if chance.random() < 0.7 else chance.randrange(revision + 1)
        value = str(len(history.slots)).encode()
        call = history.call(f"c{client}", "k", "write", value=value, expected=guess)
        # The effect lies here; the return, if any, at this client's next turn.
        fate = chance.random()
        if fate < 0.05:
            pending[client] = call.refused
        elif guess != state[1]:
            pending[client] = (lambda c=call, r=state[1]: c.conflict(r)) if fate < 0.9 else (lambda: None)
        else:
            revision += chance.randrange(1, 3)
            state = (value, revision)
            pending[client] = (lambda c=call, r=revision: c.done(r)) if fate < 0.9 else (lambda: None)
    history.call("last", "k", "read").done(state[1], state[0])
    return history.slots


@given(st.integers(0, 10_000))
def test_a_real_register_is_always_explained(seed: int) -> None:
    check(_real_history(seed, 60))


@given(st.integers(0, 300))
def test_a_write_that_vanishes_never_is(seed: int) -> None:
    operations = _real_history(seed, 60)[:-1]
    acknowledged = sorted((o.revision or 0, o.value) for o in operations if o.outcome == "done")
    if len(acknowledged) < 2:
        return
    revision, value = acknowledged[-2]
    end = 10 * len(operations)
    with pytest.raises(Violation):
        check([*operations, read(end, end + 1, value, revision)])


def _steps(operations: list[Operation]) -> int:
    """How many the search takes, to the next power of two."""
    steps = 1
    while True:
        try:
            check(operations, max_steps=steps)
            return steps
        except Undecided:
            steps *= 2


@pytest.mark.parametrize("seed", range(5))
def test_a_thousand_operations_are_decided_quickly(seed: int) -> None:
    """Those of unknown outcome stay candidates to the end, and each step looks at them: four
    times the operations, sixteen times the steps and not more; no back-tracking explosion."""
    small, large = _steps(_real_history(seed, 250)), _steps(_real_history(seed, 1000))
    assert large <= 32 * small
    assert large <= 2**18


def test_a_search_is_bounded() -> None:
    with pytest.raises(Undecided):
        check(_real_history(1, 1000), max_steps=100)


def test_recorded_clients_of_an_engine_that_loses_messages() -> None:
    history = History()

    class Lossy:
        def delay_s(self, source: str, target: str) -> float | None:
            chance = virtual_time.loop_random()
            return None if chance.random() < 0.05 else chance.random() * 0.1

    async def work(client: Client) -> None:
        chance = virtual_time.loop_random()
        for _ in range(60):
            try:
                entry = await client.look("k")
            except Exception:
                continue
            await anyio.sleep(chance.random() * 0.1)
            value = None if chance.random() < 0.1 and entry else chance.randbytes(4)
            await client.write("k", value, expected=entry.revision if entry else ABSENT)

    async def main() -> None:
        engine = MemoryEngine(Lossy())
        async with engine.client("a") as a, engine.client("b") as b, anyio.create_task_group() as group:
            for connection in (a, b):
                for i in range(3):
                    group.start_soon(
                        work, Client(history, f"{connection.name}{i}", connection, exact_conflicts=True)
                    )
        entry = engine.entries.get("k")
        last = history.call("last", "k", "read")
        last.done(entry.revision if entry else ABSENT, entry.value if entry else None)

    virtual_time.run(main, seed=3)
    assert all(count for name, count in history.counts().items() if name != "refused"), history.counts()
    history.check()
