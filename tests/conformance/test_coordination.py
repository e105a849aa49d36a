"""Every coordination engine against the one suite: the one in memory, and NATS JetStream."""

from __future__ import annotations

import pytest

from ollama_distributed.adapters.coordination.memory import MemoryEngine
from ollama_distributed.testing.coordination_conformance import CHECKS, Subject

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("check", CHECKS)
async def test_memory(check: str) -> None:
    engine = MemoryEngine()
    async with engine.client("one") as one, engine.client("two") as two:
        await CHECKS[check](Subject(one=one, two=two))
