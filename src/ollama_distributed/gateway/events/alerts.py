"""The channel `alerts`: conditions that hold, until they are over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import msgspec

from ollama_distributed.base.alerts import Alert
from ollama_distributed.gateway.cluster_port import Cluster
from ollama_distributed.gateway.events.rows import Row

UNHEARD_S = 10.0
"""Nobody listened for so long: what was known then says nothing of now."""

_encode = msgspec.json.Encoder().encode


class Alerts:
    """Remembers what it told: since when, and what is over."""

    def __init__(self, cluster: Cluster, wall: Callable[[], float]) -> None:
        self._cluster = cluster
        self._wall = wall
        self._known: dict[str, Alert] = {}
        self._asked_at = 0.0

    async def ask(self) -> Iterable[Row]:
        return self._rows(await self._cluster.alerts())

    def _rows(self, found: Iterable[Alert]) -> Iterator[Row]:
        now = self._wall()
        before, self._known = self._known if now - self._asked_at < UNHEARD_S else {}, {}
        self._asked_at = now
        for alert in found:
            known = before.pop(alert.id, None)
            since = alert.since or (known.since if known is not None else now)
            self._known[alert.id] = alert = msgspec.structs.replace(alert, since=round(since, 3))
            yield _row(alert)
        for alert in before.values():
            yield _row(alert.over(), over=True)


def _row(alert: Alert, *, over: bool = False) -> Row:
    nameless = _encode(alert.nameless()) if alert.model else b""
    return Row(alert.id, _encode(alert), alert.name, over=over, nameless=nameless)
