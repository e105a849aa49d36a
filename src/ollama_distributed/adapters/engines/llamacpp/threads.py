"""The threads of a runner that compute let those run first that pass on what they made.

llama.cpp computes on every core. As a token is ready, one of its threads writes it to the node and the next
token is begun at once: the threads that compute wake, take the core from the node that has just begun to
read, and the token waits for the rest of their slice (2 to 5 ms on two cores). Threads under SCHED_BATCH
get the same share of the cores, but never push another aside as they wake. Which threads compute llama.cpp
does not tell; what they spent does. Those that it makes later inherit it.

Not where a GPU computes: who waits for it must run when it is done.

Sources: sched(7); /proc/PID/task/TID/schedstat.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

ENOUGH_NS = 50_000_000
"""Of the busiest thread: less may be anything."""
SHARE = 0.05
"""Of the busiest: each of those that read and write spends a hundredth."""


class Computing:
    """Of one runner. Looks at some twenty files of /proc: not for the loop's thread."""

    def __init__(self, pid: int) -> None:
        """As soon as the model is loaded."""
        self._pid = pid
        self._known = _spent_ns(pid)
        self._answers = 0

    def answered(self) -> bool:
        """Whether to look: after 1, 2, 4, 8... answers. Some threads read prompts, others make tokens, and
        what comes first need not have enough of both."""
        self._answers += 1
        return self._answers.bit_count() == 1

    def let_others_first(self) -> None:
        """Those that computed since the last look."""
        now = _spent_ns(self._pid)
        spent = {thread: ns - self._known.get(thread, 0) for thread, ns in now.items()}
        most = max(spent.values(), default=0)
        if most < ENOUGH_NS:
            return
        self._known = now
        for thread, ns in spent.items():
            if ns >= SHARE * most:
                _to_batch(thread)


def can_tell(pid: int) -> bool:
    """Whether this system tells what a thread spent, and takes a policy for one."""
    return sys.platform == "linux" and Path(f"/proc/{pid}/schedstat").exists()


def _spent_ns(pid: int) -> dict[int, int]:
    """What each thread computed. Empty: the process has ended."""
    found: dict[int, int] = {}
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):  # it has just ended
                found[int(thread.name)] = int(thread.joinpath("schedstat").read_bytes().split()[0])
    return found


def _to_batch(thread: int) -> None:
    with contextlib.suppress(OSError):  # it has just ended, or a sandbox forbids it
        if os.sched_getscheduler(thread) == os.SCHED_OTHER:  # else a person chose
            os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))
