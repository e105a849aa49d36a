"""Room on the disk for what is about to come: asked for before the first byte, and kept.

What is on its way is a claim: of the bytes of a claimed blob those that are not on the disk yet are
taken, so that fetches that run together do not overrun what one alone may use. A claim may
lie in another one (the blob of a model): it counts once. Room that is not there is made by
letting leftovers go, then models (`make`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

import anyio
import msgspec

from ollama_distributed.base.amounts import size_text
from ollama_distributed.base.errors import DiskFull
from ollama_distributed.distribution.disk_ports import Survey
from ollama_distributed.models.names import BlobId

STEP_BYTES = 64 << 20
"""What an upload of unknown size asks for at once."""
_TRIES = 4
"""Others may take what was just made free: other programs, or fetches that began before."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What of a disk may be used."""

    quota_bytes: int | None = None
    """Of all files of the store; None: no limit."""
    low_water_bytes: int = 0
    """Of the disk, to be left free."""

    def left(self, survey: Survey) -> int:
        """Bytes that may still come; below 0: too many are there already."""
        left = survey.free_bytes - self.low_water_bytes
        if self.quota_bytes is not None:
            left = min(left, self.quota_bytes - survey.used_bytes)
        return left


def outstanding(survey: Survey, claims: Mapping[BlobId, int]) -> int:
    """Bytes of claimed blobs that are not on the disk yet."""
    need = 0
    for blob, size in claims.items():
        if blob not in survey.blobs:
            here = survey.partials.get(blob)
            need += max(0, size - here.size_bytes) if here else size
    return need


class Growing(Protocol):
    """Room of something whose size nobody knows."""

    async def take(self, count: int) -> None:
        """Before `count` bytes more are written.

        Raises:
            DiskFull: there is no room for them.
        """
        ...


class Room(Protocol):
    def room(self, blobs: Mapping[BlobId, int]) -> AbstractAsyncContextManager[None]:
        """Have room for blobs of these sizes while the context lasts; what is on the disk already
        has its own.

        Raises:
            DiskFull: it cannot be made; says why, and what to do.
        """
        ...

    def growing(self, size: int = 0) -> AbstractAsyncContextManager[Growing]:
        """Of something that is written while its size is not known for sure. `size`: what it is said
        to be; there is room for that at once. Raises as `room`."""
        ...


class Boundless:
    """The disk itself is the limit."""

    @asynccontextmanager
    async def room(self, _blobs: Mapping[BlobId, int]) -> AsyncIterator[None]:
        yield

    @asynccontextmanager
    async def growing(self, _size: int = 0) -> AsyncIterator[Growing]:
        yield self

    async def take(self, _count: int) -> None:
        return


class Rooms:
    """Implements `Room`. `limits`: of the disk that was looked at. `make(need, survey)`: let
    something go, so that about so many bytes more become free; False: nothing can. `why`: what
    stays, for people."""

    def __init__(
        self,
        survey: Callable[[], Awaitable[Survey]],
        limits: Callable[[Survey], Limits],
        make: Callable[[int, Survey], Awaitable[bool]],
        why: Callable[[], Awaitable[str]],
    ) -> None:
        self._survey = survey
        self._limits = limits
        self._make = make
        self._why = why
        self._claims: dict[BlobId, list[int]] = {}
        """Sizes, one for each who claims it."""
        self._growing: set[_Growing] = set()
        self._asking = anyio.Lock()
        self.refused = 0

    def claimed(self) -> dict[BlobId, int]:
        return {blob: max(sizes) for blob, sizes in self._claims.items()}

    def taken(self, survey: Survey) -> int:
        """Bytes that are on their way to the disk."""
        return outstanding(survey, self.claimed()) + sum(one.left for one in self._growing)

    @asynccontextmanager
    async def room(self, blobs: Mapping[BlobId, int]) -> AsyncIterator[None]:
        new = {blob: size for blob, size in blobs.items() if max(self._claims.get(blob, (-1,))) < size}
        if new:
            async with self._asking:
                await self._have(lambda survey: outstanding(survey, new))
                self._claim(blobs)
        else:
            self._claim(blobs)
        try:
            yield
        finally:
            for blob, size in blobs.items():
                self._claims[blob].remove(size)
                if not self._claims[blob]:
                    del self._claims[blob]

    @asynccontextmanager
    async def growing(self, size: int = 0) -> AsyncIterator[Growing]:
        growing = _Growing(self)
        self._growing.add(growing)
        try:
            if size:
                async with self._asking:
                    await self._have(lambda _: size)
                    growing.left = size
            yield growing
        finally:
            self._growing.discard(growing)

    async def restore(self) -> bool:
        """Get below the limits again, if something else brought the disk above them, as far as
        that goes. False: it is still above."""
        async with self._asking:
            try:
                await self._have(lambda _: 0, always=True)
            except DiskFull:
                return False
            return True

    async def more(self, growing: _Growing, count: int) -> None:
        async with self._asking:
            try:
                await self._have(lambda _: max(count, STEP_BYTES), refused=False)
                growing.left += max(count, STEP_BYTES)
            except DiskFull:
                await self._have(lambda _: count)
                growing.left += count

    def _claim(self, blobs: Mapping[BlobId, int]) -> None:
        for blob, size in blobs.items():
            self._claims.setdefault(blob, []).append(size)

    async def _have(
        self, need_of: Callable[[Survey], int], *, always: bool = False, refused: bool = True
    ) -> None:
        """
        Raises:
            DiskFull: there is no room for it.
        """
        for _ in range(_TRIES):
            survey = await self._survey()
            need = need_of(survey)
            if not need and not always:
                return
            limits = self._limits(survey)
            short = need + self.taken(survey) - limits.left(survey)
            if short <= 0:
                return
            if not await self._make(short, survey):
                break
        self.refused += refused and not always
        raise DiskFull(await self._refusal(need, survey, limits))

    async def _refusal(self, need: int, survey: Survey, limits: Limits) -> str:
        left = max(0, limits.left(survey) - self.taken(survey))
        bounds = [f"{size_text(limits.low_water_bytes)} of the disk are kept free"]
        if limits.quota_bytes is not None:
            bounds.insert(0, f"{size_text(survey.used_bytes)} of {size_text(limits.quota_bytes)} are used")
        return (
            f"no space left for {size_text(need)}: there is room for {size_text(left)} ({', '.join(bounds)})"
            f"{await self._why()}. Delete a model (rm), let a copy go (model evict), or change disk_quota or "
            "disk_low_water"
        )


class _Growing:
    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms
        self.left = 0
        """Bytes that it has room for and did not write yet."""

    async def take(self, count: int) -> None:
        if self.left < count:
            await self._rooms.more(self, count - self.left)
        self.left -= count
