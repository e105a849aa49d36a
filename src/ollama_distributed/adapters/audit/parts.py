"""The files of one chain: `<node>.jsonl`, then `<node>.<its first record>.jsonl`; one record a line.

Reading only, and the end of a file that a crash left in the middle of a line. All of it blocks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ollama_distributed.access.audit.chain import decode
from ollama_distributed.base.audit import AuditRecord

BLOCK_BYTES = 64 * 1024
_SUFFIX = ".jsonl"
_DIGITS = 12
"""So that names sort as records do."""


def part_path(root: Path, node: str, first: int) -> Path:
    """The file of the part whose first record is `first`. `node`: an id, which holds no dot."""
    return root / (f"{node}{_SUFFIX}" if first == 1 else f"{node}.{first:0{_DIGITS}}{_SUFFIX}")


def first_of(path: Path) -> int:
    """Number of the first record of a part, by the file's name."""
    number = path.name.removesuffix(_SUFFIX).partition(".")[2]
    return int(number) if number.isdecimal() else 1


def parts_of(root: Path, node: str) -> list[Path]:
    """The oldest first."""
    found = [path for path in root.glob(f"{node}*{_SUFFIX}") if node_of(path) == node]
    return sorted(found, key=first_of)


def node_of(path: Path) -> str:
    return path.name.partition(".")[0]


def mend(path: Path) -> bytes:
    """The last line; empty: there is none. Half a line at the end, of a write that nobody was told
    of, is cut off."""
    with path.open("r+b") as file:
        line = b""
        at = file.seek(0, os.SEEK_END)
        while at > 0 and b"\n" not in line[:-1]:
            step = min(BLOCK_BYTES, at)
            at -= step
            file.seek(at)
            line = file.read(step) + line
            if not line.endswith(b"\n"):
                kept = line.rfind(b"\n") + 1
                if kept or not at:
                    file.truncate(at + kept)
                    line = line[:kept]
    return line[:-1].rpartition(b"\n")[2]


def lines_of(paths: Sequence[Path]) -> Iterator[bytes]:
    """Of a whole chain, to be checked: without the ends of lines; half a line is none."""
    for path in paths:
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield line[:-1]
                elif path is not paths[-1]:
                    yield b""
                # At the very end it is a write under way, or one that nobody was told of.


def newest_first(path: Path) -> Iterator[AuditRecord]:
    """What cannot be read is left out, as is a part that was removed: `check` tells of it."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        at = file.seek(0, os.SEEK_END)
        rest = b""
        while at > 0:
            step = min(BLOCK_BYTES, at)
            at -= step
            file.seek(at)
            lines = (file.read(step) + rest).split(b"\n")
            rest = lines[0]
            for line in reversed(lines[1:]):
                if line and (record := decode(line)) is not None:
                    yield record
        if rest and (record := decode(rest)) is not None:
            yield record


def oldest_first(path: Path, offset: int = 0) -> Iterator[tuple[AuditRecord, int]]:
    """From a byte on: records, each with where the next one begins."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(offset)
        for line in file:
            offset += len(line)
            if line.endswith(b"\n") and (record := decode(line[:-1])) is not None:
                yield record, offset
