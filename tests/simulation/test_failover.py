"""An answer whose node is lost goes on at another: a thousand losses in virtual time.

The echo engine stands for the models; serving, router, answers and the decoder are the real
ones. What it says is the same at each replica, so the client must see exactly that, once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.failing_replicas import Heard, Replica, Replicas

from ollama_distributed.base.errors import Unavailable
from ollama_distributed.base.inference import (
    ChatPrompt,
    Failed,
    Finished,
    JsonObject,
    Message,
    Opened,
    Sampling,
    Tool,
)
from ollama_distributed.streams import failover
from ollama_distributed.streams.gaps import LOOK_S, READING_LOOKS, SPEAKING_LOOKS
from ollama_distributed.testing import echo_text
from ollama_distributed.testing.echo import EchoSettings
from ollama_distributed.testing.virtual_time import VirtualClock, VirtualLoop

ANSWER = "Grüße 😀 an alle 👨‍👩‍👧 im Café: <think> is no tag here, STO is no stop. " * 2
TOKENS_PER_S = 50.0


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, object]]:
    return "asyncio", {"loop_factory": VirtualLoop}


@asynccontextmanager
async def replicas(
    count: int = 3, seed: int = 0, *, thinks: bool = False, slots: int = 4, **settings: Any
) -> AsyncIterator[Replicas]:
    given = {"answer": ANSWER, "tokens_per_s": TOKENS_PER_S, **settings}
    made = Replicas(count, EchoSettings(**given), VirtualClock(), seed=seed, thinks=thinks, slots=slots)
    watching = [asyncio.create_task(answers.watch()) for answers in made.answers.values()]
    watching += [asyncio.create_task(router.probe()) for router in made.routers.values()]
    try:
        yield made
    finally:
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
        await made.close()


def once(piece: int, act: Callable[[], None]) -> Callable[[Heard], None]:
    """`act` when so many pieces have come."""

    def on_word(heard: Heard) -> None:
        if heard.pieces == piece:
            act()

    return on_word


def whole(heard: Heard, end: Finished | Failed) -> Finished:
    assert isinstance(end, Finished), end
    assert heard.text == ANSWER
    return end


PIECES = 60
"""Fewer than the answer has."""
TOKENS = echo_text.count_tokens(ANSWER.encode())
THOUGHT = "<think>\nWhat is it that they want?\n</think>\n\n"


@pytest.mark.parametrize("seed", range(10))
async def test_a_thousand_kills(seed: int) -> None:
    """A hundred a seed: the node that answers is killed at a random word, and comes back."""
    gaps: list[float] = []
    async with replicas(seed=seed) as made:
        for turn in range(100):
            at = (
                "abcg"[turn % 4] if turn < 8 else "g"
            )  # three deaths of its runner put a model into quarantine
            killed: list[Replica] = []

            def kill(killed: list[Replica] = killed, at: str = at) -> None:
                one = made.speaking()
                killed.append(one)
                if one.id == at:
                    one.engine.runners[0].kill()  # the gateway's own runner: the node lives
                else:
                    one.kill()

            heard = made.ask(at, once(made.random.randrange(1, PIECES), kill))
            end = whole(heard, await heard.end())
            assert len(killed) == end.moves == len(heard.moved) == 1, turn
            assert end.usage.completion_tokens == TOKENS
            gaps.append(heard.gap_s)
            killed[0].dead = False
    assert max(gaps) <= 1.0


async def test_counts_are_those_of_an_answer_that_lost_nothing() -> None:
    async with replicas() as made:
        calm = made.ask()
        without = whole(calm, await calm.end())
        heard = made.ask(on_word=once(20, lambda: made.speaking().kill()))
        end = whole(heard, await heard.end())
        counts = ("prompt_tokens", "completion_tokens", "reasoning_tokens")
        assert [getattr(end.usage, name) for name in counts] == [
            getattr(without.usage, name) for name in counts
        ]
        assert heard.events[0] == calm.events[0] or isinstance(heard.events[0], Opened)
        assert (end.reason, end.moves, without.moves) == ("stop", 1, 0)


async def test_it_goes_on_through_the_loss_of_all_but_one() -> None:
    async with replicas(3) as made:

        def kill(heard: Heard) -> None:
            if heard.pieces in (10, 30):
                made.speaking().kill()

        heard = made.ask(on_word=kill)
        assert whole(heard, await heard.end()).moves == 2


async def test_the_limit_of_tokens_is_for_all_parts_together() -> None:
    async with replicas() as made:
        for limit in (20, 21, 22):  # the last word before the loss is the last one allowed
            heard = made.ask(
                on_word=once(20, lambda: made.speaking().kill()), sampling=Sampling(num_predict=limit)
            )
            end = await heard.end()
            assert isinstance(end, Finished)
            assert (end.reason, end.usage.completion_tokens) == ("length", limit)
            assert ANSWER.startswith(heard.text)
            for replica in made.all.values():
                replica.dead = False


@pytest.mark.parametrize("piece", range(1, 16))
async def test_withheld_text_survives(piece: int) -> None:
    """A stop sequence, a tag and a character may be half out when the node is lost."""
    said = THOUGHT + "It is 😀 what it is.STOP and no more"
    async with replicas(answer=said, thinks=True) as made:
        tokens = 0

        def kill(heard: Heard) -> None:
            nonlocal tokens
            tokens += 1
            if tokens == piece:
                made.speaking().kill()

        heard = made.ask(on_word=kill, sampling=Sampling(stop=("STOP",)))
        end = await heard.end()
        assert isinstance(end, Finished)
        assert (end.reason, end.stop_sequence, end.moves) == ("stop", "STOP", 1)
        assert (heard.thinking, heard.text) == ("What is it that they want?\n", "It is 😀 what it is.")


# ── what hangs ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(16))
async def test_a_node_that_hangs_is_left_and_says_nothing_when_it_wakes(seed: int) -> None:
    async with replicas(seed=seed) as made:
        hung: list[Replica] = []

        def act(heard: Heard) -> None:
            if heard.pieces == 5 + 3 * seed:
                hung.append(made.speaking())
                hung[0].hang()
            if heard.pieces == 8 + 3 * seed:
                hung[0].wake()  # in the middle of what the other one says

        heard = made.ask(on_word=act)
        assert whole(heard, await heard.end()).moves == 1
        assert SPEAKING_LOOKS * LOOK_S <= heard.gap_s <= 3.0
        assert not hung[0].hangs


async def test_with_nowhere_to_go_it_waits() -> None:
    async with replicas(1) as made:
        heard = made.ask(on_word=once(10, made["a"].hang))
        await asyncio.sleep(30.0)
        assert heard.pieces == 10
        made["a"].wake()
        assert whole(heard, await heard.end()).moves == 0


async def test_a_client_that_reads_slowly_is_no_stall() -> None:
    async with replicas() as made:
        heard = made.ask(on_word=once(10, lambda: heard.generation.pause()))
        await asyncio.sleep(60.0)
        heard.generation.resume()
        assert whole(heard, await heard.end()).moves == 0


async def test_a_model_that_is_slow_everywhere_is_moved_once_and_then_known() -> None:
    async with replicas(tokens_per_s=0.25, answer="so slow a model") as made:
        heard = made.ask()
        end = await heard.end()
        assert isinstance(end, Finished)
        assert (heard.text, end.moves) == ("so slow a model", 1)
        heard = made.ask()
        end = await heard.end()
        assert isinstance(end, Finished)
        assert end.moves == 0


async def test_a_node_that_hangs_while_it_reads_the_prompt_is_left_too() -> None:
    async with replicas(tokens_per_s=1.0, answer="after a while") as made:
        heard = made.ask()
        await asyncio.sleep(0.5)
        made.speaking().hang()
        began = asyncio.get_running_loop().time()
        end = await heard.end()
        assert isinstance(end, Finished)
        assert (heard.text, end.moves) == ("after a while", 1)
        assert asyncio.get_running_loop().time() - began > READING_LOOKS * LOOK_S


# ── who failed is left alone, and comes back ────────────────────────────────────────


async def served(made: Replicas, asked: int) -> dict[str, int]:
    """Who answered how many."""
    by = dict.fromkeys("abc", 0)
    for _ in range(asked):
        heard = made.ask()
        assert isinstance(await heard.end(), Finished)
        opened = heard.events[0]
        assert isinstance(opened, Opened)
        by[opened.node.lower()] += 1
    return by


async def test_a_replica_that_was_lost_is_shunned_probed_and_comes_back_slowly() -> None:
    async with replicas(answer="short") as made:
        heard = made.ask(on_word=once(1, lambda: lost.append(made.speaking()) or lost[0].kill()))
        lost: list[Replica] = []
        assert isinstance(await heard.end(), Finished)
        name = lost[0].id
        assert (await served(made, 40))[name] == 0
        await asyncio.sleep(20.0)
        assert 3 <= len(lost[0].wires) <= 6, "probes come more and more rarely"
        lost[0].dead = False
        await asyncio.sleep(31.0)  # the next probe passes
        early = (await served(made, 60))[name]
        await asyncio.sleep(10.0)
        late = (await served(made, 60))[name]
        assert early < late
        assert 8 <= late <= 32


async def test_a_replica_that_stalled_is_probed_by_a_word_of_its_model() -> None:
    async with replicas(answer="a short answer") as made:
        hung: list[Replica] = []

        def hang() -> None:
            hung.append(made.speaking())
            hung[0].hang()

        heard = made.ask(on_word=once(1, hang))
        assert isinstance(await heard.end(), Finished)
        assert (await served(made, 30))[hung[0].id] == 0
        hung[0].wake()
        await asyncio.sleep(90.0)
        assert (await served(made, 60))[hung[0].id] > 8


# ── what cannot be continued ────────────────────────────────────────────────────────

BOUND: dict[str, dict[str, Any]] = {
    "grammar": {"format": JsonObject()},
    "tools": {
        "prompt": ChatPrompt(
            messages=(Message(role="user", content="say much without a call " * 5),),
            tools=(Tool(name="weather", parameters={"type": "object"}),),
        )
    },
}


@pytest.mark.parametrize("bound", BOUND)
async def test_a_bound_answer_that_was_seen_ends_in_an_error_that_may_be_retried(bound: str) -> None:
    async with replicas(answer="") as made:
        heard = made.ask(on_word=once(3, lambda: made.speaking().kill()), text="much " * 9, **BOUND[bound])
        end = await heard.end()
        assert isinstance(end, Failed)
        assert isinstance(end.error, Unavailable)
        assert end.error.retryable
        calm = made.ask(text="much " * 9, **BOUND[bound])
        await calm.end()
        assert calm.text.startswith(heard.text)


@pytest.mark.parametrize("bound", BOUND)
async def test_a_bound_answer_that_nobody_saw_begins_again(bound: str) -> None:
    async with replicas(answer="") as made:
        calm = made.ask(text="much " * 9, **BOUND[bound])
        await calm.end()
        heard = made.ask(whole=True, text="much " * 9, **BOUND[bound])
        await asyncio.sleep(0.1)
        assert not heard.pieces
        made.speaking().kill()
        end = await heard.end()
        assert isinstance(end, Finished)
        assert heard.text == calm.text
        assert end.moves == 1


# ── when nobody is there ────────────────────────────────────────────────────────────


async def test_it_waits_for_a_node_that_comes_back() -> None:
    async with replicas(1) as made:
        heard = made.ask(on_word=once(10, made["a"].kill))
        await asyncio.sleep(6.0)
        assert heard.pieces == 10
        made["a"].dead = False
        assert whole(heard, await heard.end()).moves == 1


async def test_it_ends_with_what_was_lost_when_nobody_comes_back() -> None:
    async with replicas(2) as made:

        def kill(heard: Heard) -> None:
            if heard.pieces in (10, 20):
                made.speaking().kill()

        heard = made.ask(on_word=kill)
        began = asyncio.get_running_loop().time()
        end = await heard.end()
        assert isinstance(end, Failed)
        assert "closed the connection" in end.error.message
        assert asyncio.get_running_loop().time() - began < failover.PATIENCE_S + 5.0
        assert ANSWER.startswith(heard.text)


async def test_a_node_with_another_model_of_that_name_does_not_go_on() -> None:
    async with replicas(2) as made:
        made.holds_another("b")
        heard = made.ask(on_word=once(10, lambda: made["a"].kill()))
        if isinstance(end := await heard.end(), Finished):
            assert end.moves == 0  # b answered from the start
        else:
            assert ANSWER.startswith(heard.text)


async def test_the_client_may_go_while_the_answer_looks_for_a_place() -> None:
    async with replicas(1) as made:
        heard = made.ask(on_word=once(10, made["a"].kill))
        await asyncio.sleep(1.0)
        heard.generation.cancel()
        made["a"].dead = False
        await asyncio.sleep(30.0)
        assert heard.pieces == 10
        assert not made["a"].serving.loaded()[0].slots_busy


async def test_all_that_are_lost_together_go_on_in_turn() -> None:
    """With more of them than may begin again at once, and than there are slots."""
    async with replicas(3, slots=40) as made:
        for name in "bc":
            made[name].dead = True
        together = [made.ask(text=f"number {i}") for i in range(40)]
        await asyncio.sleep(0.5)
        assert all(heard.pieces for heard in together)
        for name in "bc":
            made[name].dead = False
        made["a"].kill()
        await asyncio.sleep(0.1)
        began = [len(made[name].serving._jobs) for name in "bc"]
        assert 0 < sum(began) <= 2 * failover.BURST
        for heard in together:
            assert whole(heard, await heard.end()).moves == 1
