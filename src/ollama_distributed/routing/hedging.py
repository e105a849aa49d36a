"""When a second replica is asked the same question, and which answer counts.

For questions that can be asked twice (vectors, scores): after the 95th percentile of what such a
question took lately, the next replica of the plan is asked, the first answer counts and the other
question is cancelled (Dean and Barroso, The Tail at Scale, 2013). At most `SHARE` of the requests are
asked twice, so that a cluster that is slow because it is full gets hardly more work for it.

`Hedges` decides and waits for nothing; `first_answer` does it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.tasks import end
from ollama_distributed.routing.plan import ELSEWHERE, most_telling

T = TypeVar("T")

SHARE = 0.05
BURST = 4.0
"""Second questions that may be asked at once after a quiet time."""
QUANTILE = 0.95
LATE = 1.5
"""Times the median, at least: where all take alike, nothing is late."""
LEAST = 20
"""Answers of a kind that must have been measured: a percentile of fewer says little."""
MEMORY = 256
"""Answers of a kind that are remembered: a few minutes of a busy gateway."""
SHORTEST_S = 0.01
"""No question is asked again sooner: a hop and a vector of a small model take a few milliseconds."""
MOST_LOST = 2
"""Times in a row that another one answered first, until a replica counts as slow: once may be chance."""
_REMEMBERED = 1024
"""Kinds; all are forgotten when so many came together."""


class _Took:
    """How long questions of one kind took."""

    __slots__ = ("_last", "_new", "after_s")

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=MEMORY)
        self._new = 0
        self.after_s: float | None = None
        """As of some answers ago: to sort them for each request would cost more than it says."""

    def add(self, took_s: float) -> None:
        self._last.append(took_s)
        self._new += 1
        if self._new >= LEAST:
            self._new = 0
            ordered = sorted(self._last)
            usual, late = ordered[len(ordered) // 2], ordered[int(QUANTILE * len(ordered))]
            self.after_s = max(SHORTEST_S, late, LATE * usual)


class Hedges:
    """Of one gateway. A `kind` is what takes about as long: a model and a size of questions."""

    def __init__(self) -> None:
        self._kinds: dict[str, _Took] = {}
        self._left = 0.0
        self._lost: dict[tuple[NodeId, str], int] = {}
        """How often in a row a replica did, with no answer of its own between."""
        self.asked = 0

    def begin(self, kind: str) -> float | None:
        """A question begins: after how many seconds a second one may be asked; None: never."""
        self._left = min(BURST, self._left + SHARE)
        known = self._kinds.get(kind)
        return known.after_s if known is not None else None

    def take(self) -> bool:
        """Whether a second question may be asked now; it then counts."""
        if self._left < 1.0:
            return False
        self._left -= 1.0
        self.asked += 1
        return True

    def lost(self, node: NodeId, key: str) -> bool:
        """It was asked first and another one answered; whether that is so again and again."""
        self._lost[node, key] = self._lost.get((node, key), 0) + 1
        if self._lost[node, key] < MOST_LOST:
            return False
        del self._lost[node, key]
        return True

    def answered(self, node: NodeId, key: str) -> None:
        if self._lost:
            self._lost.pop((node, key), None)

    def ended(self, kind: str, took_s: float) -> None:
        """How long it took until the answer that counted, or would have counted, was there."""
        known = self._kinds.get(kind)
        if known is None:
            if len(self._kinds) >= _REMEMBERED:
                self._kinds.clear()
            known = self._kinds[kind] = _Took()
        known.add(took_s)


def kind_of(key: str, size: int) -> str:
    """`size`: characters of all texts; within a factor of two they take about as long."""
    return f"{key} {size.bit_length()}"


async def first_answer(
    order: Sequence[NodeId],
    ask: Callable[[NodeId], Awaitable[T]],
    noted: Callable[[NodeId, OllamaDistributedError | None], None],
    *,
    after_s: float | None = None,
    second: NodeId | None = None,
    may: Callable[[], bool] = lambda: False,
    lost: Callable[[NodeId], None] = lambda _: None,
) -> tuple[NodeId, T]:
    """Ask the nodes of `order`, one after the other until one answers; and `second` beside the first
    one when that takes longer than `after_s` and `may` allows it. `lost`: hears of the first one if the
    second was first. Cancel-safe.

    Raises:
        OllamaDistributedError: the first refusal that is about the question, else the most telling one.
    """
    if len(order) == 1:  # needs no task
        try:
            answer = await ask(order[0])
        except ELSEWHERE as error:
            noted(order[0], error)
            raise
        noted(order[0], None)
        return order[0], answer
    left = list(order)
    errors: list[OllamaDistributedError] = []
    running: dict[asyncio.Task[T], NodeId] = {}

    def begin(node: NodeId) -> None:
        left.remove(node)
        running[asyncio.ensure_future(_one(ask, node))] = node

    begin(left[0])
    wait_s = after_s if second is not None else None
    try:
        while running:
            done, _ = await asyncio.wait(running, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            wait_s = None
            if not done and second in left and may():
                assert second is not None
                begin(second)
            for task in done:
                node = running.pop(task)
                try:
                    answer = task.result()
                except ELSEWHERE as error:
                    errors.append(error)
                    noted(node, error)
                else:
                    noted(node, None)
                    if order[0] in running.values():
                        lost(order[0])
                    return node, answer
            if not running and left:
                begin(left[0])
    finally:
        await end(list(running))
    raise most_telling(errors)


async def _one(ask: Callable[[NodeId], Awaitable[T]], node: NodeId) -> T:
    return await ask(node)
