"""The state's stream as a whole: freeze it, copy it out and in, change how many hold it.

For servers, while the cluster's voters change (`growth`). A frozen stream listens where nobody
speaks, so that writes reach no one and are refused; reads go on. That is part of its
configuration: it lasts over restarts and travels with a copy.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import anyio
import msgspec
from nats.aio.msg import Msg

from ollama_distributed.adapters.coordination.nats import wire
from ollama_distributed.adapters.coordination.nats.session import Address, Connection, short_connection
from ollama_distributed.base.errors import Unavailable

ANSWER_S = 3.0
CHUNK_S = 10.0
"""For one chunk of a copy; a disk that syncs slower than this is no place for state."""
CHUNK_BYTES = 128 * 1024
SETTLE_S = 0.1
"""Writes that were under way when a stream froze are in it after milliseconds, or refused."""


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What a copy of a stream says of itself, beside its bytes."""

    config: dict[str, Any]
    state: dict[str, Any]

    @property
    def last_seq(self) -> int:
        return int(self.state["last_seq"])

    @property
    def messages(self) -> int:
        return int(self.state["messages"])


class ReplicaInfo(msgspec.Struct, frozen=True):
    name: str
    current: bool = False
    offline: bool = False


class ReplicaGroup(msgspec.Struct, frozen=True):
    leader: str = ""
    replicas: tuple[ReplicaInfo, ...] = ()


class Info(msgspec.Struct, frozen=True):
    """A stream as its leader sees it."""

    config: dict[str, Any]
    state: wire.StreamState = wire.StreamState()
    cluster: ReplicaGroup | None = None

    @property
    def leader(self) -> str:
        return self.cluster.leader if self.cluster is not None else ""

    def only(self, server: str) -> bool:
        """Whether nobody else holds it."""
        return self.replicas == 1 and self.leader == server and not (self.cluster and self.cluster.replicas)

    @property
    def replicas(self) -> int:
        return int(self.config.get("num_replicas", 1))

    @property
    def complete(self) -> bool:
        """As many servers hold all of it as should."""
        if self.replicas == 1:
            return True
        others = self.cluster.replicas if self.cluster is not None else ()
        current = sum(other.current and not other.offline for other in others)
        return current == len(others) == self.replicas - 1


