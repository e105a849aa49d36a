"""How busy each node is: servers heard it, the others ask the leader."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import anyio
import msgspec
import structlog

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import DeadlineExceeded, Invalid, OllamaDistributedError
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.membership.beats import Ears
from ollama_distributed.cluster.membership.ports import Leadership
from ollama_distributed.cluster.membership.utilization import Utilization
from ollama_distributed.cluster.ports import Coordination

ASK_S = 0.5
"""A list of nodes waits so long for figures, then shows older ones."""
ALERTS_KEPT_S = 10.0
"""While the leader does not answer; then what it said of others may be long over."""
FRESH_S = 0.5
"""An answer serves everyone who asks so soon after it: a watched table asks once a second."""
PAGE = 2000
"""Nodes in one answer, about 200 KB: the bus carries at most 1 MB."""
ALERTS_BYTES = 500_000
"""Of one answer; the rest is left out."""
USAGE_UNKNOWN = "usage.unknown"

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Ask(msgspec.Struct, frozen=True, omit_defaults=True):
    after: Annotated[str, msgspec.Meta(max_length=64)] = ""
    """Nodes with a later id only."""


class Page(msgspec.Struct, frozen=True):
    nodes: dict[str, Utilization]
    more: bool = False
    alerts: dict[str, bytes] = {}
    """Of those with any, as `Beat.alerts`."""


_encode = msgspec.msgpack.Encoder().encode
_asks = msgspec.msgpack.Decoder(Ask)
_pages = msgspec.msgpack.Decoder(Page)


def subject(node: str) -> str:
    return f"cmd.{node}.usage"


def answer(ears: Ears, data: bytes, now: float) -> bytes:
    """The page that `data` asks for.

    Raises:
        Invalid: it is no question.
    """
    try:
        after = _asks.decode(data).after
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise Invalid("it is no question for usage") from exc
    nodes = sorted(node for node in ears if node > after)
    page = nodes[:PAGE]
    more = len(nodes) > PAGE
    return _encode(
        Page({node: ears.usage(node, now) for node in page}, more=more, alerts=_alerts(ears, page, now))
    )


def _alerts(ears: Ears, nodes: Iterable[NodeId], now: float) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    room = ALERTS_BYTES
    for node in nodes:
        if told := ears.alerts(node, now):
            room -= len(told)
            if room < 0:
                break
            found[node] = told
    return found


class Usages:
    """What this node knows of everyone's figures."""

    def __init__(
        self,
        coordination: Coordination,
        consensus: Leadership,
        *,
        ears: Ears | None,
        clock: Clock,
    ) -> None:
        self._coordination = coordination
        self._consensus = consensus
        self._ears = ears
        self._clock = clock
        self._known: dict[NodeId, Utilization] = {}
        self._alerts: dict[NodeId, bytes] = {}
        self._known_at = float("-inf")
        self._asking = anyio.Lock()

    def get(self, node: NodeId) -> Utilization:
        now = self._clock.monotonic()
        if self._ears is not None:
            return self._ears.usage(node, now)
        return _aged(self._known.get(node), now - self._known_at)

    async def all(self) -> dict[NodeId, Utilization]:
        if self._ears is None:
            await self._refresh()
            return {node: self.get(node) for node in self._known}
        return {node: self.get(node) for node in self._ears}

    async def alerts(self) -> dict[NodeId, bytes]:
        """Of nodes with any."""
        if self._ears is None:
            await self._refresh()
            return self._alerts if self._clock.monotonic() - self._known_at <= ALERTS_KEPT_S else {}
        now = self._clock.monotonic()
        return {node: told for node in self._ears if (told := self._ears.alerts(node, now))}

    async def _refresh(self) -> None:
        """Ask the leader, one question at a time; nothing happens where it does not answer."""
        try:
            with anyio.fail_after(ASK_S):
                async with self._asking:
                    if self._clock.monotonic() - self._known_at >= FRESH_S:
                        await self._ask()
        except (TimeoutError, OllamaDistributedError, msgspec.DecodeError) as exc:
            log.info(USAGE_UNKNOWN, error=str(exc) or DeadlineExceeded.code)

    async def _ask(self) -> None:
        leader = self._consensus.get_leader()
        if leader is None:
            return
        known: dict[NodeId, Utilization] = {}
        alerts: dict[NodeId, bytes] = {}
        more, after = True, ""
        while more:
            data = await self._coordination.request(subject(leader), _encode(Ask(after)), timeout_s=ASK_S)
            page = _pages.decode(data)
            known.update((NodeId(node), usage) for node, usage in page.nodes.items())
            alerts.update((NodeId(node), told) for node, told in page.alerts.items())
            more, after = page.more and bool(page.nodes), max(page.nodes, default="")
        self._known, self._alerts, self._known_at = known, alerts, self._clock.monotonic()


def _aged(usage: Utilization | None, by_s: float) -> Utilization:
    if usage is None or usage.age_s is None:
        return Utilization()
    return msgspec.structs.replace(usage, age_s=usage.age_s + by_s)
