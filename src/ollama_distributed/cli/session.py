"""Which server a command talks to, with which key, and how its result is printed.

The server: `--host`, else `OLLAMA_HOST` (but `0.0.0.0`, which says where to listen), else the node of this
machine (the `url` in `DATA_DIR/admin.json`, written by its first start), else http://127.0.0.1:8080.
The key: `--api-key`, else the environment, else the session that `login` kept for this server, else
the key in `admin.json`, which goes only to the address that the file itself names.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple
from urllib.parse import urlsplit

from ollama_distributed.cli import credentials
from ollama_distributed.cli.problem import Problem
from ollama_distributed.client import address

if TYPE_CHECKING:
    import ssl

    from ollama_distributed.client.sync import SyncClient

Output = Literal["table", "json", "yaml"]
_ADMIN_FILE_BYTES = 1024 * 1024
"""admin.json is under 10 KB; a larger file is something else."""


class Admin(NamedTuple):
    """What `admin.json` tells."""

    url: str
    key: str
    ca: str | None


class Target(NamedTuple):
    url: str
    api_key: str | None
    ca: str | None
    """PEM text of the authority that signed the server's certificate."""

    def tls(self) -> ssl.SSLContext:
        import ssl

        return ssl.create_default_context(cadata=self.ca)


@dataclass
class Session:
    """The global options of one command line."""

    host: str | None = None
    api_key: str | None = None
    data_dir: str | None = None
    output: Output = "table"

    def target(self, *, signed_in: bool = True) -> Target:
        """`signed_in` False: without the session that `login` kept.

        Raises:
            Problem: an address or key that cannot be used.
        """
        try:
            return self._target(signed_in=signed_in)
        except ValueError as exc:
            raise Problem(str(exc)) from exc

    def _target(self, *, signed_in: bool) -> Target:
        admin = read_admin(
            Path(self.data_dir).expanduser() if self.data_dir else default_data_dir(os.environ)
        )
        named = self.host or os.environ.get("OLLAMA_HOST", "").strip()
        if admin is not None and not self.host and address.is_everywhere(named):
            named = ""  # set for Ollama's server, on this machine; our node's address is known
        url = address.base_url(named or (admin.url if admin else address.DEFAULT_URL))
        key = address.api_key(self.api_key, os.environ)
        ca = None
        here = admin is not None and _same_server(url, admin.url)
        if admin is not None and here:
            url = address.base_url(admin.url)  # never to what else `localhost` may resolve to
            ca = admin.ca
        if key is None and self.api_key is None and signed_in:
            saved = credentials.find(url, os.environ)
            if saved is not None:
                return Target(url, saved.token, saved.ca or ca)
        if admin is not None and here and key is None and self.api_key is None:
            key = address.api_key(admin.key, {})
        return Target(url, key, ca)

    def client(self, *, retries: int = 2, timeout_s: float | None = None) -> SyncClient:
        """A client for the command's one conversation; close it with `with`."""
        from ollama_distributed.client.sync import SyncClient
        from ollama_distributed.client.transport import TIMEOUT_S

        target = self.target()
        return SyncClient(
            target.url,
            target.api_key or "",
            timeout=timeout_s or TIMEOUT_S,
            retries=retries,
            verify=True if target.ca is None else target.tls(),
        )


def default_data_dir(environ: os._Environ[str] | dict[str, str]) -> Path:
    """Where a node keeps its state; the same rule as `node/settings.py`."""
    named = environ.get("OLLAMA_DISTRIBUTED_DATA_DIR")
    if named:
        return Path(named).expanduser()
    base = environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(base).expanduser() / "ollama-distributed"


def state_dir(environ: os._Environ[str] | dict[str, str]) -> Path:
    """Where the REPL keeps its history."""
    base = environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "ollama-distributed"


def read_admin(data_dir: Path) -> Admin | None:
    """The node's admin file; None when there is none, or it is not ours to read."""
    import json

    try:
        with (data_dir / "admin.json").open("rb") as file:
            told = json.loads(file.read(_ADMIN_FILE_BYTES))
    except (OSError, ValueError):
        return None
    if (
        not isinstance(told, dict)
        or not isinstance(told.get("url"), str)
        or not isinstance(told.get("key"), str)
    ):
        return None
    ca = told.get("ca")
    return Admin(told["url"], told["key"], ca if isinstance(ca, str) and ca else None)


def _same_server(url: str, other: str) -> bool:
    """The same scheme, port and host; `localhost` counts as a loopback address of the file.

    127.0.0.1 and ::1 are not the same: another user may listen on the other one.
    """
    try:
        one, two = urlsplit(address.base_url(url)), urlsplit(address.base_url(other))
    except ValueError:
        return False
    if (one.scheme, one.port) != (two.scheme, two.port):
        return False
    return one.hostname == two.hostname or (one.hostname == "localhost" and address.is_loopback(other))
