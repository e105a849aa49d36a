"""Every coordination engine against the one suite: the one in memory, and NATS JetStream."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from ollama_distributed.adapters.coordination.memory import MemoryEngine
from ollama_distributed.adapters.coordination.nats.client import NatsCoordination
from ollama_distributed.adapters.coordination.nats.server import NatsServer
from ollama_distributed.testing.coordination_conformance import CHECKS, Subject

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("check", CHECKS)
async def test_memory(check: str) -> None:
    engine = MemoryEngine()
    async with engine.client("one") as one, engine.client("two") as two:
        await CHECKS[check](Subject(one=one, two=two))


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[NatsServer]:
    async with NatsServer(tmp_path_factory.mktemp("nats") / "n", name="n1") as running:
        yield running


@pytest.mark.integration
@pytest.mark.parametrize("check", CHECKS)
async def test_nats(check: str, server: NatsServer) -> None:
    async with (
        NatsCoordination(server.address, name="one", bucket=check) as one,
        NatsCoordination(server.address, name="two", bucket=check) as two,
    ):
        await CHECKS[check](Subject(one=one, two=two))
