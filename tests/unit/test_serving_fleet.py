"""The fleet on the echo engine: loads, turns, evictions, keep-alive, crashes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import anyio
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.limits import SOON_S

from ollama_distributed.admission.bounds import Bounds
from ollama_distributed.admission.service import Admission
from ollama_distributed.base.clock import SystemClock
from ollama_distributed.base.errors import (
    DeadlineExceeded,
    LoadFailed,
    NoCapacity,
    Quarantined,
    QueueFull,
    RunnerDied,
    Unavailable,
)
from ollama_distributed.base.inference import Queued
from ollama_distributed.base.priority import PRIORITIES, Priority
from ollama_distributed.base.queue import Ask
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.serving.fleet import Fleet
from ollama_distributed.serving.options import Shape
from ollama_distributed.serving.ports import LoadPlan
from ollama_distributed.serving.queues import Fifo, Waiting
from ollama_distributed.serving.residents import Lease, load_key
from ollama_distributed.serving.settings import ServingSettings
from ollama_distributed.testing.echo import EchoEngine, EchoRunner, EchoSettings, echo_model

MIB = 1 << 20
SHAPE = Shape(context_tokens=4096, slots=2)


class FixedMachine:
    def cores(self) -> int:
        return 8

    def memory_available_bytes(self) -> int:
        return 1000 * MIB


def hundred_mib(spec: ModelSpec, plan: LoadPlan) -> int:
    return 90 * MIB + plan.slots * 5 * MIB


@asynccontextmanager
async def running(
    engine: EchoEngine | None = None,
    *,
    estimate: Callable[[ModelSpec, LoadPlan], int] = hundred_mib,
    fifo: bool = False,
    **settings: object,
) -> AsyncIterator[tuple[Fleet, EchoEngine]]:
    engine = engine or EchoEngine()
    settings = {"memory_limit_bytes": 1000 * MIB, **settings}
    made = ServingSettings(**settings)  # type: ignore[arg-type]
    queue: Waiting = Fifo(made.max_queue) if fifo else Admission(SystemClock(), Bounds(total=made.max_queue))
    fleet = Fleet([engine], FixedMachine(), SystemClock(), estimate, made, queue)
    try:
        yield fleet, engine
    finally:
        fleet.refuse_new()
        await fleet.unload_all()
        assert engine.runners == []


async def within(fleet: Fleet, condition: Callable[[], bool]) -> None:
    with anyio.fail_after(SOON_S):
        await fleet.wait_until(condition)


async def soon(work: Awaitable[Lease]) -> Lease:
    with anyio.fail_after(SOON_S):
        return await work


def asked(
    fleet: Fleet, name: str, keep_alive_s: float | None = None, shape: Shape = SHAPE
) -> asyncio.Task[Lease]:
    return asyncio.ensure_future(fleet.acquire(echo_model(name), shape, keep_alive_s))


async def turn() -> None:
    """Let every task that can run do so, a few times over."""
    for _ in range(20):
        await asyncio.sleep(0)


def names(fleet: Fleet) -> list[str]:
    return sorted(r.spec.display for r in fleet.residents)


async def test_equal_loads_share_one_runner_and_slots_are_first_come_first_served() -> None:
    async with running(EchoEngine({"load_s": 0.01})) as (fleet, engine):
        tasks = [asked(fleet, "a") for _ in range(5)]
        first, second = await soon(tasks[0]), await soon(tasks[1])
        assert engine.loads == 1
        await turn()
        assert [t.done() for t in tasks] == [True, True, False, False, False]
        assert fleet.waiting == 3
        second.release()
        third = await soon(tasks[2])
        await turn()
        assert not tasks[3].done()
        for lease in (first, third):
            lease.release()
            lease.release()
        for task in tasks[3:]:
            (await soon(task)).release()
        assert engine.loads == 1
        assert fleet.residents[0].active == 0


def local(name: str) -> ModelSpec:
    """A model whose runner works on our cores."""
    return msgspec.structs.replace(echo_model(name), remote=None, weights=f"/{name}")


def threads(fleet: Fleet) -> dict[str, int]:
    return {r.spec.display: r.plan.threads for r in fleet.residents}


async def test_runners_that_work_at_once_get_their_share_of_the_cores() -> None:
    async with running() as (fleet, engine):
        a = await soon(fleet.acquire(local("a"), SHAPE, None))
        assert threads(fleet) == {"a": 7}
        b = await soon(fleet.acquire(local("b"), SHAPE, None))
        assert threads(fleet) == {"a": 7, "b": 3}
        # A busy one goes on, and takes more requests: nobody waits for its end.
        (await soon(fleet.acquire(local("a"), SHAPE, None))).release()
        assert engine.loads == 2
        a.release()
        a = await soon(fleet.acquire(local("a"), SHAPE, None))
        assert threads(fleet) == {"a": 3, "b": 3}
        for lease in (a, b):
            lease.release()
        for name in ("a", "b"):
            (await soon(fleet.acquire(local(name), SHAPE, None))).release()
        assert engine.loads == 3


async def test_runners_that_work_in_turn_keep_their_threads() -> None:
    async with running() as (fleet, engine):
        for name in ("a", "b") * 3:
            (await soon(fleet.acquire(local(name), SHAPE, None))).release()
        assert threads(fleet) == {"a": 7, "b": 3}
        assert engine.loads == 2


async def test_threads_that_were_asked_for_and_other_servers_are_let_be() -> None:
    asked_for = Shape(context_tokens=4096, slots=2, threads=8)
    async with running() as (fleet, engine):
        for _ in range(2):
            leases = [
                await soon(fleet.acquire(local("a"), asked_for, None)),
                await soon(fleet.acquire(local("b"), asked_for, None)),
                await soon(fleet.acquire(echo_model("far"), SHAPE, None)),
            ]
            for lease in leases:
                lease.release()
        assert engine.loads == 3
        assert threads(fleet)["a"] == 8


async def test_models_of_other_servers_take_nobodys_place() -> None:
    def local_only(spec: ModelSpec, plan: LoadPlan) -> int:
        return 0 if spec.remote is not None else hundred_mib(spec, plan)

    async with running(estimate=local_only, max_loaded_models=1) as (fleet, engine):
        here = await soon(fleet.acquire(local("here"), SHAPE, None))
        for name in ("far", "away"):
            (await soon(asked(fleet, name))).release()
        assert names(fleet) == ["away", "far", "here"]
        here.release()
        (await soon(fleet.acquire(local("other"), SHAPE, None))).release()
        assert names(fleet) == ["away", "far", "other"]
        assert engine.loads == 4


async def test_one_who_leaves_the_queue_frees_the_place() -> None:
    async with running(max_queue=2) as (fleet, _):
        leases = [await soon(asked(fleet, "a")) for _ in range(2)]
        gone, stays = asked(fleet, "a"), asked(fleet, "a")
        await turn()
        with pytest.raises(
            QueueFull, match=r"server busy, please try again\.  maximum pending requests exceeded"
        ):
            await fleet.acquire(echo_model("a"), SHAPE, None)
        gone.cancel()
        await turn()
        assert fleet.waiting == 1
        leases[0].release()
        (await soon(stays)).release()
        leases[1].release()
        assert fleet.residents[0].active == 0


async def test_one_who_leaves_when_the_turn_comes_gives_it_on() -> None:
    async with running() as (fleet, _):
        leases = [await soon(asked(fleet, "a")) for _ in range(2)]
        gone, next_one = asked(fleet, "a"), asked(fleet, "a")
        await turn()
        leases[0].release()
        gone.cancel()  # the lease is granted, its waiter not yet woken
        (await soon(next_one)).release()
        leases[1].release()
        assert fleet.residents[0].active == 0


class Held(EchoEngine):
    """Loads nothing before it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may = asyncio.Event()

    async def load(self, *args: Any, **options: Any) -> EchoRunner:
        await self.may.wait()
        return await super().load(*args, **options)


