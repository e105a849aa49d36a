"""What was used: the row that ledgers keep and nodes exchange, and what the API says of it.

Shared by the gateway, which writes it, and the SDK, which reads it. Fields are added with
defaults only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import msgspec

By: TypeAlias = Literal["key", "team", "model", "node", "day", "hour"]
"""What rows of an answer are grouped by."""
GROUPS: tuple[By, ...] = ("key", "team", "model", "node", "day", "hour")


class Sums(msgspec.Struct, kw_only=True, omit_defaults=True, gc=False):
    """Counts of any number of requests. Exact, but for energy."""

    requests: int = 0
    errors: int = 0
    """Of them, those that ended in an error; refusals for a limit among them."""
    cancelled: int = 0
    """Of them, those whose client went away."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of `prompt_tokens`, those that the prefix cache held."""
    completion_tokens: int = 0
    wait_s: float = 0.0
    """In queues."""
    load_s: float = 0.0
    """Until the model was in memory."""
    prompt_s: float = 0.0
    """Reading prompts."""
    completion_s: float = 0.0
    """Generating."""
    cost: float = 0.0
    """By the prices that held when the requests ended."""
    joules: float = 0.0
    """Estimated, or measured where the machine tells."""

    def add(self, other: Sums) -> None:
        for field in self.__struct_fields__:
            setattr(self, field, getattr(self, field) + getattr(other, field))


class RowKey(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """What is counted apart."""

    start: int
    """Of its hour, or of its day once that is old; seconds since the Unix epoch."""
    key: str
    """The key's id; for requests without a key the role."""
    team: str
    model: str
    """As people see it; empty: the request did not get as far."""
    node: str
    """Name of the node that answered."""
    days: bool = False
    """It is a whole day."""


class Row(msgspec.Struct, frozen=True, gc=False, array_like=True):
    key: RowKey
    sums: Sums


class Doubt(msgspec.Struct, frozen=True, kw_only=True):
    """A node ended without closing its ledger, somewhen after `at` and before `until`. Answers that
    ended in its last second, and those that still ran, may be missing."""

    node: str
    at: float
    """When it wrote for the last time."""
    until: float
    """When it was there again."""


class UsageRow(msgspec.Struct, frozen=True, kw_only=True):
    """One group. What it was not grouped by is None."""

    key: str | None = None
    team: str | None = None
    model: str | None = None
    node: str | None = None
    day: str | None = None
    """`2026-11-23`, UTC."""
    hour: str | None = None
    """`2026-11-23T07:00Z`."""
    requests: int = 0
    errors: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    wait_s: float = 0.0
    load_s: float = 0.0
    prompt_s: float = 0.0
    completion_s: float = 0.0
    cost: float = 0.0
    energy_wh: float = 0.0
    """An estimate: what nodes drew while they answered, shared by the engines' time."""
    energy_cost: float = 0.0


class UsageAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /api/v1/usage`."""

    start: str
    """First day, UTC."""
    end: str
    """Last day."""
    by: tuple[str, ...]
    rows: tuple[UsageRow, ...]
    total: UsageRow
    currency: str = ""
    in_doubt: tuple[Doubt, ...] = ()
    missing: tuple[str, ...] = ()
    """Nodes that did not answer: theirs are as last copied, or absent."""


class Left(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a caller has left of the minute, here: for headers."""

    limit_requests: int | None = None
    requests: int = 0
    limit_tokens: int | None = None
    tokens: int = 0
    reset_s: float = 0.0


class UsageFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of one node, for its metrics; the counts are since its start."""

    rows: int = 0
    """Of its ledger."""
    copies: int = 0
    """Ledgers of other nodes that it keeps."""
    failing: bool = False
    """What was counted cannot be written down."""
    limited: int = 0
    """Keys and teams with limits that were here lately."""
    refused: Mapping[str, int] = {}
    """By what was short: `requests`, `tokens`, `running`, `month`, `budget`."""
    borrowed: int = 0
    """Times that another gateway handed over a part of its share."""
