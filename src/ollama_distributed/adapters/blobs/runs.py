"""Runs of bytes: which parts of a file are there. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator


class Runs:
    """A set of bytes as sorted runs [begin, end) that neither touch nor overlap."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []
        self.total = 0
        """Bytes in all runs."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._begins, self._ends, strict=True)

    def add(self, begin: int, end: int) -> None:
        """Also what is there already, in part or whole."""
        if begin >= end:
            return
        first = bisect_left(self._ends, begin)
        last = bisect_right(self._begins, end)
        if first < last:
            begin = min(begin, self._begins[first])
            end = max(end, self._ends[last - 1])
        gone = sum(self._ends[at] - self._begins[at] for at in range(first, last))
        self._begins[first:last] = [begin]
        self._ends[first:last] = [end]
        self.total += end - begin - gone

    def gaps(self, size: int) -> list[tuple[int, int]]:
        """What is not there, of the bytes [0, size)."""
        found: list[tuple[int, int]] = []
        at = 0
        for begin, end in self:
            if at < begin:
                found.append((at, begin))
            at = end
        if at < size:
            found.append((at, size))
        return found
