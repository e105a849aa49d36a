"""A call has a last event, whatever goes wrong on the way."""

from __future__ import annotations

import anyio
import pytest
from tests.limits import SOON_S

from ollama_distributed.adapters.engines.call import Call
from ollama_distributed.base.errors import Internal, Invalid
from ollama_distributed.base.tokens import EngineEvent, EngineFailed

pytestmark = pytest.mark.anyio


async def test_a_defect_while_a_call_is_prepared_ends_it() -> None:
    events: list[EngineEvent] = []
    over = anyio.Event()
    call = Call(events.append, lambda _: over.set(), lambda _, __: None, read_error=lambda _, __: Internal())

    async def steps() -> None:
        raise KeyError("prompt")

    call.prepare(steps)
    with anyio.fail_after(SOON_S):
        await over.wait()
    (event,) = events
    assert isinstance(event, EngineFailed)
    assert isinstance(event.error, Internal)


@pytest.mark.parametrize(("error", "told"), [(Invalid("no"), Invalid), (KeyError("prompt"), Internal)])
async def test_a_refusal_at_once_comes_when_the_caller_can_cancel_it(
    error: Exception, told: type[Exception]
) -> None:
    events: list[EngineEvent] = []
    over = anyio.Event()
    call = Call(events.append, lambda _: over.set(), lambda _, __: None, read_error=lambda _, __: Internal())

    def step() -> None:
        raise error

    call.begin(step)
    assert not events
    with anyio.fail_after(SOON_S):
        await over.wait()
    (event,) = events
    assert isinstance(event, EngineFailed)
    assert isinstance(event.error, told)
