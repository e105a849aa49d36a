"""Events of a server, as a caller sees them: through lost connections and gaps. Pure.

What the server tells when one subscribes is compared with what was known: so after a new connection,
or where the server left events out, the caller is told of what changed and what is gone, as if nothing
had been missed but the steps between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import msgspec

from ollama_distributed.base.cluster import NodeRow
from ollama_distributed.base.events import CHANNELS, Busy, Channel, Message, Problem, QueuedRequest
from ollama_distributed.base.queue import QueueNode
from ollama_distributed.client import errors
from ollama_distributed.client.answers import decoder_of
from ollama_distributed.client.wire import Transfer

Data: TypeAlias = QueuedRequest | QueueNode | NodeRow | Busy | Transfer
What: TypeAlias = Literal["now", "changed", "gone", "ready", "idle"]
"""`ready`: all that there is was told · `idle`: nothing came for a while."""

POLICY = 1008
"""The code with which a server ends what it does not allow; the reason is an error's code."""

_READ: Mapping[str, Callable[[bytes], Data]] = {
    "queue": decoder_of(QueuedRequest),
    "queues": decoder_of(QueueNode),
    "nodes": decoder_of(NodeRow),
    "metrics": decoder_of(Busy),
    "transfers": decoder_of(Transfer),
}
_read_message = decoder_of(Message)
_read_problem = decoder_of(Problem)
_encode = msgspec.json.Encoder().encode


class Event(msgspec.Struct, frozen=True, kw_only=True):
    channel: str
    """Empty for `idle`."""
    what: What
    id: str = ""
    time: float = 0.0
    """Seconds since the Unix epoch, by the server's clock."""
    data: Data | None = None
    """None for `ready` and `idle`. Of what is gone: as it was last."""


IDLE = Event(channel="", what="idle")


class Follower:
    """What one caller follows. `of`: only of that request, node or transfer."""

    def __init__(self, channels: Sequence[Channel], of: str = "") -> None:
        unknown = [name for name in channels if name not in CHANNELS]
        if unknown or not channels:
            raise ValueError(f"channels: give one or more of {', '.join(CHANNELS)}")
        self._of = of
        self._known: dict[str, dict[str, tuple[bytes, Event]]] = {name: {} for name in channels}
        """By channel and id, with its data as it came."""
        self._fresh: dict[str, set[str]] = {}
        """Ids told since a channel was subscribed to, until all are."""
        self.heard_any = False
        """Since the connection began."""

    def begin(self) -> list[str]:
        """What to send on a new connection."""
        self.heard_any = False
        self._fresh.clear()
        return [self._subscribe(name) for name in self._known]

    def heard(self, text: str | bytes) -> tuple[list[Event], list[str]]:
        """What to tell the caller, and what to send.

        Raises:
            ClientError: the server refuses a channel, or says what cannot be read.
        """
        message = _read_message(text.encode() if isinstance(text, str) else text)
        self.heard_any = True
        match message.type:
            case "gap":
                return [], [self._subscribe(name) for name in self._known]
            case "subscribed":
                return self._ready(message), []
            case "error" | "unsubscribed":
                problem = _read_problem(bytes(message.data))
                raise _error(problem.code, problem.message)
            case name if name in self._known:
                return self._told(message), []
        return [], []  # of a newer server

    def lost(self, code: int, reason: str) -> errors.ClientError:
        """Why the connection ended; whether another may be opened is its `retryable`."""
        if code == POLICY:
            return _error(reason, f"the server ended the connection for events: {reason or code}")
        return errors.ConnectionLost(f"the connection for events was closed ({code} {reason})".rstrip())

    def _subscribe(self, name: str) -> str:
        self._fresh[name] = set()
        return _encode({"type": "subscribe", "channel": name, "id": self._of}).decode()

    def _told(self, message: Message) -> list[Event]:
        known, raw = self._known[message.type], bytes(message.data)
        before = known.get(message.id)
        if message.event == "gone":
            known.pop(message.id, None)
            return [self._event(message, raw)] if before is not None else []
        if message.type in self._fresh:
            self._fresh[message.type].add(message.id)
        if before is not None and before[0] == raw:
            return []
        event = self._event(message, raw)
        if before is not None and event.what == "now":
            event = msgspec.structs.replace(event, what="changed")
        known[message.id] = raw, event
        return [event]

    def _ready(self, message: Message) -> list[Event]:
        known, fresh = self._known.get(message.channel), self._fresh.pop(message.channel, None)
        if known is None or fresh is None:
            return []
        gone = [known.pop(id_)[1] for id_ in known.keys() - fresh]
        events = [msgspec.structs.replace(one, what="gone", time=message.time) for one in gone]
        return [*events, Event(channel=message.channel, what="ready", time=message.time)]

    def _event(self, message: Message, raw: bytes) -> Event:
        what: Any = message.event or "changed"
        data = _READ[message.type](raw)
        return Event(channel=message.type, what=what, id=message.id, time=message.time, data=data)


def _error(code: str, message: str) -> errors.ClientError:
    return errors.BY_CODE.get(code, errors.Forbidden)(message)