async def test_different_models_load_at_once() -> None:
    held = Held()
    async with running(held) as (fleet, engine):
        tasks = [asked(fleet, name) for name in "abc"]
        await turn()
        assert [r.state for r in fleet.residents] == ["loading"] * 3
        held.may.set()
        for task in tasks:
            (await soon(task)).release()
        assert len(engine.runners) == 3


async def test_the_least_recently_used_idle_model_makes_room() -> None:
    async with running(max_loaded_models=2) as (fleet, _):
        for name in "aba":
            (await soon(asked(fleet, name))).release()
        (await soon(asked(fleet, "c"))).release()
        assert names(fleet) == ["a", "c"]


async def test_a_busy_model_is_waited_for_and_its_new_requests_queue_behind() -> None:
    async with running(max_loaded_models=1) as (fleet, engine):
        busy = await soon(asked(fleet, "a"))
        waits, behind = asked(fleet, "b"), asked(fleet, "a")
        await turn()
        # One request of `a` was already waiting, and slots are free: but `b` comes first.
        assert not waits.done()
        assert not behind.done()
        assert names(fleet) == ["a"]
        busy.release()
        (await soon(waits)).release()
        (await soon(behind)).release()
        assert engine.loads == 3


async def test_when_the_one_who_waited_for_room_leaves_the_others_go_on() -> None:
    async with running(max_loaded_models=1) as (fleet, engine):
        busy = await soon(asked(fleet, "a"))
        waits, behind = asked(fleet, "b"), asked(fleet, "a")
        await turn()
        waits.cancel()
        (await soon(behind)).release()
        busy.release()
        assert engine.loads == 1


