"""What a node gives up while its own memory is short: the steps, and what each means on the wire."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.access_world import exchanged
from tests.gateway_bench import HELLO, gateway, request_bytes, serving, until
from tests.limits import SOON_S
from tests.unit.test_runner_fields import BODIES

from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import RequestId
from ollama_distributed.base.inference import InferenceRequest, TextPrompt
from ollama_distributed.gateway.connections import Watch
from ollama_distributed.gateway.dialects.table import HOT_ROUTES
from ollama_distributed.gateway.limits import Limits
from ollama_distributed.gateway.overload import BEGINS, CALM, Overload, Step, step_of
from ollama_distributed.node.memory import MemoryWatch, bound_of, own_memory_bytes, trim
from ollama_distributed.streams.kept import CutAndComplete
from ollama_distributed.testing.inference import ScriptedInference

GIB = 1 << 30
GEN = {"model": "m", "prompt": "p", "stream": False}


def at(share: float) -> Overload:
    overload = Overload()
    overload.measured(int(share * GIB), GIB)
    return overload


# ── the steps ───────────────────────────────────────────────────────────────────────


@given(st.floats(0, 2), st.floats(0, 2), st.sampled_from(Step))
def test_more_memory_never_gives_up_less(one: float, other: float, before: Step) -> None:
    low, high = sorted((one, other))
    assert step_of(low, before) <= step_of(high, before)


@given(st.floats(0, 2), st.sampled_from(Step))
def test_a_step_that_began_goes_on_a_little_below(share: float, before: Step) -> None:
    step = step_of(share, before)
    assert step_of(share, step) == step, "the same figure moves nothing"
    for one, begins in BEGINS.items():
        if share >= begins:
            assert step >= one
        if share < begins - CALM:
            assert step < one


def test_steps_are_counted_as_they_begin() -> None:
    overload = Overload()
    for share in (0.5, 0.85, 0.92, 0.99, 0.92, 0.5, 0.96):
        overload.measured(int(share * GIB), GIB)
    figures = overload.figures()
    assert figures.begun == {Step.DROPPING: 2, Step.REFUSING: 2, Step.CLOSING: 2}
    assert (figures.step, overload.told) == (Step.DROPPING, "dropping")


# ── on the wire ─────────────────────────────────────────────────────────────────────


@pytest.mark.anyio
async def test_new_work_is_refused_in_each_dialect_s_words() -> None:
    inference = ScriptedInference(HELLO)
    app = gateway(inference, overload=at(0.92))
    waits = set()
    for route in HOT_ROUTES:
        status, headers, body = await exchanged(
            app, "POST", route.path, {}, body=json.dumps(BODIES[route.path]).encode()
        )
        assert status == 503, route.path
        waits.add(int(headers["retry-after"]))
        assert b"short of memory" in body
        if route.path.startswith("/v1/messages"):
            assert b"overloaded_error" in body
        elif route.path.startswith("/api/v1"):
            assert b'"code":"overloaded"' in body
    assert len(waits) > 1, "who was refused together does not come back together"
    assert not inference.requests
    status, _, body = await exchanged(app, "GET", "/readyz", {})
    assert (status, b'"overloaded"' in body) == (503, True)
    assert (await exchanged(app, "GET", "/healthz", {}))[0] == 200
    status, _, body = await exchanged(app, "GET", "/metrics", {})
    assert status == 200, "who mends it can look"
    assert f"overload_refused_total {len(HOT_ROUTES)}".encode() in body


@pytest.mark.anyio
@pytest.mark.parametrize("length", [True, False])
async def test_a_large_body_is_not_waited_for(length: bool) -> None:
    """Nor one that does not say how large it is."""
    inference = ScriptedInference(HELLO)
    body = json.dumps({"model": "m", "prompt": "x" * 200_000}).encode()
    headers = {"content-length": str(len(body))} if length else {}
    app = gateway(inference, overload=at(0.92))
    status, _, _ = await exchanged(app, "POST", "/api/generate", headers, body=body)
    assert status == 503
    assert not inference.requests


@pytest.mark.anyio
async def test_what_was_cut_off_may_still_be_taken_up() -> None:
    inference = ScriptedInference(HELLO)
    app = gateway(inference, overload=at(0.92))
    status, _, _ = await exchanged(
        app,
        "POST",
        "/api/generate",
        {"x-ollama-resume-at": "0", "x-request-id": "r1"},
        body=b'{"model":"m","prompt":"p"}',
    )
    assert status == 200


@pytest.mark.anyio
@pytest.mark.parametrize("adapter", ["asgi", "fast"])
@pytest.mark.parametrize(("method", "path"), [("POST", "/api/generate"), ("GET", "/api/version")])
async def test_a_connection_ends_with_its_answer(adapter: str, method: str, path: str) -> None:
    overload = Overload()
    limits = Limits(idle_s=2 * SOON_S)
    app = gateway(ScriptedInference(HELLO), limits=limits, overload=overload)
    body = json.dumps(GEN).encode() if method == "POST" else b""
    async with serving(app, adapter=adapter, limits=limits) as server:
        async with await server.connect() as client, await server.connect() as idle:
            for one in (client, idle):
                await one.send(request_bytes(method, path, body))
                assert (await one.answer()).headers.get("connection") != "close"
            overload.measured(85, 100)
            await client.send(request_bytes(method, path, body))
            answer = await client.answer()
            assert (answer.status, answer.headers["connection"]) == (200, "close")
            assert await client.closed()
            assert await idle.closed()
        await until(lambda: len(server.watch) == 0, "both are gone")


def test_at_the_last_nobody_comes_from_elsewhere() -> None:
    class Connection:
        loop = asyncio.new_event_loop()

        def check_deadlines(self, now: float) -> None:
            """It has none."""

    overload = Overload()
    watch = Watch(Limits(), overload)
    try:
        assert watch.add(Connection(), "10.0.0.9")
        overload.measured(96, 100)
        assert not watch.add(Connection(), "10.0.0.9")
        assert watch.add(Connection(), ""), "who sits at the machine can look"
    finally:
        Connection.loop.close()


# ── who measures ────────────────────────────────────────────────────────────────────


def test_what_the_process_may_take() -> None:
    assert bound_of(0, 64 * GIB) == 16 * GIB
    assert bound_of(0, 2 * GIB) == GIB
    assert bound_of(0, GIB >> 2) == GIB >> 2, "a small container is the bound"
    assert bound_of(512, 64 * GIB) == 512 << 20


def test_the_last_step_drops_what_is_kept_and_comes_before_anything_fails() -> None:
    kept: CutAndComplete[str] = CutAndComplete()
    request = InferenceRequest(
        request_id=RequestId("r1"), identity=Identity("local"), model="m", prompt=TextPrompt(text="p")
    )
    kept.keep(request, "said", 4, 0.0, complete=True)
    figures: Iterator[int] = iter((10, 92, 96, 60))
    watch = MemoryWatch(100, usable_bytes=100 << 20, used=lambda: next(figures) << 20)
    watch.kept = (kept.forget,)
    seen = []
    for _ in range(4):
        watch.look()
        seen.append((watch.overload.told, kept.find(request, 1.0)))
    assert seen == [("", "said"), ("refusing", "said"), ("dropping", None), ("", None)]
    watch.use(50)
    figures = iter((49,))
    watch.look()
    assert watch.overload.told == "dropping"


def test_the_process_s_own_memory() -> None:
    """What is written to counts; `trim` may be asked at any time."""
    before = own_memory_bytes()
    assert before > 1 << 20
    block = bytearray(b"x") * (64 << 20)
    assert own_memory_bytes() > before + len(block) // 2
    del block
    trim()
