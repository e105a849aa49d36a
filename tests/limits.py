"""Bounds on real time, for machines of any speed.

The product's promises in seconds are of a machine that is not starved: `make accept-*` sets
STRICT_LIMITS=1 and asserts them. Elsewhere a bound only tells late from never.
"""

from __future__ import annotations

import os

STRICT = os.environ.get("STRICT_LIMITS") == "1"
SOON_S = 120.0
"""For what must happen at all. A test that needs it to be quick compares with something that it
measures in the same run, or makes the slow way endless."""


def limit_s(promised_s: float) -> float:
    """The promise itself where it can be asserted."""
    return promised_s if STRICT else max(SOON_S, 5 * promised_s)
