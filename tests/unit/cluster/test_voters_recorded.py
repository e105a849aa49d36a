"""The state is told who votes, by whoever gets there first."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from tests.consensus_nodes import cluster

from ollama_distributed.base.errors import Conflict
from ollama_distributed.base.ids import NodeId
from ollama_distributed.node.cluster.voters import record_voters
from ollama_distributed.state.changes import SetVoters
from ollama_distributed.testing.virtual_time import VirtualLoop

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": VirtualLoop}


async def test_two_who_say_the_same_do_not_meet_as_a_conflict() -> None:
    async with cluster("a", "b") as two:
        leader = await two.leader()
        await two.advertise()
        link: Any = SimpleNamespace(mirror=leader.mirror, consensus=leader.consensus)
        bus: Any = SimpleNamespace(voters=(NodeId("a"),))
        await two.agree()
        async with anyio.create_task_group() as group:
            for _ in range(2):
                group.start_soon(lambda: record_voters(link, bus, actor="x"))
        assert leader.mirror.state.voters is not None
        assert leader.mirror.state.voters.nodes == ("a",)


async def test_who_says_something_else_is_told() -> None:
    async with cluster("a", "b") as two:
        leader = await two.leader()
        await two.advertise()
        await two.agree()
        other = SetVoters(nodes=(NodeId("b"),), before=())

        class Late:
            """Somebody else is faster, always."""

            async def propose_change(self, change: SetVoters, *, actor: str) -> int:
                if leader.mirror.state.voters is None:
                    await leader.consensus.propose_change(other)
                return await leader.consensus.propose_change(change, actor=actor)

        link: Any = SimpleNamespace(mirror=leader.mirror, consensus=Late())
        with pytest.raises(Conflict, match="the voters are b"):
            await record_voters(link, SimpleNamespace(voters=(NodeId("a"),)), actor="x")  # type: ignore[arg-type]
