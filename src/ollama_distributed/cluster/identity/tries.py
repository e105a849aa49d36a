"""How often an address may be wrong: a token bucket per source. Pure, bounded in size."""

from __future__ import annotations

import ipaddress
from collections import OrderedDict

MAX_WRONG = 5
WINDOW_S = 60.0
"""`MAX_WRONG` at once, then one more each `WINDOW_S / MAX_WRONG`: never more than five a
minute in the long run, from one address. At 256 bits even that is courtesy."""
MAX_SOURCES = 10_000
"""Some 2 MB; the source that was quiet longest is forgotten first."""


class WrongTries:
    """Counts wrong tries by source address (IPv6: by /64, which one machine may own whole)."""

    def __init__(self) -> None:
        self._full_at: OrderedDict[str, float] = OrderedDict()
        """When a source's bucket is full again; a source that is not here has a full one."""

    def wait_s(self, source: str, now: float) -> float:
        """Seconds until `source` may try; 0: now."""
        full_at = self._full_at.get(bucket_of(source), now)
        return max(0.0, full_at - now - WINDOW_S + WINDOW_S / MAX_WRONG)

    def wrong(self, source: str, now: float) -> None:
        """`source` did not know the secret."""
        bucket = bucket_of(source)
        self._full_at[bucket] = max(self._full_at.pop(bucket, now), now) + WINDOW_S / MAX_WRONG
        if len(self._full_at) > MAX_SOURCES:
            self._full_at.popitem(last=False)


def bucket_of(source: str) -> str:
    """The address, or the /64 of an IPv6 one."""
    try:
        address = ipaddress.ip_address(source.partition("%")[0])
    except ValueError:
        return source[:64]
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))
