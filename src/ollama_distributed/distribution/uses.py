"""When each model was used last, and each file checked: in memory, written down now and then.

What is lost with a crash is a minute's; a model then counts as used a little earlier.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import msgspec

from ollama_distributed.base.clock import Clock
from ollama_distributed.models.names import BlobId, name_key
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.models.stored import StoredModel


class UsesRecord(msgspec.Struct, frozen=True, kw_only=True):
    """As it lies on the disk. Seconds since the Unix epoch."""

    used: dict[str, float] = {}
    """By `name_key`."""
    arrived: dict[str, float] = {}
    """By `name_key`; its manifest may be older."""
    checked: dict[str, float] = {}
    """By the digest's hex: read as a whole, and right."""


class Uses:
    def __init__(self, clock: Clock, record: UsesRecord | None = None) -> None:
        self._clock = clock
        record = record or UsesRecord()
        self._used, self._arrived, self._checked = record.used, record.arrived, record.checked
        self.hits = 0
        self.misses = 0
        self.changed = False
        """Since `record`."""

    def served(self, spec: ModelSpec) -> None:
        """A request that is answered here."""
        if spec.remote is None:
            self.hits += 1
            self.used(spec.name)

    def miss(self) -> None:
        """A request for a model that is not here."""
        self.misses += 1

    def used(self, name: str) -> None:
        self._used[name_key(name)] = self._clock.time()
        self.changed = True

    def found(self, models: Iterable[StoredModel]) -> None:
        """At the start: what was here before, and is not on record, came when its manifest says."""
        for model in models:
            self._arrived.setdefault(model.key, model.modified_at)

    def last_used(self, key: str) -> float:
        """Or its arrival: a model of which nothing is known has just come."""
        if key not in self._arrived:
            self._arrived[key] = self._clock.time()
            self.changed = True
        return max(self._used.get(key, 0.0), self._arrived[key])

    def recently(self, key: str, within_s: float) -> bool:
        """Used, not only arrived."""
        return self._clock.time() - self._used.get(key, 0.0) < within_s

    def checked(self, blob: BlobId) -> None:
        self._checked[blob.hex] = self._clock.time()
        self.changed = True

    def last_checked(self, blob: BlobId, arrived_at: float) -> float:
        """It was checked when it arrived, too."""
        return max(self._checked.get(blob.hex, 0.0), arrived_at)

    def keep(self, names: Collection[str], blobs: Collection[BlobId]) -> None:
        """Forget all others; they are gone."""
        hexes = {blob.hex for blob in blobs}
        for known, there in ((self._used, names), (self._arrived, names), (self._checked, hexes)):
            for one in [one for one in known if one not in there]:
                del known[one]
                self.changed = True

    def record(self) -> UsesRecord:
        self.changed = False
        return UsesRecord(used={**self._used}, arrived={**self._arrived}, checked={**self._checked})
