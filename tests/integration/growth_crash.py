"""A machine that dies while its cluster's voters change: `python growth_crash.py FOLDER POINT`.

Kills itself (SIGKILL) at the named point of the move from one server to three, or (`one-…`)
back; all servers die with it: a power cut. Says `held N` before, with the revision of a key.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from tests.voters import Voters, again, filled, written

from ollama_distributed.adapters.coordination.nats.growth import Growth
from ollama_distributed.adapters.coordination.nats.journal import Journal
from ollama_distributed.adapters.coordination.nats.streams import Stream
from ollama_distributed.cluster.ports import Write

POINTS = ("frozen", "copied", "forming", "aside", "formed", "filled", "settled", "thawed")
BACK_POINTS = ("one-frozen", "one-drawn", "one-settled", "one-thawed")
TRUST_NAME = "trust.pickle"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after(owner: type, name: str, when: Callable[..., bool] = lambda *_: True) -> None:
    """Die once `name` of `owner` has returned."""
    call: Callable[..., Any] = getattr(owner, name)

    async def awaited(outcome: Awaitable[Any], arguments: tuple[Any, ...]) -> Any:
        result = await outcome
        if when(*arguments):
            die()
        return result

    def wrapped(*arguments: Any, **named: Any) -> Any:
        outcome = call(*arguments, **named)
        if asyncio.iscoroutine(outcome):
            return awaited(outcome, arguments)
        if when(*arguments):
            die()
        return outcome

    setattr(owner, name, wrapped)


ARMED: dict[str, Callable[[], None]] = {
    "frozen": lambda: after(Stream, "freeze"),
    "copied": lambda: after(Stream, "copy_out"),
    "forming": lambda: after(Journal, "write", lambda _, move: move.step == "forming"),
    "aside": lambda: after(Journal, "set_aside"),
    "formed": lambda: after(Growth, "_gathered"),
    "filled": lambda: after(Stream, "copy_in"),
    "settled": lambda: after(Journal, "write", lambda _, move: move.step == "settled"),
    "thawed": lambda: after(Stream, "thaw"),
    "one-frozen": lambda: after(Stream, "freeze"),
    "one-drawn": lambda: after(Growth, "_gather_here"),
    "one-settled": lambda: after(Journal, "write", lambda _, move: move.step == "settled"),
    "one-thawed": lambda: after(Stream, "thaw"),
}
assert tuple(ARMED) == (*POINTS, *BACK_POINTS)


async def main(folder: Path, point: str) -> None:
    voters = Voters(folder)
    (folder / TRUST_NAME).write_bytes(pickle.dumps(voters.trust.keys))
    await voters.start()
    async with voters.client("one", create=True) as one:
        await filled(one, [Write(f"k.{i}", b"x" * 100) for i in range(300)])
        held = await written(one, "held", b"1")
        print(f"held {held}", flush=True)
        others = voters.hosts("n2", "n3")
        if point in POINTS:
            ARMED[point]()
            await again(lambda: voters.growth.to_three(others))
        else:
            await again(lambda: voters.growth.to_three(others))
            ARMED[point]()
            await voters.growth.to_one(others)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
