"""A client that lost its connection, or whose gateway died, takes its answer up again. In virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from msgspec.structs import replace
from tests.failing_replicas import Heard, Replicas

from ollama_distributed.base.errors import Conflict, NotFound, Unavailable
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import KeyId, RequestId
from ollama_distributed.base.inference import (
    Failed,
    Finished,
    InferenceRequest,
    JsonObject,
    Sampling,
    Usage,
)
from ollama_distributed.gateway.summary import added
from ollama_distributed.streams.kept import TTL_S, Kept
from ollama_distributed.testing.echo import EchoSettings
from ollama_distributed.testing.virtual_time import VirtualClock, VirtualLoop

ANSWER = "Gr\u00fc\u00dfe \U0001f600 an alle \U0001f468\u200d\U0001f469\u200d\U0001f467 im Caf\u00e9. " * 3


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, object]]:
    return "asyncio", {"loop_factory": VirtualLoop}


@asynccontextmanager
async def replicas(count: int = 3, seed: int = 0, **settings: Any) -> AsyncIterator[Replicas]:
    given = {"answer": ANSWER, "tokens_per_s": 50.0, **settings}
    made = Replicas(count, EchoSettings(**given), VirtualClock(), seed=seed)
    try:
        yield made
    finally:
        await made.close()


async def pieces(heard: Heard, count: int) -> str:
    async with asyncio.timeout(60.0):
        while heard.pieces < count and not heard.ended:
            await asyncio.sleep(0.001)
    return heard.text


def again(made: Replicas, at: str, has: str, **fields: Any) -> Heard:
    return made.ask(at, resume_at=len(has.encode()), **fields)


async def refused(heard: Heard) -> Exception:
    end = await heard.end()
    assert isinstance(end, Failed), end
    assert heard.text == ""
    return end.error


@pytest.mark.parametrize("gateway", ["g", "a", "b"])
@pytest.mark.parametrize("count", [1, 7, 20, 33, 40])
async def test_the_gateway_dies_and_another_one_gives_the_rest(count: int, gateway: str) -> None:
    async with replicas(3, seed=count) as made:
        heard = made.ask("g")
        has = await pieces(heard, count)
        heard.generation.cancel()  # what its node sees when the gateway dies
        made.restart("g")
        rest = again(made, gateway, has)
        end = await rest.end()
        assert isinstance(end, Finished)
        assert has + rest.text == ANSWER
        calm = made.ask("g", request_id=RequestId("other"))
        whole = await calm.end()
        assert isinstance(whole, Finished)
        assert end.usage.completion_tokens == whole.usage.completion_tokens


async def test_the_connection_is_lost_again_and_again() -> None:
    async with replicas(3) as made:
        has, heard, turns = "", made.ask("g"), 0
        while True:
            await pieces(heard, 5)
            has += heard.text
            if heard.ended:
                break
            heard.generation.cancel()
            await asyncio.sleep(0.1)
            heard, turns = again(made, "g", has), turns + 1
        assert turns > 5
        assert has == ANSWER


async def test_what_was_had_of_an_answer_counts_once_however_often_it_is_taken_up() -> None:
    async with replicas(3) as made:
        calm = made.ask("g", request_id=RequestId("other"))
        whole = await calm.end()
        assert isinstance(whole, Finished)
        assert calm.generation.used() == whole.usage
        assert whole.spent is None
        has, heard, counted = "", made.ask("g"), Usage()
        while True:
            await pieces(heard, 5)
            has += heard.text
            if heard.ended:
                break
            heard.generation.cancel()
            counted = added(counted, heard.generation.used())
            await asyncio.sleep(0.1)
            heard = again(made, "g", has)
        end = await heard.end()
        assert isinstance(end, Finished)
        assert end.spent is not None
        counted = added(counted, end.spent)
        assert has == ANSWER
        assert counted.completion_tokens == whole.usage.completion_tokens
        assert counted.prompt_tokens == whole.usage.prompt_tokens


async def test_what_comes_after_a_failover_is_found_too() -> None:
    async with replicas(3) as made:
        heard = made.ask("g", on_word=lambda one: made.speaking().kill() if one.pieces == 10 else None)
        has = await pieces(heard, 30)
        heard.generation.cancel()
        made.restart("g")
        rest = again(made, "g", has)
        assert isinstance(await rest.end(), Finished)
        assert has + rest.text == ANSWER


async def test_an_answer_that_ended_gives_what_the_client_missed() -> None:
    async with replicas(1) as made:
        heard = made.ask("g")
        end = await heard.end()
        assert isinstance(end, Finished)
        rest = again(made, "g", ANSWER[:20])
        late = await rest.end()
        assert isinstance(late, Finished)
        assert rest.text == ANSWER[20:]
        assert late.usage.completion_tokens == end.usage.completion_tokens
        assert late.usage.prompt_tokens == end.usage.prompt_tokens


async def test_a_connection_that_seems_alive_gives_way() -> None:
    async with replicas(2) as made:
        heard = made.ask("g")
        has = await pieces(heard, 10)
        rest = again(made, "g", has)
        end = await heard.end()
        assert isinstance(end, Failed)
        assert isinstance(end.error, Conflict)
        assert isinstance(await rest.end(), Finished)
        assert has + rest.text == ANSWER


async def test_a_gateway_that_stops_hands_its_answers_over() -> None:
    async with replicas(2) as made:
        heard = made.ask("a")  # its own runner: nobody else knows of it
        calm = made.ask("a", text="another", request_id=RequestId("r2"))
        has, other = await pieces(heard, 10), await pieces(calm, 3)
        waiting = [made.ask("a", text=str(i), request_id=RequestId(f"w{i}")) for i in range(9)]
        await made.answers["a"].leave(2.0)
        for one in (*waiting, made.ask("a", request_id=RequestId("late"))):
            assert isinstance(await refused(one), Unavailable)
        for one in (heard, calm):
            end = await one.end()
            assert isinstance(end, Failed)
            assert isinstance(end.error, Unavailable)
        assert not made["a"].speaks
        made["a"].kill()
        made.restart("a")
        rest = again(made, "g", has)
        assert isinstance(await rest.end(), Finished)
        assert has + rest.text == ANSWER
        rest = again(made, "b", other, text="another", request_id=RequestId("r2"))
        assert isinstance(await rest.end(), Finished)
        assert other + rest.text == ANSWER


async def test_who_listens_is_told_though_no_node_takes_what_was_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with replicas(2) as made:
        heard = made.ask("a")
        await pieces(heard, 10)
        monkeypatch.setattr(made, "hand_over", lambda *_: asyncio.Event().wait())
        began = asyncio.get_running_loop().time()
        await made.answers["a"].leave(0.7)
        assert asyncio.get_running_loop().time() - began == pytest.approx(0.7)
        end = await heard.end()
        assert isinstance(end, Failed)
        assert isinstance(end.error, Unavailable)


async def test_only_the_same_request_of_the_same_caller_finds_it() -> None:
    async with replicas(2) as made:
        heard = made.ask("g")
        has = await pieces(heard, 10)
        for other in (
            {"identity": Identity("local", KeyId("other"))},
            {"identity": Identity("admin")},
            {"text": "another prompt"},
            {"request_id": RequestId("r2")},
            {"sampling": Sampling(seed=1)},
        ):
            assert isinstance(await refused(again(made, "g", has, **other)), NotFound)
        assert isinstance(await heard.end(), Finished), "nobody took it away"


async def test_it_is_kept_for_a_while_only() -> None:
    async with replicas(1) as made:
        heard = made.ask("g")
        has = await pieces(heard, 10)
        heard.generation.cancel()
        await asyncio.sleep(2 * TTL_S + 1.0)
        made["a"].wires.clear()
        assert isinstance(await refused(again(made, "g", has)), NotFound)


async def test_what_cannot_be_continued_cannot_be_taken_up() -> None:
    async with replicas(1, answer="") as made:
        heard = made.ask("g", text="many words " * 5, format=JsonObject())
        has = await pieces(heard, 3)
        heard.generation.cancel()
        assert isinstance(
            await refused(again(made, "g", has, text="many words " * 5, format=JsonObject())), NotFound
        )


async def test_a_client_may_go_while_it_is_looked_for() -> None:
    async with replicas(1) as made:
        heard = again(made, "g", "")
        heard.generation.cancel()
        await asyncio.sleep(1.0)
        assert heard.events == []


async def test_who_sends_the_same_id_takes_nothing_away() -> None:
    """S-07: ids are the clients' own, and another's may be known or guessed."""
    async with replicas(1) as made:
        own, theirs = made.request(), made.request(identity=Identity("user", KeyId("other"), "others"))
        kept: Kept[str] = Kept()
        kept.keep(own, "own", 1, 1.0)
        kept.keep(theirs, "theirs", 1, 1.0)
        assert (kept.find(own, 1.0), kept.find(theirs, 1.0)) == ("own", "theirs")
        others = [made.ask("g", identity=theirs.identity) for _ in range(5)]
        heard = made.ask("g")
        has = await pieces(heard, 10)
        rest = again(made, "g", has)
        assert isinstance(await heard.end(), Failed), "it was found among those that run"
        assert isinstance(await rest.end(), Finished)
        assert has + rest.text == ANSWER
        for one in others:
            assert isinstance(await one.end(), Finished)


async def test_the_oldest_go_when_there_are_too_many_or_their_time_is_over() -> None:
    async with replicas(1) as made:
        request = made.request()
        kept: Kept[int] = Kept(ttl_s=10.0, most_bytes=20_000)

        def one(number: int) -> InferenceRequest:
            return replace(request, request_id=RequestId(f"r{number}"))

        for number in range(40):
            kept.keep(one(number), number, 500, 1.0)
        found = [number for number in range(40) if kept.find(one(number), 1.0) is not None]
        assert found == list(range(40 - len(found), 40))
        assert 6 <= len(found) <= 14
        kept.keep(one(50), 50, 0, 2.0)
        kept.keep(one(50), 51, 0, 2.0)
        assert kept.find(one(50), 11.9) == 51
        assert kept.find(one(39), 35.0) is None
        assert len(kept) == 0
