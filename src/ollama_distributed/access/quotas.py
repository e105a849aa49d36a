"""How much of a limit one gateway may give out by itself. Pure.

A limit is divided among the gateways that hold shares of it; each decides with its own share
alone. What one lacks, another hands over: it takes from its share before it answers, so the
shares never sum to more than the limit, and an answer that is lost loses a little of a minute.
A request takes what it may need at most, and gives back at its end what it did not.

Minutes are the clock's. What an answer took counts in the minute in which it was admitted; what
it took beyond its reservation (a prompt that was longer than it looked) counts in the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import msgspec

from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.policies import Limits

MINUTE_S = 60.0
MOST_HOLDERS = 16
"""In a larger cluster the others get theirs from these: a share is to be worth having."""
TOP_UP = 0.25
"""More is asked for when so much of the share is left."""

Resource: TypeAlias = Literal["requests", "tokens", "running"]
RESOURCES: tuple[Resource, ...] = ("requests", "tokens", "running")
PER_MINUTE: tuple[Resource, ...] = ("requests", "tokens")
FreeOf: TypeAlias = tuple[int, int]
"""Requests and tokens of a minute that a gateway's share has left; less than nothing: a debt."""


class Amounts(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a request takes, or a gateway hands over."""

    requests: int = 0
    tokens: int = 0
    running: int = 0

    def of(self, resource: Resource) -> int:
        amount: int = getattr(self, resource)
        return amount


def holders_of(servers: Sequence[NodeId], others: Sequence[NodeId]) -> tuple[NodeId, ...]:
    """Who holds shares from the start: servers first; the same on every node."""
    return (*sorted(servers), *sorted(others))[:MOST_HOLDERS]


def share_of(limit: int, me: NodeId, holders: Sequence[NodeId]) -> int:
    """All shares together are the limit exactly."""
    if me not in holders:
        return 0
    place, count = sorted(holders).index(me), len(holders)
    return limit * (place + 1) // count - limit * place // count


class Share:
    """Of one limit, at one gateway. `used` may exceed what there is: a debt."""

    __slots__ = ("base", "gained", "lent", "limit", "others", "used")

    def __init__(self) -> None:
        self.limit: int | None = None
        self.others: dict[NodeId, int] = {}
        """What other gateways have free, of whom it is known: what each said last, and what changed
        hands with this one since."""
        self.base = 0
        self.gained: dict[NodeId, int] = {}
        self.lent: dict[NodeId, int] = {}
        self.used = 0

    @property
    def held(self) -> int:
        return self.base + sum(self.gained.values()) - sum(self.lent.values())

    @property
    def free(self) -> int:
        return self.held - self.used

    @property
    def left(self) -> int:
        """Of the whole limit, as far as is known here."""
        return max(0, min(self.free + sum(self.others.values()), self.limit or 0))

    def roll(self) -> None:
        """A new minute; debts stay."""
        self.used = max(0, self.used - max(self.held, 0))
        self.gained.clear()
        self.lent.clear()

    def lend(self, to: NodeId, wanted: int, keep: int) -> int:
        """Hand over what is free, and not what this gateway will need itself."""
        amount = max(0, min(wanted, self.free - keep))
        if amount:
            self.lent[to] = self.lent.get(to, 0) + amount
            if to in self.others:
                self.others[to] += amount
        return amount

    def gain(self, source: NodeId, amount: int) -> None:
        if amount > 0:
            self.gained[source] = self.gained.get(source, 0) + amount
            if source in self.others:
                self.others[source] -= amount

    def surplus(self) -> dict[NodeId, int]:
        """What each source is to be left with when this gateway returns what it does not use."""
        spare, left = max(0, self.free), {}
        for source, amount in self.gained.items():
            back = min(spare, amount)
            spare -= back
            left[source] = amount - back
        return left


class Account:
    """The shares of one key's or team's limits at one gateway."""

    __slots__ = (
        "_limits",
        "dry_until",
        "heard_at",
        "holders",
        "minute",
        "moved",
        "shares",
        "topped_out",
        "touched",
    )

    def __init__(self) -> None:
        self.topped_out = -1
        """The minute in which nobody had more to hand over."""
        self.shares: dict[Resource, Share] = {resource: Share() for resource in RESOURCES}
        self.minute = -1
        self.touched = 0.0
        """When a request, or another gateway, asked last; wall time."""
        self.dry_until = 0.0
        """Others had too little a moment ago; wall time."""
        self._limits: Limits | None = None
        self.heard_at = 0.0
        """When the others were asked last what they have free; wall time."""
        self.moved = 0
        """Times that something changed hands."""
        self.holders: tuple[NodeId, ...] = ()

    def at(self, now: float, limits: Limits, me: NodeId, holders: tuple[NodeId, ...]) -> Account:
        """As it is at wall time `now`. Only a new minute makes a share larger: what another
        gateway had of it is then over there too."""
        minute = int(now // MINUTE_S)
        if minute > self.minute:
            self.minute = minute
            known = list(self.shares["tokens"].others)
            self.shares["requests"].roll()
            self.shares["tokens"].roll()
            self._divide(limits, me, holders, grow=True)
            for node in known:
                self.hear(node, None)
        elif limits is not self._limits or holders != self.holders:
            self._divide(limits, me, holders, grow=limits != self._limits)
        return self

    def _divide(self, limits: Limits, me: NodeId, holders: tuple[NodeId, ...], *, grow: bool) -> None:
        self.shares["requests"].limit = limits.requests_per_minute
        self.shares["tokens"].limit = limits.tokens_per_minute
        self.shares["running"].limit = limits.concurrency
        for share in self.shares.values():
            limit = share.limit
            base = share_of(limit or 0, me, holders)
            share.base = base if grow else min(base, share.base)
            share.others.clear()
        self.heard_at = 0.0
        self._limits, self.holders = limits, holders

    def hear(self, node: NodeId, free: FreeOf | None) -> None:
        """What another gateway has free in this minute; None: it holds its part, and nobody asked it."""
        for place, resource in enumerate(PER_MINUTE):
            share = self.shares[resource]
            part = share_of(share.limit or 0, node, self.holders)
            share.others[node] = part if free is None else free[place]

    def unhear(self, node: NodeId) -> None:
        """It cannot be asked: what it has cannot be had either."""
        for resource in PER_MINUTE:
            self.shares[resource].others.pop(node, None)

    def gain(self, resource: Resource, source: NodeId, amount: int) -> None:
        """What another gateway handed over."""
        self.moved += 1
        self.shares[resource].gain(source, amount)

    @property
    def free(self) -> FreeOf:
        return self.shares["requests"].free, self.shares["tokens"].free

    @property
    def has_minute(self) -> bool:
        return any(self.shares[resource].limit is not None for resource in PER_MINUTE)

    @property
    def busy(self) -> bool:
        """Requests run, or others hold places of this share."""
        running = self.shares["running"]
        return bool(running.used or running.lent or running.gained)

    def short(self, ask: Amounts) -> dict[Resource, int]:
        """What is missing of each; empty: it can be taken."""
        return {
            resource: ask.of(resource) - share.free
            for resource, share in self.shares.items()
            if share.limit is not None and share.free < ask.of(resource)
        }

    def never(self, ask: Amounts) -> Resource | None:
        """What the request asks more of than any minute has."""
        for resource, share in self.shares.items():
            if share.limit is not None and ask.of(resource) > share.limit:
                return resource
        return None

    def take(self, ask: Amounts) -> None:
        for resource, share in self.shares.items():
            share.used += ask.of(resource)

    def give_back(self, minute: int, taken: Amounts, used_tokens: int) -> None:
        """A request ended that took `taken` in `minute`. One that needed less frees the rest, while
        that minute lasts; one that needed more owes it."""
        self.shares["running"].used = max(0, self.shares["running"].used - taken.running)
        over = used_tokens - taken.tokens
        tokens = self.shares["tokens"]
        if minute == self.minute:
            tokens.used = max(0, tokens.used + over)
        elif over > 0:
            tokens.used += over

    def lend(self, resource: Resource, to: NodeId, wanted: int, now: float) -> int:
        """What another gateway may have of this one's share."""
        share = self.shares[resource]
        if share.limit is None:
            return 0
        self.moved += 1
        elapsed = max(now % MINUTE_S, 1.0)
        keep = 0
        if resource != "running" and share.used:
            # At the pace of this minute so far; never more than half of what is free.
            keep = min(int(share.used * (MINUTE_S - elapsed) / elapsed), max(share.free, 0) // 2)
        return share.lend(to, wanted, keep)

    def wanted(self, resource: Resource, missing: int, now: float) -> int:
        """How much to ask for where `missing` is needed: for the rest of the minute at this pace."""
        share = self.shares[resource]
        if resource == "running" or share.limit is None:
            return missing
        elapsed = max(now % MINUTE_S, 1.0)
        pace = int(share.used * (MINUTE_S - elapsed) / elapsed)
        return max(missing, min(pace, share.limit - max(share.held, 0)))

    def low(self) -> dict[Resource, int]:
        """Of what more should be had soon, and how much, though nothing is missing yet."""
        found: dict[Resource, int] = {}
        for resource, share in self.shares.items():
            if resource == "running" or not share.limit or not share.used:
                continue
            if share.held < share.limit and share.free < TOP_UP * share.held:
                found[resource] = max(1, int(TOP_UP * share.limit))
        return found