async def test_other_options_reload_after_those_in_flight() -> None:
    wide = msgspec.structs.replace(SHAPE, context_tokens=8192)
    async with running() as (fleet, engine):
        busy = await soon(asked(fleet, "a"))
        waits = asked(fleet, "a", shape=wide)
        await turn()
        assert not waits.done()
        busy.release()
        lease = await soon(waits)
        assert lease.plan.context_tokens == 8192
        assert engine.loads == 2
        lease.release()


async def test_what_does_not_fit_is_refused_with_what_would() -> None:
    def by_context(spec: ModelSpec, plan: LoadPlan) -> int:
        return plan.context_tokens * plan.slots * MIB

    async with running(estimate=by_context) as (fleet, engine):
        with pytest.raises(
            NoCapacity, match=r"a needs 4096 MiB of memory with 1 slot, this node has 1000 MiB"
        ):
            await fleet.acquire(echo_model("a"), SHAPE, None)
        lease = await soon(asked(fleet, "a", shape=Shape(context_tokens=400, slots=4)))
        assert lease.plan.slots == 2
        lease.release()
        assert (engine.loads, fleet.waiting) == (1, 0)


async def test_memory_makes_room_too() -> None:
    async with running(memory_limit_bytes=250 * MIB) as (fleet, _):
        for name in "abc":
            (await soon(asked(fleet, name))).release()
        assert names(fleet) == ["b", "c"]


@pytest.mark.parametrize("keep_alive_s", [0.0, 0.02])
async def test_keep_alive_ends(keep_alive_s: float) -> None:
    async with running() as (fleet, _):
        lease = await soon(asked(fleet, "a", keep_alive_s))
        await turn()
        assert names(fleet) == ["a"]
        lease.release()
        await within(fleet, lambda: not fleet.residents)


async def test_each_request_renews_the_keep_alive_and_none_leaves_it() -> None:
    async with running() as (fleet, _):
        (await soon(asked(fleet, "a", -1.0))).release()
        (await soon(asked(fleet, "a", None))).release()
        resident = fleet.residents[0]
        assert resident.keep_alive_s == -1.0
        assert resident.expiry is None
        (await soon(asked(fleet, "a", 0.01))).release()
        await within(fleet, lambda: not fleet.residents)


async def test_a_load_that_fails_tells_all_and_three_failures_quarantine() -> None:
    async with running(EchoEngine(EchoSettings(load_s=0.005, crash_on_load=True))) as (fleet, engine):
        for loads in (1, 2, 3):
            tasks = [asked(fleet, "a") for _ in range(3)]
            for task in tasks:
                with pytest.raises(LoadFailed, match="set to fail"):
                    await soon(task)
            assert engine.loads == loads
        with pytest.raises(
            Quarantined, match=r"crashed 3 times .* the last reason: the echo engine is set to fail"
        ):
            await fleet.acquire(echo_model("a"), SHAPE, None)
        assert (engine.loads, fleet.waiting, fleet.residents) == (3, 0, ())
        (held,) = fleet.quarantined()
        assert (held.model, held.reason) == ("a", "the echo engine is set to fail the load of a")
        assert held.left_s > 0


async def test_a_dead_runner_counts_once_and_the_next_request_loads_again() -> None:
    async with running() as (fleet, engine):
        leases = [await soon(asked(fleet, "a")) for _ in range(2)]
        engine.runners[0].kill("why")
        for lease in leases:
            lease.broken(RunnerDied("why"))
        assert fleet.residents == ()
        for _ in range(1, 2):
            (await soon(asked(fleet, "a"))).release()
            engine.runners[0].kill("why")
        # Two deaths, however many requests saw them: not three yet.
        (await soon(asked(fleet, "a"))).release()
        assert engine.loads == 3


