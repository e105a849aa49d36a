"""What a person types: multi-line text in triple quotes, images by their path.

Pure but for looking whether a file is there (`images`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from ollama_distributed.cli.problem import Problem

QUOTES = '"""'
IMAGE_BYTES = 100 * 1024 * 1024
"""Larger than any photo; a device file or a video named `.png` must not fill the memory."""
_FILE_END = r"\.(?:jpe?g|png|webp)"
_IMAGE_PATH = re.compile(
    rf"\"(?P<double>[^\"\n]+?{_FILE_END})\""
    rf"|'(?P<single>[^'\n]+?{_FILE_END})'"
    rf"|(?P<plain>(?:~|\.{{1,2}})?/(?:\\.|[^\s\\])+?{_FILE_END})(?![\w.])",
    re.IGNORECASE,
)


class Lines:
    """Gathers typed lines into one message: `\"""` opens a block of lines and closes it."""

    def __init__(self) -> None:
        self._held: list[str] | None = None

    @property
    def open(self) -> bool:
        return self._held is not None

    def feed(self, line: str) -> str | None:
        """The whole message, or None while it is open."""
        if self._held is None:
            if not line.lstrip().startswith(QUOTES):
                return line
            self._held = []
            line = line.lstrip()[len(QUOTES) :]
            if not line:
                return None
        if line.rstrip().endswith(QUOTES):
            self._held.append(line.rstrip()[: -len(QUOTES)])
            whole, self._held = "\n".join(self._held), None
            return whole
        self._held.append(line)
        return None

    def drop(self) -> None:
        self._held = None


def images(
    text: str, read: Callable[[Path], bytes | None] | None = None
) -> tuple[str, list[bytes], list[Path]]:
    """The text without the image files that it names, their bytes, and their paths.

    A path that is no file stays in the text: it may be what the person talks about.
    """
    read = read or read_image
    found: list[bytes] = []
    paths: list[Path] = []
    kept: list[str] = []
    end = 0
    for match in _IMAGE_PATH.finditer(text):
        name = match["double"] or match["single"] or re.sub(r"\\(.)", r"\1", match["plain"])
        path = Path(name).expanduser()
        data = read(path)
        if data is None:
            continue
        found.append(data)
        paths.append(path)
        kept.append(text[end : match.start()])
        end = match.end()
    kept.append(text[end:])
    return "".join(kept).strip() if found else text, found, paths


def read_image(path: Path) -> bytes | None:
    """Raises `Problem` for a file that is too large."""
    if not path.is_file():
        return None
    if path.stat().st_size > IMAGE_BYTES:
        raise Problem(f"{path} is larger than {IMAGE_BYTES // 1024**2} MiB")
    return path.read_bytes()
