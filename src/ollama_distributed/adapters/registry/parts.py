"""How a blob is cut into ranges, and what a range's answer must say. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

MIN_PART_BYTES = 8 << 20
"""Less is not worth a request of its own."""
MAX_PART_BYTES = 64 << 20
"""More keeps the last part running alone at the end, and is lost to a server without ranges."""

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)\Z", re.IGNORECASE)


def cut(missing: Sequence[tuple[int, int]], streams: int) -> list[tuple[int, int]]:
    """Ranges [begin, end) to ask for, in order; enough for `streams` at once where that pays."""
    total = sum(end - begin for begin, end in missing)
    size = min(MAX_PART_BYTES, max(MIN_PART_BYTES, total // max(1, streams)))
    return [(at, min(at + size, end)) for begin, end in missing for at in range(begin, end, size)]


def range_header(begin: int, end: int) -> str:
    return f"bytes={begin}-{end - 1}"


def is_answer_to(begin: int, end: int, size: int, content_range: str) -> bool:
    """Whether a 206 brings exactly these bytes of a blob of `size` bytes (RFC 9110 14.4)."""
    match = _CONTENT_RANGE.match(content_range.strip())
    if match is None:
        return False
    return (int(match[1]), int(match[2])) == (begin, end - 1) and match[3] in ("*", str(size))
