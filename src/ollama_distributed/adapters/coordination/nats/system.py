"""Administers nats-servers over their own account: health, accounts, who is in the Raft group.

One short connection per question: it works whatever happened to the last one. Servers answer
under their names (`server_name`), from wherever in the cluster they are asked.
"""

from __future__ import annotations

import hashlib
import string
from contextlib import AbstractAsyncContextManager
from typing import Any

import anyio
import msgspec
import nats.errors
from nats.aio.msg import Msg

from ollama_distributed.adapters.coordination.nats.session import Address, Connection, short_connection
from ollama_distributed.adapters.coordination.nats.wire import ApiError
from ollama_distributed.base.errors import Unavailable

ANSWER_S = 2.0
PAUSE_S = 0.05
CLAIMS_UPDATE = "$SYS.REQ.CLAIMS.UPDATE"
_DIGITS = string.digits + string.ascii_uppercase + string.ascii_lowercase
MORE_ANSWERS_S = 0.3
"""After the first server took an account; the others take it within milliseconds (9 ms measured)."""


class Peer(msgspec.Struct, frozen=True):
    """Another server of the Raft group, as the group's leader sees it."""

    name: str
    current: bool = False
    offline: bool = False
    peer: str = ""


class Meta(msgspec.Struct, frozen=True):
    """The group that knows which streams there are. Only its leader knows all of it."""

    leader: str = ""
    cluster_size: int = 0
    replicas: tuple[Peer, ...] = ()

    def has(self, server: str) -> bool:
        """Whether a server of this name belongs to the group. A server that was not heard of since
        the others started is listed without its name ("unknown at this time"), but as its peer."""
        peers = {name for peer in self.replicas for name in (peer.name, peer.peer)}
        return server == self.leader or not peers.isdisjoint((server, peer_id(server)))


def peer_id(server: str) -> str:
    """What a server of this name is called inside the Raft group: nats-server's `getHash`."""
    return "".join(_DIGITS[byte % len(_DIGITS)] for byte in hashlib.sha256(server.encode()).digest()[:8])


class StreamDetail(msgspec.Struct, frozen=True):
    """A replica of a stream as its own server counts it."""

    name: str
    state: StreamCount


class StreamCount(msgspec.Struct, frozen=True):
    messages: int = 0
    last_seq: int = 0
    first_seq: int = 0


class _Account(msgspec.Struct, frozen=True):
    name: str = ""
    stream_detail: tuple[StreamDetail, ...] = ()


class JetStream(msgspec.Struct, frozen=True):
    """What a server says of its own JetStream."""

    meta_cluster: Meta | None = None
    account_details: tuple[_Account, ...] = ()

    def replica(self, stream: str) -> StreamCount | None:
        for account in self.account_details:
            for detail in account.stream_detail:
                if detail.name == stream:
                    return detail.state
        return None


class _Server(msgspec.Struct, frozen=True):
    name: str = ""


class _Answer(msgspec.Struct, frozen=True):
    server: _Server = _Server()
    data: msgspec.Raw = msgspec.Raw(b"{}")
    error: ApiError | None = None
    success: bool = False


