"""One WebSocket, from its handshake's verdict to its end: commands in, events out.

Who is there is asked again while it is open, as for each request of a connection: a key that is
revoked ends it, a right that is lost ends the subscriptions that need it (`reference/security.md`,
S-07), within `RECHECK_S`. Figures are those of its table in 3.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from ollama_distributed.access.roles import demand
from ollama_distributed.base import events
from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import Conflict, Invalid, Malformed, OllamaDistributedError
from ollama_distributed.base.events import Command, Gap, Message, Problem, What
from ollama_distributed.base.identity import Identity
from ollama_distributed.cluster.tasks import end
from ollama_distributed.gateway.asgi import Receive, Send
from ollama_distributed.gateway.errors import as_ours
from ollama_distributed.gateway.events.channels import OWN, Channel, sees, told_to
from ollama_distributed.gateway.events.hub import Hub
from ollama_distributed.gateway.events.outbox import Outbox, Unread
from ollama_distributed.gateway.events.rows import Row
from ollama_distributed.gateway.gate import Gate, Head

MOST_MESSAGES_S = 50
"""A client's messages in one second."""
MOST_MESSAGE_BYTES = 64 * 1024
MOST_SUBSCRIPTIONS = 32
RECHECK_S = 2.0
"""How often it is asked who is there: a lost right must not hold for more than 5 s."""
LONGEST_S = 3600.0
"""Then the client connects again: no connection outlives what was decided about it long ago."""

POLICY, TOO_BIG, AGAIN = 1008, 1009, 1013
"""RFC 6455 7.4.1 and the IANA registry: it broke a rule; a message is too big; try again later."""

_COMMAND = msgspec.json.Decoder(Command)
_encode = msgspec.json.Encoder().encode


class Goodbye(NamedTuple):
    """Why the server ends a connection."""

    code: int
    reason: str
    """Up to 123 bytes."""


