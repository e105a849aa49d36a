"""Events of a server, as a caller sees them: through lost connections and gaps. Pure.

What the server tells when one subscribes is compared with what was known: so after a new connection,
or where the server left events out, the caller is told of what changed and what is gone, as if nothing
had been missed but the steps between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import msgspec

from ollama_distributed.base.alerts import Alert
from ollama_distributed.base.cluster import NodeRow
from ollama_distributed.base.events import CHANNELS, Busy, Message, Problem, QueuedRequest
from ollama_distributed.base.queue import QueueNode
from ollama_distributed.client import errors
from ollama_distributed.client.answers import decoder_of
from ollama_distributed.client.wire import Transfer

Data: TypeAlias = QueuedRequest | QueueNode | NodeRow | Busy | Alert | Transfer
What: TypeAlias = Literal["now", "changed", "gone", "ready", "idle"]
"""`ready`: all that there is was told · `idle`: nothing came for a while."""

POLICY = 1008
"""The code with which a server ends what it does not allow; the reason is an error's code."""

_READ: Mapping[str, Callable[[bytes], Data]] = {
    "queue": decoder_of(QueuedRequest),
    "queues": decoder_of(QueueNode),
    "nodes": decoder_of(NodeRow),
    "metrics": decoder_of(Busy),
    "alerts": decoder_of(Alert),
    "transfers": decoder_of(Transfer),
}
_read_message = decoder_of(Message)
_read_problem = decoder_of(Problem)
_encode = msgspec.json.Encoder().encode
_CHOOSE = f"channels: give one or more of {', '.join(CHANNELS)}"


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


def _raise(_channel: str, error: errors.ClientError) -> None:
    raise error


class Follower:
    """What one caller follows.

    Args:
        channels: None: none yet.
        of: only of that request, node or transfer.
        refused: called with a channel that the server refuses or ends, and why; it is followed no more.
    """

    def __init__(
        self,
        channels: Sequence[str] | None = None,
        of: str = "",
        refused: Callable[[str, errors.ClientError], None] = _raise,
    ) -> None:
        if channels is not None and not channels:
            raise ValueError(_CHOOSE)
        self._refused = refused
        self._wanted: dict[str, set[str]] = {}
        """By channel: of what; "": of all."""
        self._known: dict[str, dict[str, tuple[bytes, Event]]] = {}
        """By channel and id, with its data as it came."""
        self._asked: dict[str, int] = {}
        """By channel: how many times it was asked what there is, and has not answered."""
        self._fresh: dict[str, set[str]] = {}
        """Ids told since it was asked last, until all is answered."""
        self._leaving: dict[str, int] = {}
        """By channel: how many times something of it was left, and the server has not said that it was."""
        self.heard_any = False
        """Since the connection began."""
        for name in channels or ():
            self.subscribe(name, of)

    def begin(self) -> list[str]:
        """What to send on a new connection."""
        self.heard_any = False
        self._asked.clear()
        self._leaving.clear()
        return self._ask_all()

    def subscribe(self, channel: str, of: str = "") -> list[str]:
        """What to send for it on the connection that there is.

        Raises:
            ValueError: there is no such channel.
        """
        if channel not in CHANNELS:
            raise ValueError(_CHOOSE)
        self._wanted.setdefault(channel, set()).add(of)
        self._known.setdefault(channel, {})
        return self._ask(channel)

    def unsubscribe(self, channel: str, of: str = "") -> list[str]:
        """As `subscribe`. What else of the channel is followed is told anew."""
        wanted = self._wanted.get(channel, set())
        if of not in wanted:
            return []
        wanted.remove(of)
        self._known[channel].clear()
        self._leaving[channel] = self._leaving.get(channel, 0) + 1
        if not wanted:
            self._forget(channel)
        return [_command("unsubscribe", channel, of), *self._ask(channel)]

    def follows(self, channel: str) -> bool:
        return channel in self._wanted

    def heard(self, text: str | bytes) -> tuple[list[Event], list[str]]:
        """What to tell the caller, and what to send.

        Raises:
            ClientError: of what cannot be read, and what `refused` raises.
        """
        message = _read_message(text.encode() if isinstance(text, str) else text)
        self.heard_any = True
        match message.type:
            case "gap":
                return [], self._ask_all()
            case "subscribed":
                return self._ready(message), []
            case "error":
                self._given_up(message)
            case "unsubscribed" if bytes(message.data) != b"null":
                self._given_up(message)
            case "unsubscribed":
                self._left(message.channel)
            case name if name in self._known and name not in self._leaving:
                return self._told(message), []
        return [], []  # of a newer server, of what is followed no more, or told anew in a moment

    def lost(self, code: int, reason: str) -> errors.ClientError:
        """Why the connection ended; whether another may be opened is its `retryable`."""
        if code == POLICY:
            return _error(reason, f"the server ended the connection for events: {reason or code}")
        return errors.ConnectionLost(f"the connection for events was closed ({code} {reason})".rstrip())

    def _ask_all(self) -> list[str]:
        return [command for name in self._wanted for command in self._ask(name)]

    def _ask(self, name: str) -> list[str]:
        """All of the channel, as what it says is compared with all that is known."""
        wanted = self._wanted.get(name, ())
        if wanted:
            self._asked[name] = self._asked.get(name, 0) + len(wanted)
            self._fresh[name] = set()
        return [_command("subscribe", name, of) for of in sorted(wanted)]

    def _forget(self, name: str) -> None:
        for kept in (self._wanted, self._known, self._asked, self._fresh):
            kept.pop(name, None)

    def _left(self, name: str) -> None:
        if self._leaving.get(name, 0) > 1:
            self._leaving[name] -= 1
        else:
            self._leaving.pop(name, None)

    def _given_up(self, message: Message) -> None:
        name = message.channel
        self._leaving.pop(name, None)
        wanted = self._wanted.get(name, set())
        wanted.discard(message.id)
        if message.type == "unsubscribed" or not wanted:
            self._forget(name)
        elif self._asked.get(name, 0) > 1:
            self._asked[name] -= 1
        else:
            self._asked.pop(name, None)
            self._fresh.pop(name, None)
        problem = _read_problem(bytes(message.data))
        self._refused(name, _error(problem.code, problem.message))

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
        name = message.channel
        if name not in self._asked:
            return []
        self._asked[name] -= 1
        if self._asked[name]:
            return []
        del self._asked[name]
        known, fresh = self._known[name], self._fresh.pop(name)
        gone = [_gone(known.pop(id_)[1], message.time) for id_ in known.keys() - fresh]
        return [*gone, Event(channel=name, what="ready", time=message.time)]

    def _event(self, message: Message, raw: bytes) -> Event:
        what: Any = message.event or "changed"
        data = _READ[message.type](raw)
        return Event(channel=message.type, what=what, id=message.id, time=message.time, data=data)


def _gone(event: Event, at: float) -> Event:
    data = event.data.over() if isinstance(event.data, Alert) else event.data
    return msgspec.structs.replace(event, what="gone", time=at, data=data)


def _command(kind: str, channel: str, of: str) -> str:
    return _encode({"type": kind, "channel": channel, "id": of}).decode()


def _error(code: str, message: str) -> errors.ClientError:
    return errors.BY_CODE.get(code, errors.Forbidden)(message)
