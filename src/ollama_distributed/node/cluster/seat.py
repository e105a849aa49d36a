"""What a node remembers of its place in the cluster between two starts.

`DATA_DIR/cluster.json`. None of it is a secret or a decision: the replicated state says what
is true, this says where to look for it while the state cannot be read yet.
"""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import msgspec

from ollama_distributed.node.data_dir import read_file, write_file

FILE = "cluster.json"


class Seat(msgspec.Struct, frozen=True, kw_only=True):
    cluster: str
    """Whose seat it is; another cluster's is worth nothing."""
    open: bool = False
    """The listeners are open to other machines."""
    hop_port: int = 0
    """Of the cluster listener, taken last time; 0: none yet."""
    servers: tuple[str, ...] = ()
    """`host:port` of the cluster listeners of servers, as last seen."""
    nats: tuple[str, ...] = ()
    """`host:port` of the coordination servers, as last seen."""
    members: int = 1
    """Nodes in the cluster, this one among them, as last seen."""


class SeatFile:
    """The seat in memory and on disk."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / FILE
        self._known: Seat | None = None
        self._changing = threading.Lock()
        """What two threads change at once are both in the file after."""

    def read(self, cluster: str) -> Seat:
        """The seat in `cluster`; a fresh one where there is none. Blocking, small."""
        known = read_file(self._path, Seat)
        self._known = known if known is not None and known.cluster == cluster else Seat(cluster=cluster)
        return self._known

    @property
    def now(self) -> Seat:
        assert self._known is not None, "read first"
        return self._known

    def put(self, **fields: Any) -> Seat:
        """Replace fields; written only where something differs. Blocking, small."""
        with self._changing:
            changed = msgspec.structs.replace(self.now, **fields)
            if changed != self.now:
                write_file(self._path, changed)
                self._known = changed
            return changed

    async def change(self, **fields: Any) -> Seat:
        """As `put`, from the loop."""
        return await asyncio.to_thread(self.put, **fields)
