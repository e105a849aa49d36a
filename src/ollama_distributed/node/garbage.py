"""When Python's garbage collector looks at what the node has made."""

from __future__ import annotations

import asyncio
import gc

YOUNG = 10_000
"""New objects before the collector looks at them (half a millisecond); Python's own 700 are made by a few
requests, and nearly all are gone by then without it."""
SETTLED_S = 10.0
"""After the start the cluster's modules are loaded too."""


def settle() -> None:
    """What the start made stays for good. A collector that walks it again and again would stop
    the loop for 50 ms each time; so it is put out of its way now, and once the cluster is up."""
    gc.freeze()
    gc.set_threshold(YOUNG, 20, 50)
    asyncio.get_running_loop().call_later(SETTLED_S, gc.freeze)
