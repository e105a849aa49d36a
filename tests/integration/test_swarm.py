"""Models that copy themselves: nodes of one process, real stores, real mutual TLS."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.swarm_nodes import swarm

pytestmark = pytest.mark.integration

MIB = 1 << 20


async def test_one_holder_gives_to_three(tmp_path: Path) -> None:
    async with swarm(tmp_path) as nodes:
        a, b, c, d = [await nodes.add(name) for name in "abcd"]
        content = await a.hold("big", 24)
        transfers = await nodes.done(await a.manager.distribute("big"))
        assert [one.state for one in transfers] == ["done"] * 3, transfers
        assert [one.node for one in transfers] == ["b", "c", "d"]
        for node in (b, c, d):
            assert node.content("big") == content
            assert node.staged() == set()
        assert all(one.completed == one.total > 24 * MIB for one in transfers)
        assert all(sum(one.peers.values()) == one.total for one in transfers), "each byte once"
        given = {node.id: node.shelves.sent_bytes / len(content) for node in nodes.all}
        assert sum(given.values()) == pytest.approx(3, abs=0.01)
        assert given["a"] < 2, f"the others passed on what they had: {given}"