class Connection:
    """Implements `hub.Listener`. `head`: of the handshake."""

    def __init__(self, hub: Hub, gate: Gate, head: Head, identity: Identity, clock: Clock) -> None:
        self._hub = hub
        self._gate = gate
        self._head = head
        self._identity = identity
        self._clock = clock
        self._began = self._checked = clock.monotonic()
        self._wanted: dict[str, set[str]] = {}
        """By channel: of what one wants to hear; "": of all."""
        self._out = Outbox()
        self._wake = asyncio.Event()
        self._second, self._messages = 0.0, 0
        self.bytes_out = 0

    def tell(self, channel: Channel, what: What, row: Row) -> None:
        if self._wants(channel, row):
            self._out.add(channel, what, row)
            self._wake.set()

    async def run(self, receive: Receive, send: Send) -> Goodbye | None:
        """Until it ends. None: the client went away."""
        reading = asyncio.create_task(self._read(receive), name="commands of a WebSocket")
        writing = asyncio.create_task(self._write(send), name="events of a WebSocket")
        try:
            await asyncio.wait({reading, writing}, return_when=asyncio.FIRST_COMPLETED)
            return (writing if writing.done() else reading).result()
        finally:
            await end([reading, writing])
            for channel in self._hub.channels.values():
                self._hub.leave(channel, self)

    # ── commands ────────────────────────────────────────────────────────────────────

    async def _read(self, receive: Receive) -> Goodbye | None:
        while (message := await receive())["type"] != "websocket.disconnect":
            if (refused := self._counted()) is not None:
                return refused
            data = message.get("text") or message.get("bytes") or b""
            if len(data) > MOST_MESSAGE_BYTES:
                return Goodbye(TOO_BIG, f"a message has at most {MOST_MESSAGE_BYTES} bytes")
            try:
                await self._obey(data)
            except Unread:
                return Goodbye(POLICY, "read what you are told before you ask for more")
            self._wake.set()
        return None

    def _counted(self) -> Goodbye | None:
        now = self._clock.monotonic()
        if now - self._second >= 1.0:
            self._second, self._messages = now, 0
        self._messages += 1
        if self._messages > MOST_MESSAGES_S:
            return Goodbye(POLICY, f"at most {MOST_MESSAGES_S} messages in a second")
        return None

    async def _obey(self, data: str | bytes) -> None:
        name = of = ""
        try:
            command = _command(data)
            name, of = command.channel, command.id
            if command.type == "subscribe":
                await self._subscribe(self._hub.channel(name), command.id)
            else:
                self._unsubscribe(self._hub.channel(name), command.id)
        except OllamaDistributedError as error:
            self._out.reply([_problem("error", name[:40], of[:256], error)])

    async def _subscribe(self, channel: Channel, of: str) -> None:
        """A right that is lost while the channel's first answer is awaited is found by `_check`."""
        demand(self._identity, channel.right, channel.path)
        wanted = self._wanted.get(channel.name, set())
        if of not in wanted and sum(map(len, self._wanted.values())) >= MOST_SUBSCRIPTIONS:
            raise Conflict(f"a connection has at most {MOST_SUBSCRIPTIONS} subscriptions")
        rows = await self._hub.join(channel, self)
        self._wanted.setdefault(channel.name, set()).add(of)
        self._out.reply(self._all_now(channel, of, tuple(rows)))

    def _all_now(self, channel: Channel, of: str, rows: tuple[Row, ...]) -> Iterator[str]:
        for row in rows:
            if of in ("", row.id, row.about) and self._wants(channel, row):
                yield self._event(channel, "now", row)
        yield _text(Message(type="subscribed", channel=channel.name, id=of, time=self._clock.time()))

    def _unsubscribe(self, channel: Channel, of: str) -> None:
        wanted = self._wanted.get(channel.name, set())
        wanted.discard(of)
        if not wanted:
            self._forget(channel)
        self._out.reply(
            [_text(Message(type="unsubscribed", channel=channel.name, id=of, time=self._clock.time()))]
        )

    def _forget(self, channel: Channel) -> None:
        self._wanted.pop(channel.name, None)
        self._hub.leave(channel, self)
        self._out.forget(channel)

    # ── events ──────────────────────────────────────────────────────────────────────

    def _wants(self, channel: Channel, row: Row) -> bool:
        wanted = self._wanted.get(channel.name)
        if not wanted or not ("" in wanted or row.id in wanted or row.about in wanted):
            return False
        return sees(self._identity, row)

    async def _write(self, send: Send) -> Goodbye | None:
        while True:
            if (over := self._check()) is not None:
                return over
            try:
                while (text := self._next()) is not None:
                    self.bytes_out += len(text)
                    await send({"type": "websocket.send", "text": text})
                    if (over := self._check()) is not None:
                        return over
            except OSError:  # what ASGI says to who writes to a client that is gone
                return None
            self._wake.clear()
            if self._out:
                continue
            try:
                await asyncio.wait_for(self._wake.wait(), RECHECK_S)
            except TimeoutError:
                continue

    def _next(self) -> str | None:
        if (reply := self._out.next_reply()) is not None:
            return reply
        if dropped := self._out.dropped:
            self._out.dropped = 0
            return _text(Message(type="gap", time=self._clock.time(), data=_raw(Gap(dropped=dropped))))
        while (found := self._out.next_event()) is not None:
            channel, what, row = found
            if self._wants(channel, row):  # with the rights of now
                return self._event(channel, what, row)
        return None

    def _event(self, channel: Channel, what: What, row: Row) -> str:
        data = msgspec.Raw(told_to(self._identity, row))
        return _text(Message(type=channel.name, event=what, id=row.id, time=self._clock.time(), data=data))

    # ── who is there ────────────────────────────────────────────────────────────────

    def _check(self) -> Goodbye | None:
        """Every `RECHECK_S`: whether it may still be open, and which subscriptions may."""
        now = self._clock.monotonic()
        if now - self._checked < RECHECK_S:
            return None
        self._checked = now
        if now - self._began >= LONGEST_S:
            return Goodbye(AGAIN, "an hour is over; connect again")
        try:
            self._identity = self._gate.admit(self._head, OWN).identity
        except OllamaDistributedError as error:
            return Goodbye(POLICY, error.code)
        for name in tuple(self._wanted):
            channel = self._hub.channels[name]
            try:
                demand(self._identity, channel.right, channel.path)
            except OllamaDistributedError as error:
                self._forget(channel)
                try:
                    self._out.reply([_problem("unsubscribed", name, "", error)])
                except Unread:
                    return Goodbye(POLICY, error.code)
        return None


def _command(data: str | bytes) -> Command:
    """
    Raises:
        Malformed, Invalid: says what a command looks like.
    """
    try:
        return _COMMAND.decode(data)
    except msgspec.ValidationError as exc:
        raise Invalid(f'write {{"type": "subscribe", "channel": "{events.CHANNELS[0]}"}}: {exc}') from exc
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise Malformed("a message is one JSON object") from exc


def _problem(kind: str, channel: str, of: str, failure: BaseException) -> str:
    error = as_ours(failure)
    data = _raw(Problem(code=error.code, message=error.message))
    return _text(Message(type=kind, channel=channel, id=of, data=data))


def _raw(data: Gap | Problem) -> msgspec.Raw:
    return msgspec.Raw(_encode(data))


def _text(message: Message) -> str:
    return _encode(message).decode()
