"""A node that stops hands answers over before its doors close, however short the drain. In virtual time."""

from __future__ import annotations

import asyncio

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.node import doors
from ollama_distributed.testing.virtual_time import VirtualLoop


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, object]]:
    return "asyncio", {"loop_factory": VirtualLoop}


@given(st.floats(1.0, 3600.0))
def test_a_drain_holds_the_hand_over_and_the_last_words(drain_s: float) -> None:
    answers_end_s, hand_over_s = doors.parting(drain_s)
    last_words_s = drain_s - answers_end_s - hand_over_s
    assert answers_end_s >= 0.0
    assert 0.6 <= hand_over_s <= doors.HAND_OVER_S
    assert 0.3 <= last_words_s <= doors.LAST_WORDS_S + 1e-9


class Listener:
    """A connection whose answer goes on until it hears that another node goes on with it."""

    def __init__(self, open_ones: set[Listener]) -> None:
        self._open = open_ones
        open_ones.add(self)
        self.heard_at: float | None = None

    def shutdown(self) -> None:
        """Its answer runs."""

    def hear(self) -> None:
        self.heard_at = asyncio.get_running_loop().time()
        self._open.discard(self)


@pytest.mark.anyio
@pytest.mark.parametrize("drain_s", [1, 2, 3, 30])
async def test_who_listens_hears_of_it_though_no_node_takes_what_was_said(drain_s: int) -> None:
    loop, stop = asyncio.get_running_loop(), doors.Stop()
    server = doors._Server(  # the order of its shutdown is what is tested
        uvicorn.Config(lambda: None, lifespan="off", log_config=None, timeout_graceful_shutdown=drain_s),
        60.0,
        lambda: None,
        stop,
    )
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    server.servers = []
    open_ones: set[Listener] = set()
    listener = Listener(open_ones)
    server.server_state.connections = open_ones  # type: ignore[assignment]  # asked to shut down, and counted

    async def leave(hand_over_s: float) -> None:
        await asyncio.sleep(hand_over_s)  # nobody took it
        listener.hear()

    stop.leave = leave
    begun = loop.time()
    await server.shutdown()
    assert listener.heard_at is not None
    assert listener.heard_at - begun < drain_s
    assert listener.heard_at - begun >= drain_s - doors.HAND_OVER_S - doors.LAST_WORDS_S
