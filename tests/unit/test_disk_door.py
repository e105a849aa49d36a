"""What other nodes may ask of this node's disk."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from ollama_distributed.adapters.peers.disks import EVICT, open_disk_door
from ollama_distributed.base.errors import Forbidden
from ollama_distributed.base.ids import NodeId, NodeRole
from ollama_distributed.cluster.identity.ca import Peer
from ollama_distributed.distribution.disk_ports import EvictHere, Freed


class Door:
    def __init__(self) -> None:
        self.handlers: dict[str, Callable[[Peer, Any], Awaitable[Any]]] = {}

    def add(self, route: str, handler: Callable[[Peer, Any], Awaitable[Any]], body: type[Any]) -> None:
        del body
        self.handlers[route] = handler


def peer(role: NodeRole) -> Peer:
    return Peer(cluster="c1", node=NodeId("n2"), role=role, key_sha256="", issued_at=0.0, expires_at=1.0)


@pytest.mark.parametrize(
    ("role", "last_copy", "goes"),
    [("server", True, True), ("server", False, True), ("node", False, True), ("node", True, False)],
)
def test_a_mere_node_lets_no_last_copy_go(role: NodeRole, last_copy: bool, goes: bool) -> None:
    """Whoever broke into one could have every model deleted that is on one disk only."""
    asked: list[tuple[str, bool]] = []

    async def evict(model: str, *, last_copy: bool) -> int:
        asked.append((model, last_copy))
        return 7

    door: Any = Door()
    own: Any = SimpleNamespace(evictions=SimpleNamespace(evict=evict))
    open_disk_door(door, own)

    async def ask() -> Freed:
        freed: Freed = await door.handlers[EVICT](peer(role), EvictHere(model="m", last_copy=last_copy))
        return freed

    if goes:
        assert asyncio.run(ask()) == Freed(bytes=7)
        assert asked == [("m", last_copy)]
    else:
        with pytest.raises(Forbidden, match="server"):
            asyncio.run(ask())
        assert not asked
