"""How a request waits for a slot, and what the API says of the queue.

`serving/` has requests that wait and `admission/` orders them; they are on one floor and meet
here. The rows are shared by the gateway, which writes them, and the SDK, which reads them: fields
are added with defaults only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import msgspec

from ollama_distributed.base.errors import OllamaDistributedError
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.priority import Priority


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks for a slot, and for how much."""

    key: str = "local"
    """Those of one key share their turns: the key's id, the person, or the role of who has neither."""
    team: str = "default"
    priority: Priority = "normal"
    prompt_tokens: int = 0
    """Estimated: nothing is tokenised before its turn."""
    most_tokens: int | None = None
    """That the answer may have; None: not said."""
    within_s: float | None = None
    """From now; None: as long as the node lets wait."""
    progress: bool = False
    """It wants to know how its place changes."""
    request_id: str = ""
    user: str = ""
    """Who signed in; empty: a key, or nobody."""


ANYONE = Ask()


def key_of(identity: Identity) -> str:
    """Those of one key take turns together, and those of one person who signed in; who has neither shares
    with all of the same role. As `usage` names them."""
    return identity.key_id or (f"user:{identity.user}" if identity.user else identity.role)


class Waiter(Protocol):
    """One request in the queue of its model."""

    number: int
    """In the order of arrival."""
    ask: Ask
    slot: bool
    """It needs one; who counts tokens does not."""
    cost: float
    """Tokens that its turn counts for; the queue sets it."""

    def refuse(self, error: OllamaDistributedError) -> None:
        """It is not in the queue any more, and this is why. Idempotent."""
        ...


class Run(msgspec.Struct, eq=False):
    """One request that has a slot."""

    model: str
    """The load that it works on."""
    key: str
    began_s: float
    """By a monotonic clock."""
    cost: float
    """Tokens that it is expected to take, prompt and answer."""
    prompt_tokens: int = 0
    tokens: int | None = None
    """Of its answer, once it ended well; vectors and scores have none."""


# ── what the API says ───────────────────────────────────────────────────────────────


class QueueRow(msgspec.Struct, frozen=True, kw_only=True):
    """One model on one node."""

    model: str
    node: str = ""
    """Its name."""
    waiting: int = 0
    classes: Mapping[str, int] = {}
    """Of them, by priority class; those where nobody waits are left out."""
    keys: int = 0
    """That have a request here; they take turns."""
    running: int = 0
    slots: int = 0
    oldest_s: float = 0.0
    """For how long the first of them has waited."""
    eta_s: float | None = None
    """Longest wait of a request of class `normal` that came now; None: nothing was measured yet."""
    requests_per_s: float | None = None
    """That begin while all slots work; None: nothing was measured yet."""


class QueueNode(msgspec.Struct, frozen=True, kw_only=True):
    """The queue of one node."""

    node: str
    name: str = ""
    waiting: int = 0
    most: int = 0
    """Requests that may wait."""
    refused: int = 0
    """Since the node started."""
    models: tuple[QueueRow, ...] = ()
    error: str = ""
    """Why nothing is known of it; empty: it is."""


class QueuedRow(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One request that waits at a node; nodes tell each other, and `base.events.QueuedRequest` callers."""

    number: int
    """In the order of arrival at its node, since that started."""
    request_id: str
    model: str
    node: str = ""
    """Its name."""
    position: int
    eta_s: float | None = None
    priority: Priority = "normal"
    since: float = 0.0
    """Seconds since the Unix epoch."""
    key: str = "local"
    team: str = "default"
    user: str = ""


class QueueWaiting(msgspec.Struct, frozen=True, kw_only=True):
    """The requests that wait at one node."""

    node: str
    waiting: tuple[QueuedRow, ...] = ()
    began: tuple[int, ...] = ()
    """Numbers of those that had their turn lately."""
    error: str = ""
    """Why nothing is known of it; empty: it is."""


class QueueAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /api/v1/queue`."""

    nodes: tuple[QueueNode, ...] = ()


class Histogram(msgspec.Struct, frozen=True, kw_only=True):
    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    """One more than bounds: the last has what is above all of them."""
    total: float
    """Sum of what was counted."""


class QueueFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of this node since its start, for `/metrics`."""

    waiting: Mapping[str, int] = {}
    """By class."""
    granted: Mapping[str, int] = {}
    """Requests that waited and had their turn, by class."""
    refused: Mapping[str, int] = {}
    """By reason: `full`, `model`, `team`, `key`, `pushed_out`, `deadline`, `expired`."""
    waited: Histogram | None = None
    """Seconds until their turn."""
    eta_error: Histogram | None = None
    """Seconds that the wait was longer than told; below zero: shorter."""
