"""One key, several gateways, 10,000 tokens a minute, in virtual time: never more than 2 % over, with
the hop between gateways there, lossy, or away. Consensus has no part in it: what is known of the
members stays as it was when that is down."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence

import anyio
import pytest

from ollama_distributed.access.metering import BorrowAsk, Borrowed, Meter, Ticket
from ollama_distributed.access.quotas import Amounts
from ollama_distributed.access.remaining import HEAR_S, LOOK_S, LeftAsk, LeftTold
from ollama_distributed.base.errors import BudgetSpent, OllamaDistributedError, RateLimited, Unavailable
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import KeyId, NodeId
from ollama_distributed.base.policies import Limits, Policy
from ollama_distributed.base.usage import Left, Sums
from ollama_distributed.testing import virtual_time
from ollama_distributed.testing.virtual_time import VirtualClock, loop_random

LIMIT = 10_000
MINUTES = 4
OVER = 1.02
HOP_S = 0.02
"""There and back at most, with room."""


class World:
    """Gateways, the way between them, and what was had in each minute."""

    def __init__(self, count: int, limits: Limits) -> None:
        self.clock = VirtualClock()
        self.chance = loop_random()
        self.nodes = tuple(NodeId(f"g{i}") for i in range(count))
        self.identity = Identity(role="user", key_id=KeyId("k"), policy=Policy(name="p", limits=limits))
        self.lost = 0.0
        """Share of messages between gateways that get lost, asks and answers alike."""
        self.used: Counter[int] = Counter()
        self.admitted = self.refused = 0
        self.running = self.most = 0
        self.news: list[tuple[float, str, int]] = []
        """Tokens that were let in, and where, or that changed hands: when."""
        self.asked_left = 0
        self.told: list[tuple[int, int, int]] = []
        """What headers said was left; what was left; what nobody else could know of yet."""
        self.months = {node: Sums() for node in self.nodes}
        self.meters = {
            node: Meter(node, self, _Hop(self, node), _Months(self, node), self.clock.time)
            for node in self.nodes
        }

    def restart(self, node: NodeId) -> None:
        self.meters[node] = Meter(node, self, _Hop(self, node), _Months(self, node), self.clock.time)

    def holders(self) -> tuple[NodeId, ...]:
        return self.nodes

    def living(self, nodes: Sequence[NodeId]) -> Sequence[NodeId]:
        return nodes

    async def request(
        self, node: NodeId, ask: Amounts, tokens: int, took_s: float, cost: float = 0.0
    ) -> None:
        """One, as a gateway serves it."""
        meter = self.meters[node]
        minute = int(self.clock.time() // 60)
        try:
            ticket = meter.admit(self.identity, ask, cost) or await meter.borrow(self.identity, ask, cost)
        except (RateLimited, BudgetSpent):
            self.refused += 1
            return
        minute = max(minute, int(self.clock.time() // 60))
        self.heard(node, ask, ticket)
        self.admitted += 1
        self.used[minute] += tokens
        self.running += 1
        self.most = max(self.most, self.running)
        await anyio.sleep(took_s)
        self.running -= 1
        ticket.close(tokens)
        own = self.months[node]
        own.requests, own.cost = own.requests + 1, own.cost + cost
        own.prompt_tokens += tokens

    def heard(self, node: NodeId, ask: Amounts, ticket: Ticket) -> None:
        """What the answer's header says."""
        now = self.clock.time()
        self.news.append((now, node, ask.tokens))
        accounts = [meter._accounts.get("key/k/p") for meter in self.meters.values()]
        used = sum(
            one.shares["tokens"].used for one in accounts if one is not None and one.minute == int(now // 60)
        )
        unknown = sum(
            tokens for at, where, tokens in self.news if where != node and at > now - HEAR_S - LOOK_S - HOP_S
        )
        self.told.append((ticket.left.tokens, LIMIT - used, unknown))

    async def background(self, node: NodeId) -> None:
        while True:
            await anyio.sleep(0.1)
            await self.meters[node].step()

    async def months_followed(self, node: NodeId) -> None:
        while True:
            await anyio.sleep(5.0)
            await self.meters[node].sync_months()

    async def hears(self, node: NodeId) -> None:
        while True:
            await anyio.sleep(LOOK_S)
            await self.meters[node].hear()


class _Hop:
    def __init__(self, world: World, me: NodeId) -> None:
        self._world = world
        self._me = me

    async def borrow(self, node: NodeId, ask: BorrowAsk) -> Borrowed:
        await self._pass()
        answer = self._world.meters[node].lend(self._me, ask)
        moved = answer.amounts.get("tokens", 0)
        if moved:
            self._world.news.append((self._world.clock.time(), "", moved))
        await self._pass()
        return answer

    async def left(self, node: NodeId, ask: LeftAsk) -> LeftTold:
        self._world.asked_left += 1
        await self._pass()
        answer = self._world.meters[node].left(ask)
        await self._pass()
        return answer

    async def _pass(self) -> None:
        chance = self._world.chance
        await anyio.sleep(0.0005 + 0.004 * chance.random())
        if chance.random() < self._world.lost:
            raise Unavailable("the message was lost")


class _Months:
    def __init__(self, world: World, me: NodeId) -> None:
        self._world = world
        self._me = me

    def own(self, at: float, *, key: str, team: str) -> Sums:
        return self._world.months[self._me]

    async def others(self, at: float, *, key: str, team: str) -> Sums:
        if self._world.chance.random() < self._world.lost:
            raise Unavailable("nobody answers")
        found = Sums()
        for node, sums in self._world.months.items():
            if node != self._me:
                found.add(sums)
        return found


async def clients(world: World, until_s: float, *, over_reservation: float = 0.0) -> None:
    """About three times the limit is asked for; who asks where shifts all the time."""
    chance = world.chance
    async with anyio.create_task_group() as serving, anyio.create_task_group() as background:
        for node in world.nodes:
            background.start_soon(world.background, node)
            background.start_soon(world.hears, node)
        while anyio.current_time() < until_s:
            await anyio.sleep(chance.expovariate(1.2))
            favourite = world.nodes[int(anyio.current_time() // 40) % len(world.nodes)]
            node = favourite if chance.random() < 0.8 else chance.choice(world.nodes)
            reserved = chance.randint(100, 1200)
            used = int(reserved * (0.3 + 0.7 * chance.random()))
            if chance.random() < over_reservation:
                used = int(reserved * 1.2)  # a prompt that was longer than it looked
            ask = Amounts(requests=1, tokens=reserved, running=1)
            serving.start_soon(world.request, node, ask, used, 0.2 + chance.expovariate(0.3))
        background.cancel_scope.cancel()


def run(lost: float, seed: int, **more: float) -> World:
    async def main() -> World:
        world = World(3, Limits(tokens_per_minute=LIMIT))
        world.lost = lost
        await clients(world, MINUTES * 60.0, **more)
        return world

    return virtual_time.run(main, seed)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("lost", [0.0, 0.2, 1.0])
def test_three_gateways_keep_to_one_keys_tokens(lost: float, seed: int) -> None:
    world = run(lost, seed)
    assert world.refused
    assert world.admitted
    assert max(world.used.values()) <= LIMIT * OVER, (seed, world.used)
    assert all(said <= max(0, left) + unknown for said, left, unknown in world.told), seed
    if lost == 0.0:
        close = sum(abs(said - left) <= unknown for said, left, unknown in world.told)
        assert close >= 0.9 * len(world.told), "headers tell of all gateways, not of one share"
    pairs = 6
    assert world.asked_left <= pairs * (MINUTES * 60 / HEAR_S + MINUTES), "by time, not by requests"
    whole = sorted(world.used.items())[:MINUTES]
    if lost == 0.0:  # and what there is can be had, wherever it is asked for
        assert sum(tokens for _, tokens in whole) >= 0.9 * LIMIT * MINUTES, (seed, world.used)
    if lost == 1.0:  # the local share holds
        assert min(tokens for _, tokens in whole) >= LIMIT / 4, (seed, world.used)


def test_what_was_had_beyond_a_reservation_is_paid_back() -> None:
    world = run(0.0, 11, over_reservation=0.1)
    assert sum(world.used.values()) <= LIMIT * OVER * (MINUTES + 1), world.used


def test_headers_tell_what_is_left_everywhere() -> None:
    """Also at a gateway whose own share is used up; of who cannot be asked nothing is promised."""

    async def main() -> None:
        world = World(3, Limits(tokens_per_minute=9_000, requests_per_minute=90))
        one, two, three = world.nodes
        ask = Amounts(requests=1, tokens=1000)

        async def at(node: NodeId) -> Left:
            meter = world.meters[node]
            ticket = meter.admit(world.identity, ask, 0.0) or await meter.borrow(world.identity, ask, 0.0)
            return ticket.left

        async with anyio.create_task_group() as background:
            for node in world.nodes:
                background.start_soon(world.hears, node)
            first = await at(one)
            assert (first.tokens, first.requests) == (2_000, 29), "nobody told it yet what the others have"
            await anyio.sleep(2.0)
            second = await at(one)
            assert (second.tokens, second.requests) == (7_000, 88)
            await at(two)
            await anyio.sleep(2.0)
            assert (await at(one)).tokens == 5_000
            assert world.meters[one]._accounts["key/k/p"].shares["tokens"].free == 0
            await anyio.sleep(2.0)
            assert (await at(three)).tokens == 2_000, "its own share only"
            await anyio.sleep(2.0)
            assert (await at(one)).tokens == 3_000, "it has borrowed for this one"
            world.lost = 1.0
            await anyio.sleep(2.0)
            alone = await at(one)
            assert alone.tokens == world.meters[one]._accounts["key/k/p"].shares["tokens"].free < 2_000
            world.lost = 0.0
            await anyio.sleep(60.0)
            assert (await at(one)).tokens == 8_000, "in a new minute each has its part again"
            background.cancel_scope.cancel()

    virtual_time.run(main, 1)


@pytest.mark.parametrize("lost", [0.0, 0.3])
def test_requests_at_once(lost: float) -> None:
    async def main() -> World:
        world = World(3, Limits(concurrency=6))
        world.lost = lost
        await clients(world, 300.0)
        return world

    world = virtual_time.run(main, 3)
    assert world.most <= 6
    assert world.most >= (6 if not lost else 2)
    for meter in world.meters.values():
        running = meter._accounts["key/k/p"].shares["running"]
        assert running.used == 0


@pytest.mark.parametrize("lost", [0.0, 1.0])
def test_a_budget_of_a_month(lost: float) -> None:
    async def main() -> World:
        world = World(3, Limits(budget_per_month=100.0))
        world.lost = lost
        async with anyio.create_task_group() as tasks:
            for node in world.nodes:
                tasks.start_soon(_followed, world, node)
            async with anyio.create_task_group() as serving:
                for _ in range(600):
                    await anyio.sleep(1.0)
                    node = world.chance.choice(world.nodes)
                    serving.start_soon(world.request, node, Amounts(requests=1), 0, 2.0, 0.5)
            tasks.cancel_scope.cancel()
        return world

    world = virtual_time.run(main, 5)
    spent = sum(sums.cost for sums in world.months.values())
    assert spent <= 100.0 * OVER
    assert spent >= (97.0 if not lost else 90.0)


async def _followed(world: World, node: NodeId) -> None:
    while True:
        try:
            await world.months_followed(node)
        except OllamaDistributedError:
            continue


def test_a_request_larger_than_any_minute_is_told_so() -> None:
    async def main() -> None:
        world = World(3, Limits(tokens_per_minute=LIMIT))
        meter = world.meters[world.nodes[0]]
        with pytest.raises(RateLimited, match="never fit"):
            meter.admit(world.identity, Amounts(tokens=LIMIT + 1), 0.0)
        # All of a minute in one request: every gateway hands over its share.
        assert meter.admit(world.identity, Amounts(tokens=LIMIT), 0.0) is None
        ticket = await meter.borrow(world.identity, Amounts(tokens=LIMIT), 0.0)
        assert ticket.left.tokens == 0
        assert ticket.left.limit_tokens == LIMIT
        other = world.meters[world.nodes[1]]
        with pytest.raises(RateLimited) as refused:
            await other.borrow(world.identity, Amounts(tokens=1), 0.0)
        assert 0 < refused.value.retry_after_s <= 60

    virtual_time.run(main, 1)


def test_places_of_a_gateway_that_began_anew_come_back() -> None:
    async def main() -> None:
        world = World(2, Limits(concurrency=4))
        one, two = world.nodes
        ask = Amounts(requests=1, running=1)
        async with anyio.create_task_group() as background:
            for node in world.nodes:
                background.start_soon(world.background, node)
            for _ in range(4):
                meter = world.meters[one]
                assert meter.admit(world.identity, ask, 0.0) or await meter.borrow(world.identity, ask, 0.0)
            with pytest.raises(RateLimited):
                await world.meters[two].borrow(world.identity, ask, 0.0)
            await anyio.sleep(200.0)  # they run for long: the places stay lent
            with pytest.raises(RateLimited):
                await world.meters[two].borrow(world.identity, ask, 0.0)
            world.restart(one)
            await anyio.sleep(100.0)
            for _ in range(2):
                assert world.meters[two].admit(world.identity, ask, 0.0) is not None
            background.cancel_scope.cancel()

    virtual_time.run(main, 1)


def test_the_first_request_hears_what_others_had_this_month() -> None:
    async def main() -> None:
        world = World(3, Limits(tokens_per_month=1000))
        first, second, _ = world.nodes
        world.months[first].prompt_tokens = 700  # more than a third: known from its ledger after a restart
        meter = world.meters[first]
        assert meter.admit(world.identity, Amounts(tokens=200), 0.0) is None
        assert (await meter.borrow(world.identity, Amounts(tokens=200), 0.0)).left.limit_tokens is None
        world.months[first].prompt_tokens = 950
        with pytest.raises(RateLimited, match="a month") as refused:
            await world.meters[second].borrow(world.identity, Amounts(tokens=100), 0.0)
        assert refused.value.retry_after_s > 3600

    virtual_time.run(main, 1)


def test_a_flood_of_refusals_does_not_ask_the_others_each_time() -> None:
    async def main() -> int:
        world = World(3, Limits(tokens_per_minute=LIMIT))
        asked = 0
        for meter in world.meters.values():
            lend = meter.lend

            def counted(to: NodeId, ask: BorrowAsk, lend: Callable[..., Borrowed] = lend) -> Borrowed:
                nonlocal asked
                asked += 1
                return lend(to, ask)

            meter.lend = counted  # type: ignore[method-assign]
        async with anyio.create_task_group() as flood:
            for _ in range(2000):
                await anyio.sleep(0.001)
                flood.start_soon(world.request, world.nodes[0], Amounts(tokens=5000), 5000, 0.0)
        assert world.admitted == 2
        assert world.refused == 1998
        return asked

    assert virtual_time.run(main, 1) <= 40


def test_accounts_that_nobody_uses_are_forgotten() -> None:
    async def main() -> None:
        world = World(2, Limits(tokens_per_minute=LIMIT))
        async with anyio.create_task_group() as background:
            for node in world.nodes:
                background.start_soon(world.background, node)
            await world.request(world.nodes[0], Amounts(tokens=9000), 9000, 1.0)
            assert [meter.accounts for meter in world.meters.values()] == [1, 1]
            await anyio.sleep(700.0)
            assert [meter.accounts for meter in world.meters.values()] == [0, 0]
            background.cancel_scope.cancel()

    virtual_time.run(main, 1)


def test_shares_of_any_holders_sum_to_the_limit() -> None:
    from ollama_distributed.access.quotas import share_of

    chance = random.Random(7)
    for _ in range(300):
        holders = tuple(NodeId(f"n{i}") for i in range(chance.randint(1, 16)))
        limit = chance.randint(0, 10**6)
        assert sum(share_of(limit, node, holders) for node in holders) == limit


def test_a_new_holder_makes_the_others_shares_smaller_at_once_and_none_larger() -> None:
    from ollama_distributed.access.quotas import Account

    two, three = (NodeId("a"), NodeId("b")), (NodeId("a"), NodeId("b"), NodeId("c"))
    limits = Limits(tokens_per_minute=900)
    account = Account().at(0.0, limits, NodeId("a"), two)
    assert account.at(1.0, limits, NodeId("a"), three).shares["tokens"].base == 300
    assert account.at(2.0, limits, NodeId("a"), two).shares["tokens"].base == 300
    assert account.at(60.0, limits, NodeId("a"), two).shares["tokens"].base == 450
