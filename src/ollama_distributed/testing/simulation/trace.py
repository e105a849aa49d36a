"""What happened, line by line, and its hash: the same seed gives the same hash anywhere."""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable

TAIL_LINES = 150


class Trace:
    def __init__(self, tell: Callable[[str], None] | None = None) -> None:
        self._tell = tell
        self._hash = hashlib.blake2b(digest_size=16)
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.lines = 0

    def note(self, event: str, /, **facts: object) -> None:
        """In order; facts must print the same in every process."""
        words = [f"{asyncio.get_running_loop().time():11.6f}", event]
        words += [f"{name}={fact}" for name, fact in facts.items()]
        line = " ".join(words)
        self._hash.update(line.encode() + b"\n")
        self.lines += 1
        self.tail.append(line)
        if self._tell is not None:
            self._tell(line)

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()
