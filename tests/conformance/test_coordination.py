"""Every coordination engine against the one suite: the one in memory, and NATS JetStream."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from tests.trust import Trust
from tests.voters import ready, voters

from ollama_distributed.adapters.coordination.memory import MemoryEngine
from ollama_distributed.adapters.coordination.nats.client import NatsCoordination
from ollama_distributed.adapters.coordination.nats.session import Address
from ollama_distributed.adapters.coordination.nats.streams import Stream
from ollama_distributed.testing.coordination_conformance import CHECKS, Subject

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("check", CHECKS)
async def test_memory(check: str) -> None:
    engine = MemoryEngine()
    async with engine.client("one") as one, engine.client("two") as two:
        await CHECKS[check](Subject(one=one, two=two))


@pytest.fixture(scope="module")
async def standalone(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Address, Address]]:
    trust = Trust(tmp_path_factory.mktemp("nats"))
    async with trust.server("n1") as server:
        yield trust.address(server, node="one"), trust.address(server, node="two")


@pytest.mark.integration
@pytest.mark.parametrize("check", CHECKS)
async def test_nats(check: str, standalone: tuple[Address, Address]) -> None:
    first, second = standalone
    async with (
        NatsCoordination(first, name="one", bucket=check, create=True) as one,
        NatsCoordination(second, name="two", bucket=check, create=True) as two,
    ):
        await CHECKS[check](Subject(one=one, two=two))


@pytest.fixture(scope="module")
async def three(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Address, Address]]:
    async with voters(tmp_path_factory.mktemp("three"), size=3) as made:
        yield made.address("one"), made.address("two")


@pytest.mark.integration
@pytest.mark.parametrize("check", CHECKS)
async def test_nats_of_three_servers(check: str, three: tuple[Address, Address]) -> None:
    first, second = three
    await Stream(first, name="one", bucket=check).create(replicas=3)
    async with (
        NatsCoordination(first, name="one", bucket=check) as one,
        NatsCoordination(second, name="two", bucket=check) as two,
    ):
        await ready(one, two)
        await CHECKS[check](Subject(one=one, two=two))
