"""One line of a batch, asked until it has an answer."""

from __future__ import annotations

import random

import anyio
import msgspec

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import random_id
from ollama_distributed.batches.plan import Line, Owner
from ollama_distributed.batches.ports import Answer, Asking, Known
from ollama_distributed.batches.records import Response, Result

AGAIN: frozenset[int] = frozenset({408, 429, 503, 504})
"""Nothing is wrong with the line: it is asked again until the window closes."""
BROKEN: frozenset[int] = frozenset({500, 502})
BROKEN_TRIES = 3
UNKNOWN_S = 60.0
"""A key that is not known may come with the state of the cluster, after a start; lines wait for it."""
LOOK_S = 0.5
MOST_PAUSE_S = 30.0


class Asker:
    def __init__(self, ask: Asking, known: Known, clock: Clock, chance: random.Random) -> None:
        self._ask = ask
        self._known = known
        self._clock = clock
        self._chance = chance

    async def answered(self, owner: Owner, endpoint: str, line: Line) -> Result | None:
        """Its result; None: its owner's key is not good any more, and nothing was asked."""
        tries = 0
        while True:
            identity = await self._identity(owner)
            if identity is None:
                return None
            request_id = f"batch_req_{random_id(20)}"
            answer = await self._ask(endpoint, line.body, identity, request_id)
            tries += 1
            if answer.status not in AGAIN and not (answer.status in BROKEN and tries < BROKEN_TRIES):
                response = Response(
                    status_code=answer.status, request_id=request_id, body=msgspec.Raw(answer.body.strip())
                )
                return Result(id=request_id, custom_id=line.custom_id, response=response)
            await anyio.sleep(self._pause_s(answer, tries))

    async def _identity(self, owner: Owner) -> Identity | None:
        since = self._clock.monotonic()
        while True:
            identity = self._known(owner)
            if identity is not None or self._clock.monotonic() - since > UNKNOWN_S:
                return identity
            await anyio.sleep(LOOK_S)

    def _pause_s(self, answer: Answer, tries: int) -> float:
        wanted = max(2.0 ** min(tries, 6) / 4, answer.retry_after_s or 0.0)
        return min(wanted, MOST_PAUSE_S) * (0.5 + self._chance.random() / 2)
