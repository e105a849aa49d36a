"""Whether a password or a provider's code is somebody's: how often it may be tried, and by how many at once.

Of users it knows names only; a name that is nobody's takes as long.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from ollama_distributed.access.attempts import Attempts
from ollama_distributed.access.passwords import Passwords
from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import (
    OllamaDistributedError,
    QueueFull,
    TooManyAttempts,
    Unauthenticated,
)

log = structlog.get_logger("cluster.people")

MAX_WAITING = 64
"""Sign-ins that wait for their turn to be hashed: some seconds' worth."""
T = TypeVar("T")

WRONG = "the name or the password is not right"


class Proof:
    def __init__(self, passwords: Passwords, clock: Clock) -> None:
        self._passwords = passwords
        self._clock = clock
        self._attempts = Attempts()
        self._waiting = 0

    async def proved(self, name: str, password: str, kept: str, address: str) -> None:
        """Returns where `password` is that of `kept`; takes as long where there is none.

        Raises:
            TooManyAttempts, QueueFull, Unauthenticated
        """
        now = self._clock.monotonic()
        wait_s = self._attempts.wait_s(name, address, now)
        if wait_s > 0:
            raise TooManyAttempts("too many wrong passwords; wait before the next try", retry_after_s=wait_s)
        if self._waiting >= MAX_WAITING:
            raise QueueFull("too many people sign in at once", retry_after_s=1.0)
        # Counted first, so that many tries at once are many tries.
        self._attempts.wrong(name, address, now)
        self._waiting += 1
        try:
            right = await self._passwords.matches(password, kept)
        finally:
            self._waiting -= 1
        if not right:
            log.warning("people.wrong_password", user=name, address=address)
            raise Unauthenticated(WRONG)
        self._attempts.right(name, address)

    async def vouched(self, ask: Callable[[], Awaitable[T]], address: str) -> T:
        """What `ask` returns. Anybody may send a code, and each has us ask the provider, which may lock
        this cluster out: where codes are often wrong, the address waits.

        Raises:
            TooManyAttempts, and what `ask` raises.
        """
        now = self._clock.monotonic()
        wait_s = self._attempts.wait_for_code_s(address, now)
        if wait_s > 0:
            raise TooManyAttempts("too many sign-ins that failed; wait before the next", retry_after_s=wait_s)
        self._attempts.wrong_code(address, now)
        try:
            found = await ask()
        except Unauthenticated:
            raise
        except OllamaDistributedError:  # the provider's fault, or of somebody whom it knows
            self._attempts.take_code_back(address)
            raise
        self._attempts.take_code_back(address)
        return found
