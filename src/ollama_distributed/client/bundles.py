"""Models in one file: written as it comes, sent without what the server has already.

Nothing here is trusted to be right: the server checks every byte of what is sent to it.
tarfile is imported on first use.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ollama_distributed.client.blobs import OnProgress
from ollama_distributed.client.transport import BLOB_CHUNK_BYTES

ASKED_BYTES = 1024 * 1024
"""Of blobs as large as this the server is asked whether it has them."""
_BLOBS = "blobs/sha256/"
_BLOCK_BYTES = 512
_MOST_MEMBERS = 65_536


class Target:
    """Where an exported file goes. A path gets its name when the file is whole, and not before."""

    def __init__(self, to: str | Path | BinaryIO, on_progress: OnProgress | None) -> None:
        self._on_progress = on_progress
        self._total = 0
        self._done = 0
        self._path = Path(to) if isinstance(to, str | Path) else None
        if self._path is None:
            assert not isinstance(to, str | Path)
            self._file = to
            return
        self._part = self._path.with_name(f".{self._path.name[:100]}.{secrets.token_hex(4)}.part")
        self._file = self._part.open("xb")

    def begin(self, total: int) -> None:
        """`total`: bytes to come."""
        self._total = total

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._done += len(data)
        if self._on_progress is not None:
            self._on_progress(self._done, self._total)

    def finish(self) -> int:
        """Bytes of the file."""
        self._file.flush()
        if self._path is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._part.replace(self._path)
        return self._done

    def discard(self) -> None:
        """It is not whole."""
        if self._path is not None:
            self._file.close()
            self._part.unlink(missing_ok=True)


class _Part(NamedTuple):
    begin: int
    end: int
    digest: str
    """Empty: it is always sent."""


class BundleUpload:
    """A bundle on its way to the server, without the blobs that are skipped. May be read several
    times when it is a file."""

    def __init__(self, source: str | Path | BinaryIO, on_progress: OnProgress | None) -> None:
        self._on_progress = on_progress
        self._source = Path(source) if isinstance(source, str | Path) else source
        self._parts: list[_Part] = []
        if isinstance(self._source, Path):
            self._parts = _parts(self._source)
        self._skipped: Collection[str] = ()

    def large(self) -> list[str]:
        """Digests worth asking the server for."""
        return [part.digest for part in self._parts if part.end - part.begin >= ASKED_BYTES and part.digest]

    def skip(self, digests: Collection[str]) -> None:
        """The server has these."""
        self._skipped = digests

    @property
    def size_bytes(self) -> int | None:
        """None: nobody knows before it was read."""
        return sum(part.end - part.begin for part in self._sent()) if self._parts else None

    def chunks(self) -> Iterator[bytes]:
        total, done = self.size_bytes or 0, 0
        for chunk in self._raw():
            yield chunk
            done += len(chunk)
            if self._on_progress is not None:
                self._on_progress(done, total)

    def _sent(self) -> list[_Part]:
        return [part for part in self._parts if part.digest not in self._skipped]

    def _raw(self) -> Iterator[bytes]:
        if not isinstance(self._source, Path):
            while chunk := self._source.read(BLOB_CHUNK_BYTES):
                yield chunk
            return
        with self._source.open("rb") as file:
            for part in self._sent():
                file.seek(part.begin)
                left = part.end - part.begin
                while left and (chunk := file.read(min(left, BLOB_CHUNK_BYTES))):
                    left -= len(chunk)
                    yield chunk


def _parts(path: Path) -> list[_Part]:
    """The file cut into its members; in one part when it is no archive that can be cut."""
    import tarfile

    size = path.stat().st_size
    parts: list[_Part] = []
    at = 0
    try:
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                end = info.offset_data + -(-info.size // _BLOCK_BYTES) * _BLOCK_BYTES
                if not info.isreg() or info.offset != at or end > size or len(parts) >= _MOST_MEMBERS:
                    return [_Part(0, size, "")]
                blob = info.name.removeprefix("./").removeprefix(_BLOBS)
                digest = f"sha256:{blob}" if len(blob) == 64 and blob.isalnum() else ""
                parts.append(_Part(at, end, digest))
                at = end
    except (tarfile.TarError, ValueError, EOFError):
        return [_Part(0, size, "")]
    return [*parts, _Part(at, size, "")]
