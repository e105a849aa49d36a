"""What the WebSocket `/api/v1/ws` says: commands that it takes, messages that it sends.

A client sends `{"type": "subscribe", "channel": "queue"}`. It is told what there is (`event` "now"),
then that it is subscribed, then each change: `{"type": "queue", "event": "changed", "id": …, "time": …,
"data": {…}}`, `type` being the channel. Shared by the gateway, which writes them, and the SDK, which
reads them. Fields are added with defaults only.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import msgspec

from ollama_distributed.base.priority import Priority

PATH = "/api/v1/ws"

Channel: TypeAlias = Literal["queue", "queues", "nodes", "metrics", "alerts", "transfers"]
"""`queue`: requests that wait, each · `queues`: how many wait at each node and model · `nodes`: their
state · `metrics`: how busy they are · `alerts`: what somebody should see to · `transfers`: models on
their way."""
CHANNELS: tuple[Channel, ...] = get_args(Channel)

What: TypeAlias = Literal["now", "changed", "gone"]
"""`now`: it is like that when one subscribes · `gone`: for the last time."""


class Command(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """From a client."""

    type: Literal["subscribe", "unsubscribe"]
    channel: str
    id: str = ""
    """Only of that request, node or transfer; empty: of all."""


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """From the server. `type` is a channel, or `subscribed`, `unsubscribed`, `gap` (some events were left
    out, as they were not read soon enough: subscribe again to be told what there is), `error`."""

    type: str
    event: What | Literal[""] = ""
    channel: str = ""
    """Of `subscribed`, `unsubscribed` and `error`."""
    id: str = ""
    """Of what it is about."""
    time: float = 0.0
    """Seconds since the Unix epoch, by the clock of the node that tells it."""
    data: msgspec.Raw = msgspec.Raw(b"null")
    """By channel: `QueuedRequest`, `base.queue.QueueNode`, `base.cluster.NodeRow` (its `usage` comes as
    `metrics`), `Busy`, `base.alerts.Alert`, or a transfer. Of `gap`: `Gap`. Of
    `error`, and of `unsubscribed` that nobody asked for: `Problem`."""


class QueuedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request in a queue. Callers are told of their own; who may change queues, of all."""

    request_id: str
    model: str
    node: str = ""
    """The name of the node where it waits."""
    state: Literal["waiting", "started", "ended"] = "waiting"
    """ended: without its turn; it was cancelled or refused."""
    position: int = 0
    """From 1; 0: it does not wait any more."""
    eta_s: float | None = None
    """None: nothing was measured yet."""
    priority: Priority = "normal"
    since: float = 0.0
    """When it began to wait, seconds since the Unix epoch."""
    key: str = ""
    """The id of the key, or the role of who has none."""
    team: str = "default"
    user: str = ""


class Busy(msgspec.Struct, frozen=True, kw_only=True):
    """How busy a node is."""

    node: str
    """Its id."""
    name: str = ""
    cpu_usage: float = 0.0
    """Percent of all its cores."""
    memory_usage: float = 0.0
    """Percent."""
    gpu_usage: float | None = None
    gpu_memory_usage: float | None = None
    requests: int = 0
    """Answers that run now."""
    queued: int = 0
    overload: str = ""
    """As in `base.cluster.NodeUsage`."""


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    dropped: int
    """Events that were left out."""


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    code: str
    message: str


class ChannelRow(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    summary: str


class ChannelsAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /api/v1/ws` without an upgrade: what the caller may subscribe to."""

    channels: tuple[ChannelRow, ...] = ()