async def test_a_load_without_progress_fails() -> None:
    async with running(EchoEngine({"load_s": 30.0}), load_timeout_s=0.02) as (fleet, _):
        with pytest.raises(LoadFailed, match="no progress"):
            await soon(asked(fleet, "a"))


class Defective(EchoEngine):
    """Raises what no engine should."""

    async def load(self, *_: object, **__: object) -> NoReturn:
        raise ZeroDivisionError


async def test_a_defect_of_an_engine_hangs_nobody() -> None:
    async with running(Defective()) as (fleet, _):
        with pytest.raises(LoadFailed, match="see the node's log"):
            await soon(asked(fleet, "a"))


async def test_a_wait_has_a_deadline() -> None:
    async with running(queue_timeout_s=0.01) as (fleet, _):
        leases = [await soon(asked(fleet, "a")) for _ in range(2)]
        with pytest.raises(DeadlineExceeded):
            await soon(asked(fleet, "a"))
        assert fleet.waiting == 0
        for lease in leases:
            lease.release()


async def test_a_busy_model_that_is_to_go_goes_when_it_is_done() -> None:
    async with running() as (fleet, _):
        lease = await soon(asked(fleet, "a", -1.0))
        fleet.expire(fleet.residents[0])
        await turn()
        assert names(fleet) == ["a"]
        lease.release()
        await within(fleet, lambda: not fleet.residents)


def test_names_of_the_same_files_share_a_runner() -> None:
    here = msgspec.structs.replace(echo_model("a"), remote=None, weights="/w")
    alias = msgspec.structs.replace(here, name="b", display="b", digest="other")
    assert load_key(here) == load_key(alias)
    for other in ({"weights": "/v"}, {"adapters": ("/l",)}, {"projectors": ("/l",)}, {"chat_template": "x"}):
        assert load_key(msgspec.structs.replace(here, **other)) != load_key(here)
    assert load_key(echo_model("a")) != load_key(echo_model("b"))


async def test_who_waits_is_told_when_the_node_closes() -> None:
    async with running(EchoEngine({"load_s": 30.0})) as (fleet, _):
        task = asked(fleet, "a")
        await turn()
        fleet.refuse_new()
        with pytest.raises(Unavailable, match="shutting down"):
            await soon(task)
        with pytest.raises(Unavailable, match="shutting down"):
            await fleet.acquire(echo_model("a"), SHAPE, None)


async def test_a_question_without_a_slot_never_waits_for_one() -> None:
    async with running() as (fleet, _):
        leases = [await soon(asked(fleet, "a")) for _ in range(2)]
        waits = asked(fleet, "a")
        await turn()
        question = asyncio.ensure_future(fleet.acquire(echo_model("a"), SHAPE, None, slot=False))
        leases.append(await soon(question))
        assert (fleet.residents[0].active, fleet.residents[0].slots_busy) == (3, 2)
        assert not waits.done()
        for lease in leases:
            lease.release()
        (await soon(waits)).release()


# ── who waits how ───────────────────────────────────────────────────────────────────


def as_class(fleet: Fleet, name: str, priority: Priority, key: str = "k") -> asyncio.Task[Lease]:
    ask = Ask(key=key, priority=priority, most_tokens=100)
    return asyncio.ensure_future(fleet.acquire(echo_model(name), SHAPE, None, ask=ask))


async def test_urgent_requests_go_first_and_a_batch_yields_when_its_answer_ends() -> None:
    async with running() as (fleet, _):
        runs, stays = [await soon(as_class(fleet, "a", "batch")) for _ in range(2)]
        batch, normal, urgent = [as_class(fleet, "a", kind) for kind in reversed(PRIORITIES)]
        await turn()
        assert not any(task.done() for task in (batch, normal, urgent))
        for task in (urgent, normal, batch):
            runs.release()
            runs = await soon(task)
        runs.release()
        stays.release()


async def test_a_model_that_waits_for_room_lets_more_urgent_requests_of_others_pass() -> None:
    async with running(max_loaded_models=1) as (fleet, engine):
        busy = await soon(as_class(fleet, "a", "normal"))
        behind, passes = as_class(fleet, "b", "batch"), as_class(fleet, "a", "interactive")
        (await soon(passes)).release()
        assert not behind.done()
        busy.release()
        (await soon(behind)).release()
        assert engine.loads == 2


