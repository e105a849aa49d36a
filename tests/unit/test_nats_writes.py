"""What a write concludes from answers of which some come from a server that led once."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any, cast

import msgspec
import pytest

from ollama_distributed.adapters.coordination.nats import wire
from ollama_distributed.adapters.coordination.nats.client import NatsCoordination
from ollama_distributed.adapters.coordination.nats.session import Address, Login, Session
from ollama_distributed.base.errors import Conflict, DeadlineExceeded

Answer = Callable[[str], Any]
"""Of the id that the write carries."""


def error(code: int) -> Answer:
    return lambda _: {"error": {"code": 500, "err_code": code, "description": "no"}}


def acknowledged(sequence: int) -> Answer:
    return lambda _: {"stream": "KV_cfg", "seq": sequence}


def stored(sequence: int, *, ours: bool) -> Answer:
    def answer(write_id: str) -> Any:
        headers = f"NATS/1.0\r\n{wire.WRITE_ID}: {write_id if ours else 'other'}\r\n\r\n"
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
    """A session whose servers answer as told, in order."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self._write_id = ""

    async def request(
        self, subject: str, data: bytes, *, timeout_s: float, headers: Mapping[str, str] | None = None
    ) -> bytes:
        if headers is not None:
            self._write_id = headers[wire.WRITE_ID]
        return msgspec.json.encode(self.answers.pop(0)(self._write_id))


async def put(*answers: Answer, revision: int = 7) -> int:
    """The outcome of a write over a key that stood at `revision`; all answers must be used."""
    coordination = NatsCoordination(Address(urls=("tls://nowhere:1",), login=cast(Login, None)), name="n1")
    session = Scripted(*answers)
    coordination._session = cast(Session, session)
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


async def test_a_write_under_way_is_waited_for() -> None:
    assert await put(error(wire.WRONG_LAST_SEQUENCE[1]), stored(7, ours=False), acknowledged(8)) == 8