class System:
    """The administration of the servers at `address`, whose login is a system user's."""

    def __init__(self, address: Address, *, name: str) -> None:
        self._address = address
        self._name = name

    async def health(self, server: str, *, alone: bool) -> bool:
        """Whether it is ready: standalone, with its store recovered; in a cluster, as far as
        that is possible without the others."""
        options = {} if alone else {"js-enabled-only": True}
        answer = await self._of(server, "HEALTHZ", options)
        status = msgspec.json.decode(answer, type=dict[str, Any]).get("status")
        return bool(status == "ok")

    async def syncs_always(self, server: str) -> bool:
        """Whether it writes through to the disk before it acknowledges."""
        facts = msgspec.json.decode(await self._of(server, "VARZ", {}), type=dict[str, Any])
        return bool(facts.get("jetstream", {}).get("config", {}).get("sync_always"))

    async def jetstream(self, server: str) -> JetStream:
        """
        Raises:
            Unavailable: it does not answer.
        """
        wanted = {"accounts": True, "streams": True, "config": False}
        return msgspec.json.decode(await self._of(server, "JSZ", wanted), type=JetStream)

    async def meta(self) -> Meta:
        """The Raft group as its leader sees it: other servers are in `replicas`.

        Raises:
            Unavailable: nobody answers, or nobody leads.
        """
        answer = msgspec.json.decode(await self.ask("$SYS.REQ.SERVER.PING.JSZ", {}), type=_Answer)
        seen = msgspec.json.decode(answer.data, type=JetStream).meta_cluster
        if seen is None or not seen.leader:
            raise Unavailable("the coordination servers have no leader")
        led = (await self.jetstream(seen.leader)).meta_cluster
        if led is None or led.leader != seen.leader:
            raise Unavailable("the coordination servers are changing their leader")
        return led

    async def voters(self) -> tuple[str, ...]:
        """The servers that vote, by name; one that is away since the others started may be
        listed by words that say so. Whether a certain one votes, `Meta.has` tells.

        Raises:
            Unavailable: nobody answers, or nobody leads.
        """
        meta = await self.meta()
        return tuple(sorted({meta.leader, *(peer.name for peer in meta.replicas)}))

    async def answers(self, server: str) -> bool:
        """Whether a server of this name lives and is connected to the ones that are asked.

        Raises:
            Unavailable: none of them can be asked.
        """
        async with self._connected() as connection:
            body = msgspec.json.encode({"server_name": server, "exact_match": True})
            try:
                await connection.request("$SYS.REQ.SERVER.PING.STATSZ", body, timeout=ANSWER_S)
            except (nats.errors.TimeoutError, nats.errors.NoRespondersError):
                return False
            return True

    async def push_account(self, account: str) -> int:
        """Give all servers a newer JWT of the application's account, with who is revoked; how
        many took it. It replaces theirs only if it was issued later, by whole seconds.

        Raises:
            Unavailable: none took it.
        """
        taken: list[str] = []
        first = anyio.Event()

        async def note(message: Msg) -> None:
            answer = msgspec.json.decode(message.data, type=_Answer)
            if answer.error is None:
                taken.append(answer.server.name)
                first.set()

        async with self._connected() as connection:
            inbox = connection.new_inbox()
            await connection.subscribe(inbox, cb=note)
            await connection.publish(CLAIMS_UPDATE, account.encode(), reply=inbox)
            with anyio.move_on_after(ANSWER_S):
                await first.wait()
                await anyio.sleep(MORE_ANSWERS_S)
        if not taken:
            raise Unavailable("no coordination server took the account")
        return len(taken)

    async def remove(self, peer: str) -> None:
        """Take a server out of the Raft group, by its `peer_id`: its name may have been forgotten.
        Repeat until it is gone from `Meta`.

        Raises:
            Unavailable: refused or not answered; the message says why.
        """
        await self._order("$JS.API.SERVER.REMOVE", {"peer_id": peer})

    async def lead(self, server: str) -> None:
        """Ask the group's leader to hand over to `server`.

        Raises:
            Unavailable: refused or not answered.
        """
        await self._order("$JS.API.META.LEADER.STEPDOWN", {"placement": {"preferred": server}})

    async def _order(self, subject: str, body: dict[str, Any]) -> None:
        answer = msgspec.json.decode(await self.ask(subject, body), type=_Answer)
        if answer.error is not None:
            raise Unavailable(f"{subject} was refused: {answer.error.description}")

    async def _of(self, server: str, question: str, options: dict[str, Any]) -> msgspec.Raw:
        wanted = {"server_name": server, "exact_match": True, **options}
        answer = msgspec.json.decode(await self.ask(f"$SYS.REQ.SERVER.PING.{question}", wanted), type=_Answer)
        if answer.error is not None or answer.server.name != server:
            raise Unavailable(f"the coordination server {server} does not say its {question}")
        return answer.data

    async def ask(self, subject: str, body: dict[str, Any]) -> bytes:
        """
        Raises:
            Unavailable: no server, or no answer.
        """
        async with self._connected() as connection:
            return (await connection.request(subject, msgspec.json.encode(body), timeout=ANSWER_S)).data

    def _connected(self) -> AbstractAsyncContextManager[Connection]:
        return short_connection(self._address, name=self._name)
