"""Keys and policies as the replicated state has them, and when keys were used last.

A change is a proposal to the leader, from servers only. Uses are told between nodes in batches,
off the path of requests; they are kept over a restart, and the last minute of them may be lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import msgspec
import structlog

from ollama_distributed.base.errors import DiskFull
from ollama_distributed.base.ids import KeyId
from ollama_distributed.base.policies import Policy
from ollama_distributed.node.data_dir import read_file, write_file
from ollama_distributed.state.access import MAX_KEYS, AccessChange, KeyEntry

if TYPE_CHECKING:
    from ollama_distributed.cluster.network import Message, NetworkManager
    from ollama_distributed.node.cluster.keeper import Keeper

TELL_S = 10.0
KEEP_S = 60.0
AT_ONCE = 2_000
"""Uses in one message: 50 KB."""
AHEAD_S = 60.0
"""No use is believed that is later than this from now: clocks differ, and a node may lie."""
NOT_KEPT = "key_uses.not_kept"
UNREADABLE = "key_uses.unreadable"

log = structlog.get_logger("cluster.key_uses")


class ClusterBook:
    """Implements `access.desk.Book`."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper

    def keys(self) -> Mapping[KeyId, KeyEntry]:
        life = self._keeper.life
        if life is None:
            return {}
        removed = life.roster.removed
        return {
            id_: entry for id_, entry in life.state.keys.items() if not entry.node or not removed(entry.node)
        }

    def policies(self) -> Mapping[str, Policy]:
        return self._keeper.state.policies

    async def change(self, change: AccessChange, *, actor: str) -> None:
        life, link = await self._keeper.linked()
        life.need_server()
        revision = await link.consensus.propose_change(change, actor=actor)
        await link.mirror.reach(revision)


class _Kept(msgspec.Struct, frozen=True):
    """`key-uses.json`."""

    uses: dict[KeyId, float]


_uses = msgspec.msgpack.Decoder(dict[KeyId, float])


class KeyUses:
    """`own`: those of this node."""

    def __init__(
        self, data_dir: Path, own: Callable[[], Mapping[KeyId, float]], wall: Callable[[], float]
    ) -> None:
        self._path = data_dir / "key-uses.json"
        self._own = own
        self._wall = wall
        self._told: dict[KeyId, float] = {}
        self._kept_at = 0.0
        kept = read_file(self._path, _Kept)
        self._known: dict[KeyId, float] = dict(kept.uses) if kept is not None else {}

    def last(self, key: KeyId) -> float | None:
        """Seconds since the Unix epoch; None: never, as far as is known."""
        used = max(self._own().get(key, 0.0), self._known.get(key, 0.0))
        return used or None

    async def hear(self, message: Message) -> None:
        try:
            told = _uses.decode(message.body)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            log.warning(UNREADABLE, sender=message.sender)
            return
        latest = self._wall() + AHEAD_S
        for key, at in told.items():
            if at <= latest and (key in self._known or len(self._known) < 2 * MAX_KEYS):
                self._known[key] = max(self._known.get(key, 0.0), at)

    async def step(self, network: NetworkManager) -> None:
        """Tell the others what is new, and keep what is known now and then."""
        await anyio.sleep(TELL_S)
        own = self._own()
        news = {key: at for key, at in own.items() if at > self._told.get(key, 0.0)}
        rows = list(news.items())
        for begin in range(0, len(rows), AT_ONCE):
            batch = dict(rows[begin : begin + AT_ONCE])
            await network.broadcast("key-uses", msgspec.msgpack.encode(batch))
            self._told |= batch
        now = self._wall()
        if news and now - self._kept_at >= KEEP_S:
            self._kept_at = now
            self._known = {
                key: max(own.get(key, 0.0), self._known.get(key, 0.0)) for key in {*self._known, *own}
            }
            try:
                await asyncio.to_thread(write_file, self._path, _Kept(dict(self._known)))
            except DiskFull as failure:
                log.warning(NOT_KEPT, reason=failure.message)