async def test_who_waits_is_told_where_it_stands_and_how_that_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ollama_distributed.serving.fleet.TELL_S", 0.005)
    async with running() as (fleet, _):
        leases = [await soon(as_class(fleet, "a", "normal")) for _ in range(2)]
        first = as_class(fleet, "a", "normal")
        await turn()
        places: list[Queued] = []
        moved = asyncio.Event()

        def told(place: Queued) -> None:
            places.append(place)
            if place.position == 1:
                moved.set()

        ask = Ask(key="k", progress=True)
        second = asyncio.ensure_future(fleet.acquire(echo_model("a"), SHAPE, None, ask=ask, told=told))
        await turn()
        leases.pop().release()
        leases.append(await soon(first))
        with anyio.fail_after(SOON_S):
            await moved.wait()
        assert [one.position for one in places] == [2, 1]
        leases.pop().release()
        leases.append(await soon(second))
        for lease in leases:
            lease.release()


async def test_a_request_may_wait_less_long_than_others() -> None:
    async with running() as (fleet, _):
        leases = [await soon(asked(fleet, "a")) for _ in range(2)]
        work = fleet.acquire(echo_model("a"), SHAPE, None, ask=Ask(within_s=0.01))
        with pytest.raises(DeadlineExceeded):
            await soon(work)
        assert fleet.waiting == 0
        for lease in leases:
            lease.release()


# ── any order of events ─────────────────────────────────────────────────────────────


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[str, int]]:
    """Who asks for which model (and how), who leaves, who is done, which runner dies."""
    acts = st.sampled_from(["ask"] * 5 + ["wide", "count", "release", "release", "leave", "crash", "turn"])
    return draw(st.lists(st.tuples(acts, st.integers(0, 7)), max_size=40))


async def live(history: list[tuple[str, int]], engine: EchoEngine, *, fifo: bool) -> None:
    wide = msgspec.structs.replace(SHAPE, context_tokens=8192)
    room = {"memory_limit_bytes": 250 * MIB, "max_loaded_models": 3, "max_queue": 6}
    async with running(engine, fifo=fifo, **room) as (fleet, _):  # type: ignore[arg-type]
        tasks: list[asyncio.Task[Lease]] = []
        leases: list[Lease] = []

        def look() -> None:
            assert sum(r.memory_bytes for r in fleet.residents) <= 250 * MIB
            assert len(fleet.residents) <= 3
            assert 0 <= fleet.waiting <= 6
            for r in fleet.residents:
                assert 0 <= r.slots_busy <= r.plan.slots
                assert r.slots_busy <= r.active
                assert r.state != "unloading" or r.active == 0
            for task in [t for t in tasks if t.done()]:
                tasks.remove(task)
                if not task.cancelled() and task.exception() is None:
                    leases.append(task.result())
                elif not task.cancelled():
                    assert isinstance(task.exception(), QueueFull | Quarantined)

        for act, number in history:
            name, shape = "abcd"[number % 4], wide if act == "wide" else SHAPE
            if act in ("ask", "wide", "count"):
                ask = Ask(key="xyz"[number % 3], priority=PRIORITIES[number % 2], most_tokens=number)
                work = fleet.acquire(
                    echo_model(name), shape, -1.0 if number % 2 else 0.0, slot=act != "count", ask=ask
                )
                tasks.append(asyncio.ensure_future(work))
            elif act == "release" and leases:
                leases.pop(number % len(leases)).release()
            elif act == "leave" and tasks:
                tasks[number % len(tasks)].cancel()
            elif act == "crash" and engine.runners:
                engine.runners[number % len(engine.runners)].kill()
            elif act == "turn":
                await turn()
            look()
            await asyncio.sleep(0)
            look()
        # Whoever is left gets a turn, as long as those who have one give it back.
        with anyio.fail_after(SOON_S):
            while tasks or leases:
                for lease in leases:
                    lease.release()
                leases.clear()
                await asyncio.sleep(0)
                look()
        assert fleet.waiting == 0
        assert all(r.active == r.slots_busy == 0 for r in fleet.residents)


@settings(max_examples=200)
@given(histories(), st.sampled_from([0.0, 0.0002]), st.booleans())
def test_whatever_happens_room_holds_and_all_are_served(
    history: list[tuple[str, int]], load_s: float, fifo: bool
) -> None:
    asyncio.run(live(history, EchoEngine({"load_s": load_s}), fifo=fifo))