class Stream:
    """The stream of `bucket`, as the servers at `address` keep it. A connection per call."""

    def __init__(self, address: Address, *, name: str, bucket: str = "cfg") -> None:
        self._address = address
        self._user = name
        self._bucket = wire.Bucket(bucket)
        self.name = self._bucket.stream

    async def info(self) -> Info | None:
        """None: there is no such stream.

        Raises:
            Unavailable: nobody can say.
        """
        async with self._connected() as connection:
            answer = await _ask(connection, f"STREAM.INFO.{self.name}", {})
        if answer.get("error", {}).get("err_code") == wire.NO_STREAM:
            return None
        return msgspec.convert(_good(answer), Info)

    async def create(self, *, replicas: int = 1) -> None:
        """Make it, empty, if it is not there.

        Raises:
            Unavailable: it cannot be made, or one is there that keeps other promises.
        """
        config = wire.stream_config(self._bucket, replicas=replicas)
        async with self._connected() as connection:
            answer = await _ask(connection, f"STREAM.CREATE.{self.name}", config)
        if answer.get("error", {}).get("err_code") == wire.NAME_IN_USE:
            sound = msgspec.convert((await self._there()).config, wire.StreamConfig).sound
            if not sound:
                raise Unavailable(f"the stream {self.name} is there, but it is not ours")
        else:
            _good(answer)

    async def freeze(self) -> Info:
        """Refuse writes from now on. Idempotent. What was acknowledged is in what it returns.

        Raises:
            Unavailable: it may or may not be frozen; `thaw` it or go on.
        """
        await self.update(subjects=[self._bucket.frozen])
        before = await self._there()
        while True:
            await anyio.sleep(SETTLE_S)
            now = await self._there()
            if now.state.last_seq == before.state.last_seq:
                return now
            before = now

    async def thaw(self) -> None:
        """Take writes again. Idempotent.

        Raises:
            Unavailable: perhaps not.
        """
        await self.update(subjects=[self._bucket.all_keys])

    async def update(self, **changes: object) -> None:
        """Change its configuration.

        Raises:
            Unavailable: refused, or nobody answered.
        """
        found = await self._there()
        config = {**found.config, **changes}
        if config == found.config:
            return
        async with self._connected() as connection:
            _good(await _ask(connection, f"STREAM.UPDATE.{self.name}", config))

    async def lead(self, server: str) -> None:
        """Ask its leader to hand over to `server`.

        Raises:
            Unavailable: refused, or nobody answered.
        """
        async with self._connected() as connection:
            body = {"placement": {"preferred": server}}
            _good(await _ask(connection, f"STREAM.LEADER.STEPDOWN.{self.name}", body))

    async def delete(self) -> None:
        """Forget it, if it is there."""
        async with self._connected() as connection:
            answer = await _ask(connection, f"STREAM.DELETE.{self.name}", {})
        if answer.get("error", {}).get("err_code") != wire.NO_STREAM:
            _good(answer)

    async def copy_out(self, path: Path) -> Snapshot:
        """Write a copy, checked by the server for damage, to `path`; durable on return.

        Raises:
            Unavailable: it cannot be copied, or came incomplete.
        """
        async with self._connected() as connection:
            chunks: asyncio.Queue[Msg] = asyncio.Queue()
            inbox = connection.new_inbox()
            await connection.subscribe(inbox, cb=chunks.put)
            wanted = {"deliver_subject": inbox, "no_consumers": True, "jsck": True}
            answer = _good(await _ask(connection, f"STREAM.SNAPSHOT.{self.name}", wanted))
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                while True:
                    with anyio.fail_after(CHUNK_S):
                        chunk = await chunks.get()
                    if not chunk.data:  # the end, or the reason why there is no more
                        status = (chunk.headers or {}).get("Status", "204")
                        if status not in ("200", "204"):
                            raise Unavailable(f"the state cannot be copied: {chunk.headers}")
                        break
                    file.write(chunk.data)
                    if chunk.reply:
                        await connection.publish(chunk.reply, b"")
                file.flush()
                await asyncio.to_thread(os.fsync, file.fileno())
        return Snapshot(config=answer["config"], state=answer["state"])

    async def copy_in(self, path: Path, snapshot: Snapshot, *, replicas: int) -> None:
        """Make the stream out of a copy, frozen or not as it was. It must not be there.

        Raises:
            Unavailable: it was refused, or no answer: `delete` and try again.
        """
        config = {**snapshot.config, "num_replicas": replicas}
        async with self._connected() as connection:
            answer = _good(
                await _ask(
                    connection,
                    f"STREAM.RESTORE.{self.name}",
                    {"config": config, "state": snapshot.state},
                )
            )
            deliver = answer["deliver_subject"]
            file = await asyncio.to_thread(path.open, "rb")
            try:
                while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
                    await _request(connection, deliver, chunk)
                done = msgspec.json.decode(await _request(connection, deliver, b""))
            finally:
                file.close()
        _good(done)

    async def _there(self) -> Info:
        found = await self.info()
        if found is None:
            raise Unavailable(f"there is no stream {self.name}")
        return found

    def _connected(self) -> AbstractAsyncContextManager[Connection]:
        return short_connection(self._address, name=self._user)


def _good(answer: dict[str, Any]) -> dict[str, Any]:
    if error := answer.get("error"):
        raise Unavailable(f"the coordination servers refuse: {error.get('description')}")
    return answer


async def _ask(connection: Connection, subject: str, body: dict[str, Any]) -> dict[str, Any]:
    data = msgspec.json.encode(body) if body else b""
    answer = await connection.request(f"$JS.API.{subject}", data, timeout=ANSWER_S)
    decoded: dict[str, Any] = msgspec.json.decode(answer.data)
    return decoded


async def _request(connection: Connection, subject: str, data: bytes) -> bytes:
    return (await connection.request(subject, data, timeout=CHUNK_S)).data
