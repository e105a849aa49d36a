"""What a machine notes while it moves the state from one set of servers to another.

| step      | files                                        | a crash here                           |
|-----------|----------------------------------------------|----------------------------------------|
| `copying` | store as it was                              | goes back: thaw                        |
| `forming` | old store set aside, new store being filled  | goes back: old store, old seat, thaw   |
| `settled` | new store complete, old one still there      | goes on: new seat, thaw, drop the old  |

Until `settled` the new stream is frozen and nobody but this machine thaws it, so nothing can
have been written to it: going back loses nothing. After it, the old one is worth nothing.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import msgspec

from ollama_distributed.adapters.coordination.nats.seat import Formation, Seat
from ollama_distributed.adapters.durable import replace_file, sync_folder
from ollama_distributed.base.codec import encode_pretty
from ollama_distributed.base.errors import Invalid

JOURNAL_NAME = "move.json"
COPY_NAME = "move.copy"
SET_ASIDE = "store.before-move"

Step = Literal["copying", "forming", "settled"]


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """A move under way."""

    step: Step
    source: Seat
    """What this machine's server was."""
    target: Formation | None
    """What it becomes; None: standalone."""


class Journal:
    """In the server's folder. Blocking, small."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / JOURNAL_NAME
        self._folder = folder
        self.copy = folder / COPY_NAME
        self._store = folder / "store"
        self._aside = folder / SET_ASIDE

    def read(self) -> Move | None:
        """
        Raises:
            Invalid: the file is damaged.
        """
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=Move)
        except FileNotFoundError:
            return None
        except msgspec.MsgspecError as exc:
            raise Invalid(f"{self._path} is damaged: {exc}") from exc

    def write(self, move: Move) -> None:
        replace_file(self._path, encode_pretty(move))

    def set_aside(self) -> None:
        """Keep the store for going back. The server is stopped."""
        self._store.rename(self._aside)
        sync_folder(self._folder)

    def put_back(self) -> None:
        """Undo `set_aside`, if it was done. The server is stopped."""
        if self._aside.exists():
            if self._store.exists():
                shutil.rmtree(self._store)
            self._aside.rename(self._store)
            sync_folder(self._folder)

    def close(self) -> None:
        """The move is over, whichever way: nothing of it is needed any more."""
        self.copy.unlink(missing_ok=True)
        if self._aside.exists():
            shutil.rmtree(self._aside)
        self._path.unlink(missing_ok=True)
        sync_folder(self._folder)
