"""What a write concludes from answers of which some come from a server that led once."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import anyio
import msgspec
import pytest

from ollama_distributed.adapters.coordination.nats import wire
from ollama_distributed.adapters.coordination.nats.client import UNSETTLED_S, NatsCoordination
from ollama_distributed.adapters.coordination.nats.session import Address, Login, NoResponders, Session
from ollama_distributed.base.errors import Conflict, DeadlineExceeded
from ollama_distributed.cluster.ports import ABSENT

Answer = Callable[[str], Any]
"""Of the id that the write carries."""


def error(code: int) -> Answer:
    return lambda _: {"error": {"code": 500, "err_code": code, "description": "no"}}


def acknowledged(sequence: int) -> Answer:
    return lambda _: {"stream": "KV_cfg", "seq": sequence}


def stored(sequence: int, *, ours: bool, over: int = 7, deleted: bool = False) -> Answer:
    """`over`: the sequence that this write expected, and replaced."""

    def answer(write_id: str) -> Any:
        operation = f"{wire.OPERATION}: DEL\r\n" if deleted else ""
        headers = (
            f"NATS/1.0\r\n{wire.WRITE_ID}: {write_id if ours else 'other'}\r\n"
            f"{wire.EXPECTED_SEQUENCE}: {over}\r\n{operation}\r\n"
        )
        message = {
            "subject": "$KV.cfg.k",
            "seq": sequence,
            "data": base64.b64encode(b"v").decode(),
            "hdrs": base64.b64encode(headers.encode()).decode(),
        }
        return {"message": message}

    return answer


REFUSED, AWAY, MISSING = error(wire.WRONG_LAST_SEQUENCE[0]), error(10008), error(wire.NO_MESSAGE)


class Scripted:
    """A session whose servers answer as told, in order. `after`: then, again and again."""

    def __init__(self, answers: Sequence[Answer], after: Sequence[Answer]) -> None:
        self.answers = list(answers)
        self._after = itertools.cycle(after)
        self._write_id = ""

    async def request(
        self, subject: str, data: bytes, *, timeout_s: float, headers: Mapping[str, str] | None = None
    ) -> bytes:
        if headers is not None:
            self._write_id = headers[wire.WRITE_ID]
        answer = self.answers.pop(0) if self.answers else next(self._after)
        return msgspec.json.encode(answer(self._write_id))


async def put(
    *answers: Answer, revision: int = 7, known: int = 7, troubled: bool = False, after: Sequence[Answer] = ()
) -> int:
    """The outcome of a write over a key that stood at `revision`; all answers must be used.
    `known`: the newest revision that its node had seen. `troubled`: there was an election lately."""
    coordination = NatsCoordination(Address(urls=("tls://nowhere:1",), login=cast(Login, None)), name="n1")
    session = Scripted(answers, after)
    coordination._session = cast(Session, session)
    coordination._written = known
    if troubled:
        coordination._troubled_at = anyio.current_time()
    try:
        return await coordination.put("k", b"v", revision=revision)
    finally:
        assert session.answers == []


async def test_an_error_is_no_proof_that_nothing_was_written() -> None:
    assert await put(AWAY, REFUSED, AWAY, stored(8, ours=True)) == 8
    with pytest.raises(DeadlineExceeded):
        await put(AWAY, REFUSED, stored(9, ours=False))


async def test_a_refusal_from_an_older_state_is_no_conflict() -> None:
    assert await put(REFUSED, stored(5, ours=False), acknowledged(8)) == 8
    assert await put(REFUSED, MISSING, acknowledged(8)) == 8
    assert await put(REFUSED, stored(5, ours=False), REFUSED, stored(8, ours=True)) == 8


async def test_a_newer_state_is_a_conflict_at_once() -> None:
    with pytest.raises(Conflict) as conflict:
        await put(REFUSED, stored(8, ours=False))
    assert conflict.value.revision == 8


async def test_a_server_that_led_once_may_refuse_what_was_written_and_replaced() -> None:
    after_two = stored(9, ours=False, over=8)
    with pytest.raises(DeadlineExceeded):
        await put(REFUSED, after_two, troubled=True)
    # Not if what stands was there before, or follows what was expected, or nobody was elected.
    for answer, known, troubled in (
        (after_two, 9, True),
        (stored(8, ours=False), 7, True),
        (after_two, 7, False),
    ):
        with pytest.raises(Conflict):
            await put(REFUSED, answer, known=known, troubled=troubled, after=(REFUSED, answer))


@pytest.mark.parametrize("refusal", ["of old", "of now"])
async def test_a_server_that_led_once_may_show_what_was_deleted_since(refusal: str) -> None:
    """It wakes, and answers before it hears of the election: no conflict of a key that is not there."""
    of_old, of_now = stored(5, ours=False), stored(7, ours=False, deleted=True)
    first = (REFUSED, of_old) if refusal == "of old" else (REFUSED, of_old, REFUSED, of_old)
    assert await put(*first, REFUSED, of_now, acknowledged(8), revision=ABSENT, known=9, troubled=True) == 8


async def test_who_could_not_read_just_now_knows_of_trouble() -> None:
    def away(_: str) -> Any:
        raise NoResponders

    coordination = NatsCoordination(Address(urls=("tls://nowhere:1",), login=cast(Login, None)), name="n1")
    coordination._session = cast(Session, Scripted([away, MISSING], ()))
    assert await coordination.get("k") is None
    assert anyio.current_time() - coordination._troubled_at < UNSETTLED_S


async def test_a_write_under_way_is_waited_for() -> None:
    assert await put(error(wire.WRONG_LAST_SEQUENCE[1]), stored(7, ours=False), acknowledged(8)) == 8
