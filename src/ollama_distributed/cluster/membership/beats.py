"""What a node says of itself every second or so, and what a server has heard of all nodes.

Pure: arrival times are arguments, of the hearer's own monotonic clock; what a beat says of the
time is never trusted. Who sent a beat is in its subject (`hb.<node id>`), which the bus lets
only that node use, so nothing in the beat names a node.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Annotated

import msgspec

from ollama_distributed.base.errors import Invalid
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.membership.utilization import Utilization

SUBJECT = "hb."
MAX_BEAT_BYTES = 16 * 1024
MAX_LOADED = 32
"""Models that a beat names; a node that holds more loaded names the first ones."""
SMALL_CLUSTER = 100
"""Up to so many nodes everyone beats once a second."""
SLOWEST_S = 5.0
"""At 10,000 nodes: 2,000 beats/s, 13 % of a core of the coordination engine (DESIGN.md)."""
MISSED_BEATS = 3
"""So many beats missed make a node suspect."""
OFFLINE_AFTER_S = 8.0
"""Silence that makes a node offline; longer where beats are slow, see `offline_after_s`."""
UNKNOWN_KEPT_S = 600.0
"""What was heard of a node that is in no record is kept so long."""

_Interval = Annotated[float, msgspec.Meta(ge=0.05, le=60.0)]


class Beat(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    boot: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    """As in the node's advert."""
    seq: Annotated[int, msgspec.Meta(ge=0)]
    """Rises with each beat of one boot."""
    interval_s: _Interval = 1.0
    """The next beat comes within so long."""
    usage: Utilization = Utilization()
    loaded: Annotated[tuple[str, ...], msgspec.Meta(max_length=MAX_LOADED)] = ()
    """Models in memory, by short name."""
    alerts: bytes = b""
    """What is wrong there, as `base.alerts` encodes it: a kind that the hearer does not know is no reason
    to refuse the beat."""
    stopping: bool = False
    """The last beat of this boot: a clean stop."""


class Heard(msgspec.Struct, frozen=True, kw_only=True):
    """The last that was heard of a node."""

    boot: str
    seq: int
    interval_s: float
    at: float
    steady_since: float
    """Since then no pause was long enough to make it suspect, and it was one boot."""
    usage: Utilization = Utilization()
    loaded: tuple[str, ...] = ()
    alerts: bytes = b""
    stopped: bool = False
    """This boot said goodbye."""
    born_at: float
    """When this boot was first heard."""
    earlier_boot: str = ""
    """Of the life before: a late beat of it is no news."""
    earlier_life_s: float = 0.0
    """How long that one was heard."""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Beat)


def encode_beat(beat: Beat) -> bytes:
    return _encoder.encode(beat)


def decode_beat(data: bytes) -> Beat:
    """
    Raises:
        Invalid: not a beat.
    """
    if len(data) > MAX_BEAT_BYTES:
        raise Invalid(f"a beat has at most {MAX_BEAT_BYTES} bytes, this one {len(data)}")
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise Invalid(f"not a beat: {exc}") from exc


def beat_interval_s(nodes: int) -> float:
    """How often each of `nodes` beats: every second up to 100 of them, then slower with the
    logarithm (3 s at 1,000), 5 s from 10,000 on."""
    if nodes <= SMALL_CLUSTER:
        return 1.0
    return min(SLOWEST_S, 1.0 + 2.0 * math.log10(nodes / SMALL_CLUSTER))


def suspect_after_s(interval_s: float) -> float:
    return MISSED_BEATS * interval_s


def offline_after_s(interval_s: float) -> float:
    """8 s; 5 intervals where beats are so slow that 8 s would be no more than a missed one."""
    return max(OFFLINE_AFTER_S, 5 * interval_s)


def hear(before: Heard | None, beat: Beat, at: float) -> Heard:
    """What is known once `beat` arrived. Beats out of order and of an earlier life change
    nothing, nor does a beat after a goodbye.

    Which of two lives is the earlier one is not always plain: a last beat of the dead one may
    be overtaken by the first of the next. The one that goes on beating alone is alive.
    """
    if before is None:
        return _heard(beat, at, steady_since=at, born_at=at)
    if beat.boot != before.boot:
        if beat.boot == before.earlier_boot and at - before.at <= suspect_after_s(before.interval_s):
            return before
        life_s = before.at - before.born_at
        return _heard(beat, at, steady_since=at, born_at=at, earlier_boot=before.boot, earlier_life_s=life_s)
    if beat.seq <= before.seq or before.stopped:
        return before
    steady = at - before.at <= suspect_after_s(before.interval_s)
    return _heard(
        beat,
        at,
        steady_since=before.steady_since if steady else at,
        born_at=before.born_at,
        earlier_boot=before.earlier_boot,
        earlier_life_s=before.earlier_life_s,
    )


def _heard(
    beat: Beat,
    at: float,
    *,
    steady_since: float,
    born_at: float,
    earlier_boot: str = "",
    earlier_life_s: float = 0.0,
) -> Heard:
    return Heard(
        boot=beat.boot,
        seq=beat.seq,
        interval_s=beat.interval_s,
        at=at,
        steady_since=steady_since,
        usage=beat.usage,
        loaded=beat.loaded,
        alerts=beat.alerts,
        stopped=beat.stopping,
        born_at=born_at,
        earlier_boot=earlier_boot,
        earlier_life_s=earlier_life_s,
    )


class Ears:
    """What a server has heard of everyone, itself included.

    Its own beats come back to it through the bus: while they do not, it is deaf (cut off, or
    this process stood still), and the silence of others says nothing about them.
    """

    def __init__(self, node: NodeId) -> None:
        self._node = node
        self._heard: dict[NodeId, Heard] = {}
        self._hears_since: float | None = None

    def __len__(self) -> int:
        return len(self._heard)

    def __iter__(self) -> Iterator[NodeId]:
        return iter(self._heard)

    def get(self, node: NodeId) -> Heard | None:
        return self._heard.get(node)

    def hear(self, node: NodeId, beat: Beat, at: float) -> Heard:
        if node == self._node and self.hears_since(at) is None:
            self._hears_since = at
        heard = self._heard[node] = hear(self._heard.get(node), beat, at)
        return heard

    def hears_since(self, now: float) -> float | None:
        """Since when silence means something; None: deaf now."""
        own = self._heard.get(self._node)
        # Sooner than anyone would be suspect: deafness must show before it accuses others.
        if own is None or now - own.at > (MISSED_BEATS - 1) * own.interval_s:
            return None
        return self._hears_since

    def usage(self, node: NodeId, now: float) -> Utilization:
        """The last figures, with their age; none of a node that was never heard."""
        heard = self._heard.get(node)
        if heard is None:
            return Utilization()
        return msgspec.structs.replace(heard.usage, age_s=max(0.0, now - heard.at))

    def alerts(self, node: NodeId, now: float) -> bytes:
        """Its last, while it is heard."""
        heard = self._heard.get(node)
        if heard is None or heard.stopped or now - heard.at > offline_after_s(heard.interval_s):
            return b""
        return heard.alerts

    def forget(self, known: Collection[NodeId], now: float) -> None:
        """Drop nodes that are in no record (`known`) and long silent."""
        gone = [n for n, h in self._heard.items() if n not in known and now - h.at > UNKNOWN_KEPT_S]
        for node in gone:
            del self._heard[node]
