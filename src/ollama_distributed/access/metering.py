"""Lets a request in within the limits of its key or team, or says how long to wait.

The verdict is local: this gateway's share of the minute (`quotas.py`), and of the month what all
gateways had when they were asked last. Where the share is short, others are asked for some of
theirs, over the hop between nodes, which needs no consensus. Where they cannot be reached the
local share holds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import anyio
import msgspec
import structlog

from ollama_distributed.access import remaining
from ollama_distributed.access.months import Month, Months, Scope, has_month
from ollama_distributed.access.quotas import MINUTE_S, Account, Amounts, Resource
from ollama_distributed.access.remaining import LeftAsk, LeftTold, Remaining, left_of
from ollama_distributed.base.errors import BudgetSpent, OllamaDistributedError, RateLimited
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.policies import Limits
from ollama_distributed.base.usage import Left

log = structlog.get_logger("access.metering")

NOT_LENT, NOT_TOLD = "quota.not_lent", "quota.month_not_told"
BORROW_S = 1.0
"""A request that could be served with another gateway's share waits so long for it."""
TOP_UP_EVERY_S = 0.1
DRY_S = 0.2
"""Who asks again and again for more than there is does not have all gateways asked each time."""
KNOWN_S = 5.0
"""Limits as an own request had them hold so long against what another gateway says."""
SYNC_S = 5.0
IDLE_S = 600.0
"""An account that nobody uses is forgotten."""
MAX_ACCOUNTS = 10_000
KEEP_BUSY_S = 60.0
"""Of whom nothing was heard for so long, nobody is asked what he had this month."""
SAY_AGAIN_S, FORGOTTEN_S = 30.0, 90.0
"""Who holds another's places for running requests says so that often, or loses them."""


class BorrowAsk(msgspec.Struct, frozen=True, kw_only=True):
    """One gateway asks another for a part of its share."""

    scope: str
    limits: Limits
    minute: int
    wanted: Mapping[str, int] = {}
    """Resource -> how much."""
    running: int | None = None
    """How many of the other's places for running requests it still holds; None: says nothing."""


class Borrowed(msgspec.Struct, frozen=True, kw_only=True):
    amounts: Mapping[str, int] = {}


class Peers(remaining.Peers, Protocol):
    """Other gateways (`adapters.peers.usage.UsageExchange`)."""

    async def borrow(self, node: NodeId, ask: BorrowAsk) -> Borrowed: ...


class Gateways(Protocol):
    """Which there are, from memory."""

    def holders(self) -> tuple[NodeId, ...]:
        """Who holds shares; sorted, and equal objects while nothing changes."""
        ...

    def living(self, nodes: Sequence[NodeId]) -> Sequence[NodeId]:
        """Those that can be asked."""
        ...


def scope_of(identity: Identity) -> Scope:
    policy = identity.policy.name if identity.policy is not None else ""
    if identity.limits.shared_by == "team":
        return Scope(f"team/{identity.team}/{policy}", "", identity.team)
    who = identity.key_id or (f"user:{identity.user}" if identity.user else identity.role)
    return Scope(f"key/{who}/{policy}", who, "")


class Ticket:
    """A request that was let in. `close` it once, whatever became of it."""

    __slots__ = ("_account", "_cost", "_minute", "_month", "_taken", "left")

    def __init__(self, account: Account, month: Month, taken: Amounts, cost: float, left: Left) -> None:
        self._account = account
        self._minute = account.minute
        self._month = month
        self._taken = taken
        self._cost = cost
        self.left = left

    def close(self, tokens: int) -> None:
        """It took so many, of prompt and answer."""
        self._account.give_back(self._minute, self._taken, tokens)
        reserved = self._month.reserved
        reserved.requests -= 1
        reserved.prompt_tokens -= self._taken.tokens
        reserved.cost -= self._cost


