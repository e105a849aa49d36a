"""Passwords: argon2id (RFC 9106), off the loop, few at a time.

One hash takes tens of milliseconds and 19 MiB on purpose, so sign-ins wait for each other
rather than for memory. A name that is not known costs as much as one that is.
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import TYPE_CHECKING, TypeVar

import anyio

from ollama_distributed.base.errors import Invalid

if TYPE_CHECKING:
    from argon2 import PasswordHasher

TIME_COST = 2
MEMORY_KIB = 19 * 1024
"""As OWASP has it (argon2id, 19 MiB, 2 passes, 1 lane): small enough for a node that shares its machine with
a model."""
AT_ONCE = 2
LEAST_CHARS, MOST_CHARS = 10, 256
"""NIST SP 800-63B asks for 8 at least and for no rules of composition; hashing a megabyte would be a gift."""
_NOBODY = (
    "$argon2id$v=19$m={memory},t={time},p=1$ZG8tbm90LWtub3ctaGVy$h8mSGxmS2gkfOwkTTj5RfIYRWIy2b9PYfHTsh4gZ6wA"
)
"""Of no password; compared with where the name is not known, at the same costs."""

T = TypeVar("T")


class Passwords:
    def __init__(self, *, time_cost: int = TIME_COST, memory_kib: int = MEMORY_KIB) -> None:
        self._time_cost, self._memory_kib = time_cost, memory_kib
        self._nobody = _NOBODY.format(memory=memory_kib, time=time_cost)
        self._turn = anyio.Semaphore(AT_ONCE)

    @cached_property
    def _hasher(self) -> PasswordHasher:
        """Made at the first need: a node's start does not wait for it."""
        from argon2 import PasswordHasher

        return PasswordHasher(time_cost=self._time_cost, memory_cost=self._memory_kib, parallelism=1)

    async def hash(self, password: str) -> str:
        """To be kept; in PHC form, with its salt and costs.

        Raises:
            Invalid: too short or too long.
        """
        check_password(password)
        return await self._run(partial(self._hash, password))

    async def matches(self, password: str, kept: str) -> bool:
        """Whether it is the password of `kept`; empty: of nobody, which takes as long."""
        if len(password) > MOST_CHARS:
            return False
        return await self._run(partial(self._matches, password, kept or self._nobody)) and bool(kept)

    def outdated(self, kept: str) -> bool:
        """Hashed at other costs than now: to be replaced when the password is known next."""
        return self._hasher.check_needs_rehash(kept)

    def _hash(self, password: str) -> str:
        return self._hasher.hash(password)

    def _matches(self, password: str, kept: str) -> bool:
        from argon2.exceptions import InvalidHashError, VerificationError

        try:
            return self._hasher.verify(kept, password)
        except (VerificationError, InvalidHashError):
            return False

    async def _run(self, work: partial[T]) -> T:
        async with self._turn:
            return await anyio.to_thread.run_sync(work)


def check_password(password: str) -> None:
    """
    Raises:
        Invalid: says what is needed, never the password.
    """
    if not LEAST_CHARS <= len(password) <= MOST_CHARS:
        raise Invalid(f"a password has {LEAST_CHARS} to {MOST_CHARS} characters", param="password")
    if len(set(password)) < 4:
        raise Invalid(
            "the password is too simple: it needs at least four different characters", param="password"
        )
