"""A file or bytes on its way to the server's blob store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from ollama_distributed.client.transport import bytes_chunks, digest_of, file_chunks

OnProgress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all), from the thread that sends."""


class Upload:
    """May be read several times: a send that failed starts over."""

    def __init__(self, source: bytes | str | Path, on_progress: OnProgress | None = None) -> None:
        self._source = source if isinstance(source, bytes) else Path(source)
        self._on_progress = on_progress
        if isinstance(self._source, bytes):
            self.size_bytes = len(self._source)
        else:
            self.size_bytes = self._source.stat().st_size

    def _raw(self) -> Iterator[bytes]:
        return bytes_chunks(self._source) if isinstance(self._source, bytes) else file_chunks(self._source)

    def digest(self) -> str:
        """Reads the whole source: 1 s for each 1.3 GB of one core."""
        return digest_of(self._raw())

    def chunks(self) -> Iterator[bytes]:
        done = 0
        for chunk in self._raw():
            yield chunk
            done += len(chunk)
            if self._on_progress is not None:
                self._on_progress(done, self.size_bytes)
