"""The suite that every coordination engine passes: what `cluster/ports.py` promises.

For the author of an adapter: make a `Subject` (two connections to one fresh engine) and
await each of `CHECKS` on it, as `tests/conformance/` does. Only `assert` is used.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import anyio
import msgspec

from ollama_distributed.base.errors import (
    Conflict,
    DeadlineExceeded,
    Invalid,
    OllamaDistributedError,
    Unavailable,
)
from ollama_distributed.cluster.fanout import MAX_UNREAD_EVENTS
from ollama_distributed.cluster.ports import (
    ABSENT,
    MAX_VALUE_BYTES,
    Coordination,
    Entry,
    Fence,
    Message,
    Removed,
    Resync,
    WatchEvent,
    Write,
)

SOON_S = 60.0
"""A check that waits longer hangs."""
HELLO, HELLO_S = b"hello", 0.2

E = TypeVar("E", bound=OllamaDistributedError)
T = TypeVar("T")


class Subject(msgspec.Struct, kw_only=True):
    """Two connections, as of two nodes, to one engine with an empty state."""

    one: Coordination
    two: Coordination


async def check_create_get_delete(subject: Subject) -> None:
    one, two = subject.one, subject.two
    assert await one.get("a.b") is None
    first = await one.create("a.b", b"1")
    assert first > ABSENT
    assert await two.get("a.b") == Entry("a.b", b"1", first)
    conflict = await _raises(Conflict, two.create("a.b", b"2"))
    assert conflict.revision == first
    gone = await two.delete("a.b", revision=first)
    assert gone > first
    assert await one.get("a.b") is None
    again = await one.create("a.b", b"3")
    assert again > gone
    assert await one.get("a.b") == Entry("a.b", b"3", again)


async def check_put_replaces_one_revision_only(subject: Subject) -> None:
    one, two = subject.one, subject.two
    first = await one.put("k", b"1", revision=ABSENT)
    second = await two.put("k", b"2", revision=first)
    assert second > first
    conflict = await _raises(Conflict, one.put("k", b"3", revision=first))
    assert conflict.revision == second
    await _raises(Conflict, one.delete("k", revision=first))
    assert await one.get("k") == Entry("k", b"2", second)
    absent = await _raises(Conflict, one.put("never.there", b"1", revision=second))
    assert absent.revision == ABSENT


async def check_a_deleted_key_conflicts_as_absent(subject: Subject) -> None:
    first = await subject.one.create("k", b"1")
    await subject.one.delete("k", revision=first)
    conflict = await _raises(Conflict, subject.two.put("k", b"2", revision=first))
    assert conflict.revision == ABSENT


async def check_racing_creates_have_one_winner(subject: Subject) -> None:
    won: list[bytes] = []

    async def race(connection: Coordination, value: bytes) -> None:
        try:
            await connection.create("lock", value)
            won.append(value)
        except Conflict:
            return

    async with anyio.create_task_group() as group:
        for i in range(20):
            group.start_soon(race, (subject.one, subject.two)[i % 2], str(i).encode())
    assert len(won) == 1
    entry = await subject.one.get("lock")
    assert entry is not None
    assert entry.value == won[0]


async def check_racing_increments_all_count(subject: Subject) -> None:
    await subject.one.create("counter", b"0")

    async def increment(connection: Coordination) -> None:
        done = 0
        while done < 10:
            entry = await connection.get("counter")
            assert entry is not None
            try:
                await connection.put("counter", str(int(entry.value) + 1).encode(), revision=entry.revision)
                done += 1
            except Conflict:
                continue

    async with anyio.create_task_group() as group:
        for connection in (subject.one, subject.two, subject.one, subject.two):
            group.start_soon(increment, connection)
    entry = await subject.one.get("counter")
    assert entry is not None
    assert entry.value == b"40"


async def check_values_come_back_as_they_went(subject: Subject) -> None:
    for key, value in (("empty", b""), ("zero", b"\0\r\n\xff"), ("large", b"x" * MAX_VALUE_BYTES)):
        revision = await subject.one.create(key, value)
        assert await subject.two.get(key) == Entry(key, value, revision)


async def check_names_and_sizes_are_checked(subject: Subject) -> None:
    for key in ("", ".", "a.", ".a", "a..b", "a b", "a.*", "a.>", "_own", "ü", "x" * 300):
        await _raises(Invalid, subject.one.create(key, b""))
    await _raises(Invalid, subject.one.create("k", b"x" * (MAX_VALUE_BYTES + 1)))
    await _raises(Invalid, subject.one.batch([]))
    await _raises(Invalid, subject.one.batch([Write("k", b"1"), Write("k", b"2")]))
    assert (await subject.one.scan()).entries == ()


async def check_scan_shows_own_writes_in_order(subject: Subject) -> None:
    revisions = {key: await subject.one.create(key, key.encode()) for key in ("n.b", "n.a", "m", "nn")}
    await subject.one.delete("nn", revision=revisions["nn"])
    snapshot = await subject.one.scan("n.")
    assert [e.key for e in snapshot.entries] == ["n.a", "n.b"]
    assert snapshot.revision >= max(revisions.values())
    assert [e.key for e in (await subject.one.scan()).entries] == ["m", "n.a", "n.b"]


async def check_a_batch_is_all_or_nothing(subject: Subject) -> None:
    one = subject.one
    first = await one.create("k1", b"1")
    await _raises(Conflict, one.batch([Write("k2", b"x", ABSENT), Write("k1", b"x", first + 100)]))
    assert await one.get("k2") is None
    revisions = await one.batch(
        [Write("k1", None, first), Write("k2", b"2", ABSENT), Write("k3", b"3")],
    )
    assert revisions == tuple(range(revisions[0], revisions[0] + 3))
    assert revisions[0] > first
    assert [(e.key, e.revision) for e in (await one.scan()).entries] == [
        ("k2", revisions[1]),
        ("k3", revisions[2]),
    ]
    # A deleted key can be made again, inside a batch too.
    await one.batch([Write("k1", b"new", ABSENT), Write("k2", b"2b", revisions[1])])
    assert await one.get("k1") is not None


async def check_a_fence_refuses_the_replaced_leader(subject: Subject) -> None:
    one, two = subject.one, subject.two
    term = await one.create("leader", b"one")
    await one.batch([Write("data", b"1", ABSENT)], fence=Fence("leader", term))
    await one.batch([Write("data", b"2")], fence=Fence("leader", term))  # the fence stays as it is
    taken = await two.put("leader", b"two", revision=term)
    conflict = await _raises(Conflict, one.batch([Write("data", b"stale")], fence=Fence("leader", term)))
    assert conflict.revision == taken
    entry = await two.get("data")
    assert entry is not None
    assert entry.value == b"2"
    await two.batch([Write("data", b"3")], fence=Fence("leader", taken))


async def check_a_fence_holds_under_racing_terms(subject: Subject) -> None:
    """Whoever writes under a term can never write after the next term began."""
    history: list[tuple[int, int]] = []  # (revision of the data, term)

    async def lead(connection: Coordination) -> None:
        for _ in range(5):
            entry = await connection.get("leader")
            try:
                term = await connection.put("leader", b"", revision=entry.revision if entry else ABSENT)
                for _ in range(3):
                    written = await connection.batch([Write("data", b"x")], fence=Fence("leader", term))
                    history.append((written[0], term))
            except Conflict:
                continue

    async with anyio.create_task_group() as group:
        for connection in (subject.one, subject.two, subject.one, subject.two):
            group.start_soon(lead, connection)
    terms = [term for _, term in sorted(history)]
    assert terms
    assert terms == sorted(terms)


async def check_watch_starts_with_the_state_and_goes_on(subject: Subject) -> None:
    first = await subject.one.create("w.a", b"1")
    await subject.one.create("x", b"")
    async with subject.two.watch("w.") as events:
        start = await _next(events)
        while isinstance(start, Resync) and start.revision < first:
            start = await _next(events)  # the mirror was still on its way; of x, nothing comes here
        if isinstance(start, Resync):
            assert start.entries == (Entry("w.a", b"1", first),)
        second = await subject.one.put("w.a", b"2", revision=first)
        await subject.one.create("y", b"")
        third = await subject.one.delete("w.a", revision=second)
        assert await _until(events, Entry("w.a", b"2", second)) == []
        assert await _until(events, Removed("w.a", third)) == []


async def check_watch_misses_and_doubles_nothing(subject: Subject) -> None:
    written: list[int] = []

    async def write(connection: Coordination, key: str) -> None:
        revision = ABSENT
        for i in range(50):
            revision = await connection.put(key, str(i).encode(), revision=revision)
            written.append(revision)

    async with subject.two.watch() as events:
        await _next(events)
        async with anyio.create_task_group() as group:
            for i in range(4):
                group.start_soon(write, (subject.one, subject.two)[i % 2], f"w.{i}")
        seen = [await _next(events) for _ in range(200)]
    assert [e.revision for e in seen] == sorted(written)


async def check_batches_reach_watchers_in_order(subject: Subject) -> None:
    async with subject.two.watch() as events:
        await _next(events)
        fence = await subject.one.create("leader", b"")
        revisions = await subject.one.batch(
            [Write(f"b.{i}", b"", ABSENT) for i in range(100)], fence=Fence("leader", fence)
        )
        seen = [await _next(events) for _ in range(101)]
    assert [e.revision for e in seen] == [fence, *revisions]


async def check_a_slow_watcher_gets_the_state_instead(subject: Subject) -> None:
    async with subject.one.watch() as slow, subject.one.watch() as quick:
        await _next(slow)
        await _next(quick)
        last = 0
        for _ in range(MAX_UNREAD_EVENTS // 400 + 1):
            last = (await subject.one.batch([Write(f"k.{i}", b"") for i in range(400)]))[-1]
            for _ in range(400):
                await _next(quick)
        state = await _next(slow)
        assert isinstance(state, Resync)
        assert state.revision == last
        assert len(state.entries) == 400
        after = await subject.one.create("after", b"")
        assert await _next(slow) == Entry("after", b"", after)


async def check_messages_reach_matching_subscribers(subject: Subject) -> None:
    one, two = subject.one, subject.two
    async with two.subscribe("hb.*") as beats, one.subscribe("hb.>") as deep, two.subscribe("hb.n2") as exact:
        for messages in (beats, deep, exact):
            await _hears(messages, one, "hb.n2")
        await one.publish("hb.n1", b"1")
        await one.publish("hb.n1.load", b"2")
        await one.publish("other", b"3")
        await one.publish("hb.n2", b"4")  # order is promised per publisher only
        assert await _next_message(beats) == Message("hb.n1", b"1")
        assert await _next_message(beats) == Message("hb.n2", b"4")
        assert await _next_message(exact) == Message("hb.n2", b"4")
        assert {(await _next_message(deep)).data for _ in range(3)} == {b"1", b"2", b"4"}


async def check_requests_are_answered(subject: Subject) -> None:
    async def double(message: Message) -> bytes:
        return message.data * 2

    async def refuse(message: Message) -> bytes:
        raise Conflict(message.subject)

    async def break_(message: Message) -> bytes:
        raise ValueError(message.subject)

    one, two = subject.one, subject.two
    await _raises(Unavailable, one.request("cmd.two", b"x"))
    async with two.serve("cmd.*", double), two.serve("bad", refuse), two.serve("broken", break_):
        await _answers(one, "cmd.two")
        await _answers(one, "bad")
        assert await one.request("cmd.two", b"ab") == b"abab"
        assert await two.request("cmd.self", b"c") == b"cc"
        await _raises(DeadlineExceeded, one.request("bad", b"", timeout_s=0.2))
        await _answers(one, "broken")
        await _raises(DeadlineExceeded, one.request("broken", b"", timeout_s=0.2))
    await _raises(Unavailable, one.request("cmd.two", b"x"))


async def _raises(kind: type[E], call: Awaitable[object]) -> E:
    try:
        await call
    except kind as exc:
        return exc
    raise AssertionError(f"{kind.__name__} was not raised")


async def _next(items: AsyncIterator[T]) -> T:
    with anyio.fail_after(SOON_S):
        return await anext(items)


async def _hears(messages: AsyncIterator[Message], publisher: Coordination, subject: str) -> None:
    """Until what is published arrives: several servers tell each other of a subscription."""

    async def greet() -> None:
        while True:
            await publisher.publish(subject, HELLO)
            await anyio.sleep(0.01)

    async with anyio.create_task_group() as group:
        group.start_soon(greet)
        await _next(messages)
        group.cancel_scope.cancel()


async def _next_message(messages: AsyncIterator[Message]) -> Message:
    while (message := await _next(messages)).data == HELLO:
        pass
    return message


async def _answers(asker: Coordination, subject: str) -> None:
    """Until somebody serves it, as the asker's server sees it."""
    with anyio.fail_after(SOON_S):
        while True:
            try:
                await asker.request(subject, b"", timeout_s=HELLO_S)
            except DeadlineExceeded:
                return
            except Unavailable:
                continue
            else:
                return


async def _until(events: AsyncIterator[WatchEvent], wanted: WatchEvent) -> list[WatchEvent]:
    """What came before `wanted`."""
    seen: list[WatchEvent] = []
    while (event := await _next(events)) != wanted:
        seen.append(event)
    return seen


Check = Callable[[Subject], Awaitable[None]]

CHECKS: dict[str, Check] = {
    name.removeprefix("check_"): check
    for name, check in globals().copy().items()
    if name.startswith("check_")
}
"""Every check by name."""
