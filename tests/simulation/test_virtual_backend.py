"""Async tests in virtual time: the loop as anyio's backend."""

from __future__ import annotations

import anyio
import pytest

from ollama_distributed.testing.virtual_time import VirtualLoop


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, object]]:
    return "asyncio", {"loop_factory": VirtualLoop}


async def test_an_hour_passes_at_once() -> None:
    before = anyio.current_time()
    await anyio.sleep(3600)
    assert anyio.current_time() == pytest.approx(before + 3600)
