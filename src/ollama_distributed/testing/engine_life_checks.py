"""Checks of engines: loading, unloading, death; cancel and pause. Part of `engine_conformance`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from ollama_distributed.base.errors import LoadFailed, OllamaDistributedError, RunnerDied
from ollama_distributed.serving.ports import (
    LoadPlan,
    Runner,
    Tokens,
)
from ollama_distributed.testing.engine_subject import (
    CANCEL_S,
    QUIET_S,
    NotApplicable,
    Subject,
    answer,
    completion,
    load,
    model_of,
    need,
    slots_free,
    until,
)
from ollama_distributed.testing.recording import DEADLINE_S, Recording

# ── life ────────────────────────────────────────────────────────────────────────────


async def check_load_and_unload(subject: Subject) -> None:
    """A loaded runner is healthy and says what it is; unload is idempotent and final."""
    assert subject.engine.can_load(subject.writer)
    plan = LoadPlan(slots=2, context_tokens=2048, threads=1)
    progress: list[float] = []
    runner = await subject.engine.load(subject.writer, plan, progress.append)
    exits: list[OllamaDistributedError | None] = []
    runner.on_exit(exits.append)
    assert progress == sorted(progress)
    assert all(0 <= share <= 1 for share in progress)
    assert runner.plan == plan
    assert runner.info.name == subject.engine.info.name
    assert runner.info.name
    assert runner.info.version
    assert runner.memory_bytes >= 0
    await until(runner.healthy, CANCEL_S, "it was not healthy")
    await runner.unload()
    await runner.unload()
    assert exits == [None]
    assert not await runner.healthy()
    refused = Recording()
    runner.generate(completion(subject.prompt), refused)
    await refused.failed()
    late: list[OllamaDistributedError | None] = []
    runner.on_exit(late.append)
    await asyncio.sleep(0)
    assert late == [None]


async def check_load_again(subject: Subject) -> None:
    """Loading after unloading works, and two runners live side by side."""
    first = await load(subject)
    await first.unload()
    one, other = await asyncio.gather(load(subject), load(subject))
    for runner in (one, other):
        assert (await answer(runner, completion(subject.prompt))).text == subject.answer


async def check_close(subject: Subject) -> None:
    """Closing the engine ends its runners; twice is as good as once."""
    runner = await load(subject)
    gone: list[object] = []
    runner.on_exit(gone.append)
    await subject.engine.close()
    await subject.engine.close()
    assert gone == [None]


async def check_broken_model(subject: Subject) -> None:
    """A model that cannot be loaded is a `LoadFailed` with a reason, and nothing is left."""
    broken = model_of(subject.broken, "broken model")
    reason = ""
    try:
        await load(subject, broken)
    except LoadFailed as exc:
        reason = exc.message
    assert reason, "it was loaded, or gave no reason"
    assert (await answer(await load(subject), completion(subject.prompt))).text == subject.answer


async def check_death(subject: Subject) -> None:
    """A killed runner fails each running call with `RunnerDied`, says so once, and can be loaded again."""
    if subject.kill is None:
        raise NotApplicable("the runner cannot be killed from here")
    await _dies(subject, subject.kill)


async def check_kill(subject: Subject) -> None:
    """`Runner.kill` is a death like any other, and its reason is told."""
    error = await _dies(subject, lambda runner: runner.kill("the reason"))
    assert "the reason" in error.message


async def _dies(subject: Subject, kill: Callable[[Runner], None]) -> RunnerDied:
    runner = await load(subject, subject.endless)
    exits: list[OllamaDistributedError | None] = []
    runner.on_exit(exits.append)
    running = [Recording(), Recording()]
    for recording in running:
        runner.generate(completion(subject.endless_prompt), recording)
    for recording in running:
        await recording.pieces(2)
    kill(runner)
    for recording in running:
        assert isinstance((await recording.failed()).error, RunnerDied)

    async def said() -> bool:
        return bool(exits)

    await until(said, DEADLINE_S, "on_exit was not called")
    assert len(exits) == 1
    error = exits[0]
    assert isinstance(error, RunnerDied)
    assert not await runner.healthy()
    await runner.unload()
    assert len(exits) == 1
    await (await load(subject)).unload()
    return error


async def check_unload_while_running(subject: Subject) -> None:
    """Unloading ends a running answer with exactly one failure."""
    need(subject, "lifecycle")
    runner = await load(subject, subject.endless)
    recording = Recording()
    runner.generate(completion(subject.endless_prompt), recording)
    await recording.pieces(1)
    await runner.unload()
    await recording.failed()


# ── many at once, cancel, pause ─────────────────────────────────────────────────────


async def check_streams_do_not_mix(subject: Subject) -> None:
    """Answers at once are each whole: more of them than slots, each from another position."""
    runner = await load(subject, slots=2)
    recordings = [Recording() for _ in range(5)]
    if "ids" not in subject.abilities:
        for recording in recordings:
            runner.generate(completion(subject.prompt), recording)
        for recording in recordings:
            await recording.done()
            assert recording.text == subject.answer
        return
    ids = (await answer(runner, completion(subject.prompt))).ids
    rests = [ids[len(ids) * i // 6 :] for i in range(1, 6)]
    for rest, recording in zip(rests, recordings, strict=True):
        runner.generate(completion((subject.prompt, tuple(ids[: -len(rest)]))), recording)
    for rest, recording in zip(rests, recordings, strict=True):
        await recording.done()
        assert recording.ids == rest


async def check_cancel(subject: Subject) -> None:
    """Nothing comes after a cancel, and the slot is free for the next answer."""
    runner = await load(subject, subject.endless, slots=1)
    recording = Recording()
    generation = runner.generate(completion(subject.endless_prompt), recording)
    await recording.pieces(3)
    generation.cancel()
    recording.cancelled = True
    generation.cancel()
    if "metrics" in subject.abilities:
        await slots_free(runner)
    following = await answer(runner, completion(subject.endless_prompt, num_predict=4))
    assert following.events
    assert not recording.breaches, recording.breaches


async def check_cancel_at_once(subject: Subject) -> None:
    """A cancel before anything came, and of an answer that waits for a slot."""
    runner = await load(subject, subject.endless, slots=1)
    busy, waiting, never = Recording(), Recording(), Recording()
    generation = runner.generate(completion(subject.endless_prompt), never)
    generation.cancel()
    never.cancelled = True
    first = runner.generate(completion(subject.endless_prompt), busy)
    await busy.pieces(1)
    second = runner.generate(completion(subject.endless_prompt), waiting)
    second.cancel()
    waiting.cancelled = True
    seen = len(busy.events)
    await busy.pieces(seen + 3)
    first.cancel()
    busy.cancelled = True
    if "metrics" in subject.abilities:
        await slots_free(runner)
    assert never.events == []
    assert waiting.events == []
    assert not busy.breaches


async def check_cancel_after_the_end(subject: Subject) -> None:
    """All methods of an ended answer do nothing."""
    runner = await load(subject)
    recording = Recording()
    generation = runner.generate(completion(subject.prompt), recording)
    await recording.done()
    generation.pause()
    generation.resume()
    generation.cancel()
    assert recording.text == subject.answer


async def check_cancel_inside_the_sink(subject: Subject) -> None:
    """A sink may cancel while it takes an event; that event was the last."""
    runner = await load(subject, subject.endless)
    recording = Recording()
    cancelled = asyncio.Event()

    def sink(event: object) -> None:
        assert isinstance(event, msgspec.Struct)
        recording(event)  # type: ignore[arg-type]  # the engine's own event
        if isinstance(event, Tokens) and not recording.cancelled:
            generation.cancel()
            recording.cancelled = True
            cancelled.set()

    generation = runner.generate(completion(subject.endless_prompt), sink)
    await asyncio.wait_for(cancelled.wait(), DEADLINE_S)
    await recording.quiet(QUIET_S)
    assert not recording.breaches, recording.breaches


async def check_pause(subject: Subject) -> None:
    """A paused stream stands still after what was under way, and goes on where it stood."""
    runner = await load(subject, subject.endless)
    recording = Recording()
    generation = runner.generate(completion(subject.endless_prompt), recording)
    await recording.pieces(2)
    generation.pause()
    await recording.quiet(QUIET_S)
    seen = len(recording.events)
    generation.resume()
    await recording.pieces(seen + 2)
    generation.cancel()
    recording.cancelled = True
    assert not recording.breaches, recording.breaches
