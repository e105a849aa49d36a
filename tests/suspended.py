"""A process that stands still, and surely so."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.limits import SOON_S


@contextmanager
def suspended(pid: int) -> Iterator[None]:
    """It stands still inside: a signal is heard by each thread in its own time."""
    os.kill(pid, signal.SIGSTOP)
    try:
        end = time.monotonic() + SOON_S
        while not all(stat.read_text().rpartition(")")[2].split()[0] in "TZX" for stat in _threads(pid)):
            assert time.monotonic() < end, f"{pid} does not stand still"
            time.sleep(0.001)
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _threads(pid: int) -> list[Path]:
    return [task / "stat" for task in Path(f"/proc/{pid}/task").iterdir()]
