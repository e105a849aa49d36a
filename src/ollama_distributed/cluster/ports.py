"""What the cluster asks of a coordination engine: few entries, few words, firm promises.

Engine-neutral: NATS JetStream and the in-memory twin implement it under one suite
(`testing/coordination_conformance.py`). What holds, on every implementation:

- A write that returned is durable and never lost. All writes are one history; revisions
  number it, grow by time and are shared by all keys.
- Every write is a compare-and-set. **No read decides anything**: `get`, `scan` and `watch`
  may lag behind a write that has returned (a paused leader answers from its past). What
  decides is the revision that a write names, or the fence that a batch carries.
- `Unavailable`: it did not happen and will not; raised within `REFUSAL_S` when no quorum
  answers. `Conflict`: it did not happen, `revision` says where the key stands.
  `DeadlineExceeded`: it may have happened, or may still; read, then compare-and-set again.
- Messages (`publish`, `request`) are at most once and touch no consensus.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import msgspec

from ollama_distributed.base.errors import Invalid

REFUSAL_S = 2.0
"""A write is refused, or reported as uncertain, after so many seconds without a quorum."""
MAX_KEY_BYTES = 255
MAX_VALUE_BYTES = 512 * 1024
"""State is small; models and logs go elsewhere."""
MAX_BATCH_WRITES = 500
ABSENT = 0
"""The revision of a key that is not there."""

_NAME_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_=/")


class Entry(msgspec.Struct, frozen=True):
    """A key that is there. As a watch event: it was put."""

    key: str
    value: bytes
    revision: int


class Removed(msgspec.Struct, frozen=True):
    """A key was deleted; `revision` is the deletion's own place in the history."""

    key: str
    revision: int


class Resync(msgspec.Struct, frozen=True):
    """All there is under the watched prefix: forget what you knew.

    Comes first, and again wherever events were lost (a broken connection, a slow reader).
    """

    entries: tuple[Entry, ...]
    revision: int
    """The history up to here is in `entries`."""


WatchEvent = Resync | Entry | Removed


class Write(msgspec.Struct, frozen=True):
    """One write of a batch."""

    key: str
    value: bytes | None
    """None: delete."""
    revision: int | None = None
    """What the key must stand at (`ABSENT`: it must not be there). None: whatever it is."""


class Fence(msgspec.Struct, frozen=True):
    """A batch with it applies only while `key` stands at `revision`: a leader that was
    replaced cannot write, whatever it believes."""

    key: str
    revision: int


class Message(msgspec.Struct, frozen=True):
    subject: str
    data: bytes


Watch = AbstractAsyncContextManager[AsyncIterator[WatchEvent]]
Messages = AbstractAsyncContextManager[AsyncIterator[Message]]
Handler = Callable[[Message], Awaitable[bytes]]


class Coordination(Protocol):
    """A connection to the coordination engine. Every method may be cancelled; a cancelled
    write may have happened."""

    # ── the state: durable, one history ─────────────────────────────────────────────

    async def get(self, key: str) -> Entry | None:
        """As of some recent moment.

        Raises:
            Unavailable: nobody answers.
        """
        ...

    async def scan(self, prefix: str = "") -> Resync:
        """All entries whose key starts with `prefix`, sorted by key, as of one moment."""
        ...

    async def create(self, key: str, value: bytes) -> int:
        """Put `key`, which must not be there; its revision.

        Raises:
            Conflict: it is there.
            DeadlineExceeded: it may have happened.
            Unavailable: it did not happen.
        """
        ...

    async def put(self, key: str, value: bytes, *, revision: int) -> int:
        """Put `key` if it stands at `revision` (`ABSENT`: as `create`); its new revision.

        An attempt that got no answer is repeated inside the deadline, which is safe: the
        same revision can be replaced once only, and one's own write is recognised.
        """
        ...

    async def delete(self, key: str, *, revision: int) -> int:
        """Delete `key` if it stands at `revision`; the deletion's revision."""
        ...

    async def batch(self, writes: Sequence[Write], *, fence: Fence | None = None) -> tuple[int, ...]:
        """All of `writes` or none, with consecutive revisions, one per write.

        Raises:
            Conflict: a revision, or the fence, does not hold; nothing was written.
        """
        ...

    def watch(self, prefix: str = "") -> Watch:
        """`Resync` first, then every change under `prefix` once and in order of revision;
        `Resync` again where that cannot be kept. Goes on by itself after the engine was away.

        A prefix is plain text: `nodes.` matches all keys that start with it.
        """
        ...

    # ── messages: quick, may be lost ────────────────────────────────────────────────

    async def publish(self, subject: str, data: bytes) -> None:
        """To everyone who subscribes now. Returning proves nothing about delivery.

        Raises:
            Unavailable: this node has no connection.
        """
        ...

    def subscribe(self, subject: str) -> Messages:
        """Messages on a subject, or on a pattern: `*` stands for one word between dots, a
        last `>` for one or more. Slow readers lose the oldest ones."""
        ...

    async def request(self, subject: str, data: bytes, *, timeout_s: float = REFUSAL_S) -> bytes:
        """Ask whoever serves `subject`; the first answer.

        Raises:
            Unavailable: nobody serves it.
            DeadlineExceeded: no answer in time.
        """
        ...

    def serve(self, subject: str, handler: Handler) -> AbstractAsyncContextManager[None]:
        """Answer requests on `subject` (or pattern) while inside; each in a task of its own.
        A handler that raises gives no answer: the asker sees `DeadlineExceeded`."""
        ...


def check_key(key: str) -> None:
    """Words of letters, digits and `-_=/`, joined by dots. A first `_` is the adapters' own.

    Raises:
        Invalid: it breaks the rule.
    """
    words = key.split(".")
    if len(key) > MAX_KEY_BYTES or key.startswith("_") or not all(words):
        raise Invalid(f"{key[:80]!r} is no key")
    if not _NAME_CHARACTERS.issuperset(key.replace(".", "")):
        raise Invalid(f"{key[:80]!r} is no key")


def check_value(value: bytes) -> None:
    """
    Raises:
        Invalid: longer than `MAX_VALUE_BYTES`.
    """
    if len(value) > MAX_VALUE_BYTES:
        raise Invalid(f"a value has at most {MAX_VALUE_BYTES} bytes, this one {len(value)}")


def check_batch(writes: Sequence[Write]) -> None:
    """A key at most once (the order inside a batch never matters), and not too many.

    Raises:
        Invalid: it breaks a rule.
    """
    if not 1 <= len(writes) <= MAX_BATCH_WRITES:
        raise Invalid(f"a batch has 1 to {MAX_BATCH_WRITES} writes, this one {len(writes)}")
    if len({write.key for write in writes}) != len(writes):
        raise Invalid("a batch writes each key once")
    for write in writes:
        check_key(write.key)
        check_value(write.value or b"")


def matches(pattern: str, subject: str) -> bool:
    """Whether a subject falls under a subscription's pattern."""
    wanted, words = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        return len(words) >= len(wanted) and matches(
            ".".join(wanted[:-1]), ".".join(words[: len(wanted) - 1])
        )
    return len(wanted) == len(words) and all(w in ("*", s) for w, s in zip(wanted, words, strict=True))
