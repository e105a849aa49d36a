"""Writes what a server changes of people: one record by compare-and-set each. What was written is
known here at once, and everywhere as soon as the state brings it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec

from ollama_distributed.access.people import SessionRecord, UserRecord, user_key
from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import Conflict, NotFound
from ollama_distributed.cluster.ports import ABSENT, Coordination
from ollama_distributed.node.people.mirror import SESSIONS, USERS, SharedPeople

MAX_USERS = 10_000
TRIES = 8


class Book:
    def __init__(
        self, shared: SharedPeople, clock: Clock, coordination: Callable[[], Awaitable[Coordination]]
    ) -> None:
        """`coordination`: raises `Unavailable` while there is none; so does every method."""
        self._shared = shared
        self._people = shared.people
        self._clock = clock
        self._coordination = coordination

    async def available(self) -> None:
        """
        Raises:
            Unavailable: nothing can be written now.
        """
        await self._coordination()

    # ── users ───────────────────────────────────────────────────────────────────────

    async def add_user(self, user: UserRecord) -> UserRecord:
        if len(self._people.users) >= MAX_USERS:
            raise Conflict(f"there are {MAX_USERS} users already")
        try:
            await self._write(await self._coordination(), USERS + user_key(user.name), user, ABSENT)
        except Conflict:
            raise Conflict(f"there is a user {user.name!r} already") from None
        return user

    async def change_user(self, name: str, change: Callable[[UserRecord], UserRecord]) -> UserRecord:
        """
        Raises:
            NotFound, Conflict, Unavailable
        """
        coordination, key = await self._coordination(), USERS + user_key(name)
        for _ in range(TRIES):
            stored = await coordination.get(key)
            if stored is None:
                raise no_user(name)
            changed = change(msgspec.json.decode(stored.value, type=UserRecord))
            try:
                await self._write(coordination, key, changed, stored.revision)
            except Conflict:
                continue
            return changed
        raise Conflict(f"the user {name!r} is being changed by others; try again")

    async def delete_user(self, name: str) -> None:
        """
        Raises:
            NotFound, Conflict, Unavailable
        """
        coordination, key = await self._coordination(), USERS + user_key(name)
        stored = await coordination.get(key)
        if stored is None:
            raise no_user(name)
        await coordination.delete(key, revision=stored.revision)
        self._shared.forget(key)

    def new_version(self) -> int:
        """Never the same again, also for a later user of the same name."""
        return int(self._clock.time() * 1000)

    # ── sessions ────────────────────────────────────────────────────────────────────

    async def begin(self, session: SessionRecord) -> None:
        """
        Raises:
            Conflict: there is one with this id.
        """
        await self._write(await self._coordination(), SESSIONS + session.id, session, ABSENT)

    async def change_session(
        self, session: str, change: Callable[[SessionRecord], SessionRecord]
    ) -> SessionRecord | None:
        """The session after it; None: it is over.

        Raises:
            Conflict: somebody else changed it meanwhile.
        """
        coordination = await self._coordination()
        stored = await coordination.get(SESSIONS + session)
        if stored is None:
            return None
        changed = change(msgspec.json.decode(stored.value, type=SessionRecord))
        await self._write(coordination, SESSIONS + session, changed, stored.revision)
        return changed

    async def end(self, session: str) -> None:
        """Idempotent."""
        coordination = await self._coordination()
        stored = await coordination.get(SESSIONS + session)
        while stored is not None:
            try:
                await coordination.delete(SESSIONS + session, revision=stored.revision)
                break
            except Conflict:
                stored = await coordination.get(SESSIONS + session)
        self._shared.forget(SESSIONS + session)

    async def end_all(self, name: str) -> tuple[str, ...]:
        ended = tuple(one.id for one in self._people.sessions.values() if one.user == name)
        for session in ended:
            await self.end(session)
        return ended

    async def _write(
        self, coordination: Coordination, key: str, record: UserRecord | SessionRecord, revision: int
    ) -> None:
        value = msgspec.json.encode(record)
        await coordination.put(key, value, revision=revision)
        self._shared.learn(key, value)


def no_user(name: str) -> NotFound:
    return NotFound(f"there is no user {name[:80]!r}")
