"""Decides which replicas are left alone for a while after they failed (pure).

Of each node and model: well → ejected (asked only where nobody else is left) → probed when its
time is over → returning (asked more and more often) → well. What it says is one gateway's own
experience and is told to nobody: a node that this one cannot reach may be fine for others.

| state     | a failure                  | a good answer, or a probe that went well | time      |
| --------- | -------------------------- | ---------------------------------------- | --------- |
| well      | ejected for `FIRST_S`      |                                          |           |
| ejected   |                            | returning                                | probe due |
| returning | ejected for twice as long  |                                          | well      |
"""

from __future__ import annotations

from collections.abc import Callable

from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.routing import Circuit

FIRST_S = 1.0
LONGEST_S = 30.0
RETURN_S = 10.0
"""Over which a replica that is well again gets its share back."""
FORGIVEN_S = 60.0
"""After so long without a failure the next one is a first one again."""
MOST = 4096
"""Replicas remembered; all are forgiven when so many failed."""

Replica = tuple[NodeId, str]
"""Node and canonical name of the model."""


class _Record:
    __slots__ = ("probing", "returned_s", "strikes", "until_s", "why")

    def __init__(self) -> None:
        self.why = ""
        self.strikes = 0
        self.until_s = 0.0
        """A probe is due from then on."""
        self.returned_s: float | None = None
        """None: it is ejected."""
        self.probing = False


class Health:
    """Times are a monotonic clock's, in seconds."""

    __slots__ = ("_records",)

    def __init__(self) -> None:
        self._records: dict[Replica, _Record] = {}

    def __bool__(self) -> bool:
        """Whether anything failed lately."""
        return bool(self._records)

    def failed(self, replica: Replica, now: float, why: str = "") -> bool:
        """It was lost, stalled, slow or did not load; whether that ejected it."""
        record = self._records.get(replica)
        if record is None:
            if len(self._records) >= MOST:
                self._records.clear()
            record = self._records[replica] = _Record()
        elif record.returned_s is None:
            if record.probing:
                record.probing = False
                self._eject(record, now)
            return False
        elif now - record.returned_s > FORGIVEN_S:
            record.strikes = 0
        record.why = why
        self._eject(record, now)
        return True

    def _eject(self, record: _Record, now: float) -> None:
        record.strikes += 1
        record.returned_s = None
        record.until_s = now + min(FIRST_S * 2.0 ** (record.strikes - 1), LONGEST_S)

    def well(self, replica: Replica, now: float) -> bool:
        """It answered; whether it was ejected until now."""
        record = self._records.get(replica)
        if record is None or record.returned_s is not None:
            return False
        record.returned_s, record.probing = now, False
        return True

    def shunned(self, replica: Replica, now: float, chance: Callable[[], float]) -> bool:
        """Whether this time others come first. `chance`: 0..1."""
        record = self._records.get(replica)
        if record is None:
            return False
        if record.returned_s is None:
            return True
        back_s = now - record.returned_s
        if back_s > FORGIVEN_S:
            del self._records[replica]
        return back_s < RETURN_S and chance() >= back_s / RETURN_S

    def circuit(self, replica: Replica, now: float) -> tuple[Circuit, str]:
        """Ejected is `open`, returning `half-open`; and why it was ejected last."""
        record = self._records.get(replica)
        if record is None or (record.returned_s is not None and now - record.returned_s >= RETURN_S):
            return "closed", ""
        return ("open" if record.returned_s is None else "half-open"), record.why

    def due(self, now: float) -> list[Replica]:
        """Those to probe now; each is named once until `failed` or `well` is told of it."""
        found = []
        for replica, record in self._records.items():
            if record.returned_s is None and not record.probing and now >= record.until_s:
                record.probing = True
                found.append(replica)
        return found

    def forget(self, known: Callable[[Replica], bool]) -> None:
        """Drop those that are no replicas any more."""
        for replica in [one for one in self._records if not known(one)]:
            del self._records[replica]
