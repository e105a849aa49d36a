"""Transfers that nobody waits for: whatever happens to one, it ends."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import anyio
import pytest
from tests.limits import SOON_S

from ollama_distributed.base.clock import SystemClock
from ollama_distributed.base.errors import Unavailable
from ollama_distributed.distribution.downloads import Downloads
from ollama_distributed.distribution.ports import Status


@pytest.mark.parametrize(
    ("failure", "code"), [(Unavailable("away"), "unavailable"), (KeyError("a defect"), "internal")]
)
async def test_one_that_breaks_is_over_and_may_be_begun_again(failure: Exception, code: str) -> None:
    tries = 0

    async def pull(_: str) -> AsyncGenerator[Status]:
        nonlocal tries
        tries += 1
        yield Status(status="pulling manifest")
        if tries == 1:
            raise failure

    async with Downloads(pull, lambda _: None, SystemClock()) as downloads:
        with anyio.fail_after(SOON_S):
            broken = await downloads.ended(downloads.start("m").id)
            assert (broken.state, broken.code) == ("failed", code)
            assert "defect" not in broken.error
            again = await downloads.ended(downloads.start("m").id)
        assert again.id != broken.id
        assert (again.state, again.error) == ("done", "")