class Meter:
    """`wall`: seconds since the Unix epoch."""

    def __init__(
        self, me: NodeId, gateways: Gateways, peers: Peers, months: Months, wall: Callable[[], float]
    ) -> None:
        self._me = me
        self._gateways = gateways
        self._peers = peers
        self._months = months
        self._wall = wall
        self._accounts: dict[str, Account] = {}
        self._by_month: dict[str, tuple[Scope, Month]] = {}
        self._known: dict[str, tuple[Limits, float]] = {}
        """As a request of this gateway's own said last, and when."""
        self._locks: dict[str, asyncio.Lock] = {}
        self._heard: dict[tuple[str, NodeId], float] = {}
        """When places of running requests were spoken of last, by scope and the other gateway."""
        self._remaining = Remaining(peers, self._accounts, self._known, wall)
        self.refused: dict[str, int] = {"requests": 0, "tokens": 0, "running": 0, "month": 0, "budget": 0}
        """Since the start, by what was short."""
        self.borrowed = 0
        """Times that another gateway handed something over."""

    @property
    def accounts(self) -> int:
        return len(self._accounts)

    @property
    def shares(self) -> bool:
        """Whether limits are in use that another gateway has a part of: else `step` and `hear` hurry for
        nobody."""
        return bool(self._accounts) and any(node != self._me for node in self._gateways.holders())

    # ── in the request path ─────────────────────────────────────────────────────────

    def admit(self, identity: Identity, ask: Amounts, cost: float) -> Ticket | None:
        """Take what the request may need at most. None: it is not here; see `borrow`.

        Raises:
            RateLimited, BudgetSpent: nobody has it.
        """
        now, limits, scope = self._wall(), identity.limits, scope_of(identity)
        account = self._account(scope, limits, now)
        month = self._month(scope, now)
        if not month.known and has_month(limits) and now >= account.dry_until and self._others(account):
            return None
        self._check(month, limits, ask, cost, now)
        missing = account.short(ask)
        if missing:
            impossible = account.never(ask)
            if impossible is not None:
                raise self._too_much(impossible, account, ask, now)
            if now >= account.dry_until and self._others(account):
                return None
            raise self._refused(next(iter(missing)), account, now)
        return self._taken(account, month, ask, cost, now)

    async def borrow(self, identity: Identity, ask: Amounts, cost: float) -> Ticket:
        """As `admit`, with what other gateways hand over.

        Raises:
            RateLimited, BudgetSpent
        """
        scope, limits = scope_of(identity), identity.limits
        async with self._asking(scope.name):
            now = self._wall()
            account = self._account(scope, limits, now)
            wanted = {
                resource: account.wanted(resource, missing, now)
                for resource, missing in account.short(ask).items()
            }
            if now >= account.dry_until:
                await self._ask(scope, limits, account, wanted)
            month = self._month(scope, now)
            if not month.known and has_month(limits) and now >= account.dry_until:
                with anyio.move_on_after(BORROW_S):
                    await self._ask_month(month, now)
                if not month.known:
                    account.dry_until = now + SYNC_S
        now = self._wall()
        account = self._account(scope, limits, now)
        month = self._month(scope, now)
        self._check(month, limits, ask, cost, now)
        missing = account.short(ask)
        if missing:
            account.dry_until = max(account.dry_until, now + DRY_S)
            raise self._refused(next(iter(missing)), account, now)
        return self._taken(account, month, ask, cost, now)

    def _account(self, scope: Scope, limits: Limits, now: float) -> Account:
        account = self._accounts.get(scope.name)
        if account is None:
            account = self._accounts[scope.name] = Account()
        self._known[scope.name] = (limits, now)
        account.touched = now
        return account.at(now, limits, self._me, self._gateways.holders())

    def _taken(self, account: Account, month: Month, ask: Amounts, cost: float, now: float) -> Ticket:
        account.take(ask)
        month.reserved.requests += 1
        month.reserved.prompt_tokens += ask.tokens
        month.reserved.cost += cost
        return Ticket(account, month, ask, cost, left_of(account, now))

    def _month(self, scope: Scope, now: float) -> Month:
        held = self._by_month.get(scope.name)
        if held is None or now >= held[1].following:
            held = self._by_month[scope.name] = (scope, Month(scope, now // MINUTE_S * MINUTE_S))
        return held[1]

    def _check(self, month: Month, limits: Limits, ask: Amounts, cost: float, now: float) -> None:
        if not has_month(limits):
            return
        try:
            month.check(limits, self._months, ask.tokens, cost, now, len(self._gateways.holders()))
        except (RateLimited, BudgetSpent) as refused:
            self.refused["budget" if isinstance(refused, BudgetSpent) else "month"] += 1
            raise

    def _refused(self, resource: Resource, account: Account, now: float) -> RateLimited:
        self.refused[resource] += 1
        share = account.shares[resource]
        if resource == "running":
            return RateLimited(
                f"the limit is {share.limit} requests at once; try again when one has ended",
                retry_after_s=1.0,
                left=left_of(account, now),
            )
        rest = ", and this request may need more than is left: prompt and longest possible answer count"
        return RateLimited(
            f"the limit is {share.limit} {resource} per minute{rest if resource == 'tokens' else ''}",
            retry_after_s=MINUTE_S - now % MINUTE_S,
            left=left_of(account, now),
        )

    def _too_much(self, resource: Resource, account: Account, ask: Amounts, now: float) -> RateLimited:
        self.refused[resource] += 1
        limit = account.shares[resource].limit
        return RateLimited(
            f"this request may need {ask.of(resource)} {resource} and the limit is {limit} per minute: it "
            "will never fit; ask for fewer tokens (max_tokens, num_predict) or shorten the prompt",
            retry_after_s=MINUTE_S - now % MINUTE_S,
            left=left_of(account, now),
        )

    def _others(self, account: Account) -> Sequence[NodeId]:
        """Who may have something to hand over."""
        return self._gateways.living([node for node in account.holders if node != self._me])

    # ── between gateways ────────────────────────────────────────────────────────────

    def lend(self, to: NodeId, ask: BorrowAsk) -> Borrowed:
        """Another gateway asks for a part of this one's share. It is gone from here before the answer
        leaves."""
        now = self._wall()
        scope = ask.scope
        if scope not in self._accounts and len(self._accounts) >= MAX_ACCOUNTS:
            return Borrowed()
        account = self._accounts.get(scope)
        if account is None:
            account = self._accounts[scope] = Account()
        account.at(now, self._limits(ask, now), self._me, self._gateways.holders())
        account.touched = now
        if ask.running is not None:
            account.shares["running"].lent[to] = ask.running
        if ask.running is not None or ask.wanted.get("running"):
            self._heard[scope, to] = now
        if ask.minute != account.minute:
            return Borrowed()  # clocks apart: its minute is not the one that is known here
        found: dict[str, int] = {}
        for resource, share in account.shares.items():
            wanted = ask.wanted.get(resource, 0)
            if wanted > 0 and share.limit is not None:
                found[resource] = account.lend(resource, to, wanted, now)
        return Borrowed(amounts=found)

    def left(self, ask: LeftAsk) -> LeftTold:
        """Another gateway asks what of some limits is free here."""
        return self._remaining.told(ask)

    async def hear(self) -> None:
        """What is done every `remaining.LOOK_S`: ask the others what they have free."""
        scopes, now, holders = self._remaining.due(), self._wall(), self._gateways.holders()
        for scope in scopes:
            self._accounts[scope].at(now, self._known[scope][0], self._me, holders)
        if scopes:
            others = self._gateways.living([node for node in holders if node != self._me])
            await self._remaining.hear(scopes, others)

    def _asking(self, scope: str) -> asyncio.Lock:
        """One exchange with others at a time: what is returned and what is asked for must not cross."""
        return self._locks.setdefault(scope, asyncio.Lock())

    def _limits(self, ask: BorrowAsk, now: float) -> Limits:
        """As this gateway knows them, where requests of its own came lately."""
        known, at = self._known.get(ask.scope, (ask.limits, now))
        return known if now - at <= KNOWN_S else ask.limits

    async def _ask(
        self, scope: Scope, limits: Limits, account: Account, wanted: Mapping[Resource, int]
    ) -> None:
        """Have others hand over what is wanted, one after the other until it is enough."""
        minute = account.minute
        left: dict[str, int] = {str(resource): amount for resource, amount in wanted.items()}
        with anyio.move_on_after(BORROW_S):
            for node in self._others(account):
                if not left:
                    return
                ask = BorrowAsk(scope=scope.name, limits=limits, minute=minute, wanted=dict(left))
                try:
                    answer = await self._peers.borrow(node, ask)
                except OllamaDistributedError as failure:
                    log.debug(NOT_LENT, node=node, reason=failure.message)
                    continue
                for resource in account.shares:
                    amount = answer.amounts.get(resource, 0)
                    if amount > 0 and (resource == "running" or account.minute == minute):
                        self.borrowed += 1
                        account.gain(resource, node, amount)
                        left[resource] = left.get(resource, 0) - amount
                left = {resource: amount for resource, amount in left.items() if amount > 0}

    async def step(self) -> None:
        """What is done in the background, every `TOP_UP_EVERY_S`: have more before it is missing, give
        back places of running requests, and forget what nobody uses."""
        now = self._wall()
        for name, account in list(self._accounts.items()):
            if now - account.touched > IDLE_S and not account.busy:
                del self._accounts[name]
                self._known.pop(name, None)
                self._by_month.pop(name, None)
                self._locks.pop(name, None)
                for key in [key for key in self._heard if key[0] == name]:
                    del self._heard[key]
                continue
            self._take_back(name, account, now)
            held = self._by_month.get(name)
            if held is None:
                continue  # it only lends
            scope, (limits, _) = held[0], self._known[name]
            account.at(now, limits, self._me, self._gateways.holders())
            async with self._asking(name):
                await self._top_up(scope, limits, account)
                await self._return_places(scope, limits, account, now)

    async def _top_up(self, scope: Scope, limits: Limits, account: Account) -> None:
        low = account.low()
        if low and account.minute != account.topped_out:
            before = sum(share.held for share in account.shares.values())
            await self._ask(scope, limits, account, low)
            if sum(share.held for share in account.shares.values()) <= before:
                account.topped_out = account.minute  # nobody has more

    async def _return_places(self, scope: Scope, limits: Limits, account: Account, now: float) -> None:
        """Say how many places of others are still held here: when it changes, and now and then."""
        running = account.shares["running"]
        for node, left in running.surplus().items():
            changed = left != running.gained[node]
            if not changed and now - self._heard.get((scope.name, node), 0.0) < SAY_AGAIN_S:
                continue
            running.gained[node] = left
            if not left:
                del running.gained[node]
            self._heard[scope.name, node] = now
            ask = BorrowAsk(scope=scope.name, limits=limits, minute=account.minute, running=left)
            try:
                with anyio.move_on_after(BORROW_S):
                    await self._peers.borrow(node, ask)
            except OllamaDistributedError as failure:  # the other takes them back by itself
                log.debug(NOT_LENT, node=node, reason=failure.message)

    def _take_back(self, name: str, account: Account, now: float) -> None:
        """Places of who ended, or began anew and knows of none, or could not say that it needs no more."""
        lent = account.shares["running"].lent
        for node in list(lent):
            if not lent[node] or now - self._heard.get((name, node), 0.0) > FORGOTTEN_S:
                del lent[node]
                self._heard.pop((name, node), None)

    async def sync_months(self) -> None:
        """Ask the others what those had in this month that have a limit of it and are in use."""
        now = self._wall()
        for name, (_, month) in list(self._by_month.items()):
            limits, at = self._known.get(name, (None, 0.0))
            if limits is not None and has_month(limits) and now - at <= KEEP_BUSY_S:
                await self._ask_month(month, now)

    async def _ask_month(self, month: Month, now: float) -> None:
        try:
            await month.ask(self._months, now)
        except OllamaDistributedError as away:  # what is known grows old, and then each has its part
            log.debug(NOT_TOLD, reason=away.message)
