"""What the cluster knows of people, followed by every node: `access.people.People` is kept current.

What was learned last is kept in `DATA_DIR/people.json` (hashes and public keys; of passwords not
even those), so that who is signed in is known after a restart without coordination.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import anyio
import msgspec
import structlog

from ollama_distributed.access.people import People, SessionRecord, SignerRecord, UserRecord, user_key
from ollama_distributed.access.tokens import issuer_of
from ollama_distributed.base.errors import DiskFull
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.ports import Coordination, Entry, Removed, Resync, WatchEvent
from ollama_distributed.cluster.tasks import end
from ollama_distributed.node.data_dir import read_file, write_file

log = structlog.get_logger("cluster.people")

PEOPLE = "people."
USERS, SESSIONS, SIGNERS = "people.users.", "people.sessions.", "people.signers."
UNREADABLE = "people.unreadable"
NOT_KEPT = "people.not_kept"
SETTLE_S = 1.0
"""Many sign-ins together are written to disk once."""

T = TypeVar("T", bound=msgspec.Struct)


class KeptPeople(msgspec.Struct, frozen=True, kw_only=True):
    """`people.json`."""

    cluster: str
    users: tuple[UserRecord, ...] = ()
    sessions: tuple[SessionRecord, ...] = ()
    signers: tuple[SignerRecord, ...] = ()


class SharedPeople:
    def __init__(self, data_dir: Path, people: People) -> None:
        self.people = people
        self._path = data_dir / "people.json"
        self._users: dict[str, str] = {}
        """Names by the last part of their records' keys, which do not name them."""
        self._changed = anyio.Event()

    def restore(self, cluster: str) -> None:
        """Know what was kept of this cluster; nothing of another. Blocking, small.

        Raises:
            Invalid: the file is damaged.
        """
        kept = read_file(self._path, KeptPeople)
        if kept is None or kept.cluster != cluster:
            kept = KeptPeople(cluster=cluster)
        self.people.replace(kept.users, kept.sessions, kept.signers)
        self._users = {user_key(user.name): user.name for user in kept.users}
        self.people.issuer = issuer_of(cluster)

    async def follow(
        self, coordination: Coordination, *, cluster: str, removed: Callable[[NodeId], bool]
    ) -> None:
        """Keep up with the state until cancelled."""
        self.people.issuer, self.people.removed = issuer_of(cluster), removed
        keeping = asyncio.create_task(self._keep(cluster), name="keep people")
        try:
            async with coordination.watch(PEOPLE) as events:
                async for event in events:
                    self._hear(event)
                    self._changed.set()
        finally:
            await end([keeping])

    def _hear(self, event: WatchEvent) -> None:
        match event:
            case Resync(entries=entries):
                self._users.clear()
                self.people.replace((), (), ())
                for entry in entries:
                    self.learn(entry.key, entry.value)
            case Entry(key=key, value=value):
                self.learn(key, value)
            case Removed(key=key):
                self.forget(key)

    def learn(self, key: str, value: bytes) -> None:
        """A record, from the state or from who has just written it."""
        people = self.people
        if key.startswith(USERS):
            user = _read(key, value, UserRecord)
            if user is not None and key == USERS + user_key(user.name):
                people.users[user.name] = user
                self._users[user_key(user.name)] = user.name
        elif key.startswith(SESSIONS):
            session = _read(key, value, SessionRecord)
            if session is not None and key == SESSIONS + session.id:
                people.sessions[session.id] = session
        elif key.startswith(SIGNERS):
            signer = _read(key, value, SignerRecord)
            if signer is not None and key == SIGNERS + signer.kid:
                people.signers[signer.kid] = signer

    def forget(self, key: str) -> None:
        last = key.rpartition(".")[2]
        if key.startswith(USERS):
            self.people.users.pop(self._users.pop(last, ""), None)
        elif key.startswith(SESSIONS):
            self.people.sessions.pop(last, None)
            self.people.seen.pop(last, None)
        elif key.startswith(SIGNERS):
            self.people.signers.pop(last, None)

    async def _keep(self, cluster: str) -> None:
        while True:
            await self._changed.wait()
            await anyio.sleep(SETTLE_S)
            self._changed = anyio.Event()
            people = self.people
            kept = KeptPeople(
                cluster=cluster,
                users=tuple(msgspec.structs.replace(user, password="") for user in people.users.values()),
                sessions=tuple(people.sessions.values()),
                signers=tuple(people.signers.values()),
            )
            try:
                await asyncio.to_thread(write_file, self._path, kept)
            except DiskFull as failure:  # they are known all the same, until the next restart
                log.warning(NOT_KEPT, reason=failure.message)


def _read(key: str, value: bytes, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(value, type=kind)
    except msgspec.MsgspecError as failure:
        log.warning(UNREADABLE, key=key, reason=str(failure))
        return None
