"""The sessions that `login` keeps, one for each server: `credentials.json` in the user's config folder,
mode 0600."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ollama_distributed.cli.problem import Problem

_MOST_BYTES = 4 * 1024 * 1024
_OWNER_ONLY = 0o600


class Saved(NamedTuple):
    token: str
    user: str
    ca: str | None
    """PEM text of the authority that signed the server's certificate."""
    expires_at: float


def path_of(environ: Mapping[str, str]) -> Path:
    base = environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "ollama-distributed" / "credentials.json"


def find(url: str, environ: Mapping[str, str]) -> Saved | None:
    """The session at the server with this base URL; None: there is none that may still hold."""
    told = _read(path_of(environ)).get(url)
    if not isinstance(told, dict) or not isinstance(told.get("token"), str):
        return None
    expires_at = told.get("expires_at")
    if not isinstance(expires_at, int | float) or expires_at <= time.time():
        return None
    ca = told.get("ca")
    return Saved(told["token"], str(told.get("user", "")), ca if isinstance(ca, str) else None, expires_at)


def keep(url: str, saved: Saved, environ: Mapping[str, str]) -> Path:
    """Put it in the place of what was there for this server.

    Raises:
        OSError: the file cannot be written.
    """
    path = path_of(environ)
    servers = _read(path)
    servers[url] = {key: value for key, value in saved._asdict().items() if value is not None}
    _write(path, servers)
    return path


def forget(url: str, environ: Mapping[str, str]) -> None:
    path = path_of(environ)
    servers = _read(path)
    if servers.pop(url, None) is not None:
        _write(path, servers)


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise Problem(f"{path} can be read by others; do: chmod 600 {path}")
            told = json.loads(file.read(_MOST_BYTES))
    except FileNotFoundError:
        return {}
    except ValueError as damaged:
        raise Problem(f"{path} is damaged; remove it and sign in again") from damaged
    servers = told.get("servers") if isinstance(told, dict) else None
    return dict(servers) if isinstance(servers, dict) else {}


def _write(path: Path, servers: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    staged = path.with_name(f".{path.name}.new")
    staged.unlink(missing_ok=True)  # with what mode it was left is not known
    file = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _OWNER_ONLY)
    with os.fdopen(file, "w") as out:
        json.dump({"servers": servers}, out, indent=2)
        out.write("\n")
    staged.replace(path)
