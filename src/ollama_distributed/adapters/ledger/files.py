"""What this node counted, on its disk: a file that only grows, and now and then one that sums it up.

    usage/ledger.json       whose it is
    usage/<n>.log           a line per batch: CRC-32 of the rest, a space, JSON
    usage/<n>.sum           all rows up to and with <n>.log, which then goes
    usage/copies/<ledger>   what another node counted

A batch is there when its line is: `fsync` has returned before `append` does. A line that was not
finished (power went, the process was killed) is cut off at the next start. A `.sum` replaces what
it sums up by a rename. Blocking; callers use a worker thread, one at a time.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from pathlib import Path

import msgspec
import structlog

from ollama_distributed.adapters.durable import replace_file, sync_folder
from ollama_distributed.base.errors import DiskFull
from ollama_distributed.base.ids import random_id
from ollama_distributed.base.usage import Doubt, Row

log = structlog.get_logger("usage.ledger")

CUT = "usage.ledger_cut"
UNREADABLE = "usage.ledger_unreadable"
MAX_LOG_BYTES = 4 * 1024 * 1024
"""Read again at the next start: 30 ms."""
MAX_DOUBTS = 100


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a `.log`."""

    number: int
    at: float
    rows: tuple[Row, ...] = ()
    closed: bool = False
    """The node ended in order after it."""


class Summed(msgspec.Struct, frozen=True, kw_only=True):
    """A `.sum`."""

    batch: int
    rows: tuple[Row, ...]
    doubts: tuple[Doubt, ...] = ()


class Whose(msgspec.Struct, frozen=True, kw_only=True):
    """`ledger.json`. A folder that was lost gets another id: what the old one counted stays apart."""

    ledger: str
    node: str


class Opened(msgspec.Struct, frozen=True, kw_only=True):
    ledger: str
    summed: Summed
    batches: tuple[Batch, ...]
    """After it."""
    doubts: tuple[Doubt, ...]


class LedgerFiles:
    def __init__(self, folder: Path, node: str) -> None:
        self._folder = folder
        self._node = node
        self._number = 0
        self._file: int | None = None
        self._size = 0

    def open(self, now: float) -> Opened:
        """Read all there is, cut off what was not finished, and begin a new file. `now`: wall time.

        Raises:
            DiskFull: it cannot be written.
        """
        with _told():
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            whose = self._whose()
        numbers = sorted(int(path.stem) for path in self._folder.glob("*.sum") if path.stem.isdigit())
        summed = Summed(batch=0, rows=())
        upto = -1
        for number in reversed(numbers):
            if (found := _read(self._folder / f"{number}.sum")) is not None:
                summed, upto = found, number
                break
        logs = sorted(int(path.stem) for path in self._folder.glob("*.log") if path.stem.isdigit())
        batches: list[Batch] = []
        for number in logs:
            if number > upto:
                batches += _lines(self._folder / f"{number}.log")
        doubts = summed.doubts
        if batches and not batches[-1].closed:
            doubts = (*doubts, Doubt(node=self._node, at=batches[-1].at, until=now))[-MAX_DOUBTS:]
        self._number = max([*numbers, *logs, 0])
        with _told():
            self._begin()
        return Opened(ledger=whose.ledger, summed=summed, batches=tuple(batches), doubts=doubts)

    def append(self, batch: Batch) -> None:
        """Durable when it returns.

        Raises:
            DiskFull: nothing of it is there.
        """
        assert self._file is not None, "open it first"
        text = msgspec.json.encode(batch)
        line = b"%08x %s\n" % (zlib.crc32(text), text)
        with _told():
            try:
                _write(self._file, line)
                os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, self._size)
                raise
        self._size += len(line)

    @property
    def large(self) -> bool:
        """It is time to sum up."""
        return self._size > MAX_LOG_BYTES

    def sum_up(self, summed: Summed) -> None:
        """Put all rows, up to the last batch, in place of the logs.

        Raises:
            DiskFull: the logs stay.
        """
        with _told():
            done = self._number
            replace_file(self._folder / f"{done}.sum", msgspec.json.encode(summed))
            self._begin()
            for path in self._folder.iterdir():
                old = path.stem.isdigit() and int(path.stem) <= done and path.suffix in (".log", ".sum")
                if old and path.name != f"{done}.sum":
                    path.unlink()

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _begin(self) -> None:
        self.close()
        self._number += 1
        path = self._folder / f"{self._number}.log"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._size = 0
        sync_folder(self._folder)

    def _whose(self) -> Whose:
        path = self._folder / "ledger.json"
        try:
            whose = msgspec.json.decode(path.read_bytes(), type=Whose)
            if whose.node == self._node:
                return whose
        except FileNotFoundError:
            pass
        except msgspec.MsgspecError as damaged:
            log.warning(UNREADABLE, path=path.name, reason=str(damaged))
        whose = Whose(ledger=random_id(16), node=self._node)
        replace_file(path, msgspec.json.encode(whose))
        return whose


class _told:  # noqa: N801  # a context manager in place of a function
    """What the disk refuses becomes `DiskFull`."""

    def __enter__(self) -> None: ...

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, OSError):
            raise DiskFull(f"usage cannot be written down: {error.strerror}") from error


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _read(path: Path) -> Summed | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Summed)
    except (OSError, msgspec.MsgspecError) as damaged:
        log.warning(UNREADABLE, path=path.name, reason=str(damaged))
        return None


def _lines(path: Path) -> Iterable[Batch]:
    """Up to the first that is not whole, which is cut off."""
    data = path.read_bytes()
    batches: list[Batch] = []
    end = 0
    for line in data.splitlines(keepends=True):
        text = line[9:-1]
        if not line.endswith(b"\n") or line[:9] != b"%08x " % zlib.crc32(text):
            break
        batches.append(msgspec.json.decode(text, type=Batch))
        end += len(line)
    if end < len(data):
        log.warning(CUT, path=path.name, bytes=len(data) - end)
        os.truncate(path, end)
    return batches


class Copies:
    """What other nodes counted, a file each. Any of them may be lost: it is sent again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self) -> list[bytes]:
        if not self._folder.is_dir():
            return []
        return [path.read_bytes() for path in sorted(self._folder.iterdir()) if path.suffix == ".copy"]

    def write(self, ledger: str, data: bytes) -> None:
        """
        Raises:
            DiskFull
        """
        with _told():
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            replace_file(self._folder / f"{ledger}.copy", data)
