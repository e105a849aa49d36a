"""A model of nodes on shaped links that copy a blob by `distribution.plan`, in virtual time.

Each node has an up and a down link; what flows over a link shares it evenly. A message takes
`DELAY_S`. Prints how much longer than size / rate it takes until all have it:

    python -m tests.unit.distribution.swarm_model
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable

from ollama_distributed.base.ids import NodeId
from ollama_distributed.distribution.plan import (
    MIB,
    RETRY_S,
    Gifts,
    Offer,
    Slots,
    Wants,
    everything,
    piece_bytes,
    pieces_of,
)

DELAY_S = 0.002
NEWS_S = 0.05
"""Between two announcements of a node."""


class Flow:
    def __init__(self, sender: Node, receiver: Node, offer: Offer, piece: int) -> None:
        self.sender, self.receiver, self.offer, self.piece = sender, receiver, offer, piece
        self.left = float(sender.world.piece)
        self.rate = 0.0


class Node:
    def __init__(self, world: World, number: int, *, holder: bool, up: float, down: float) -> None:
        self.world = world
        self.id = NodeId(f"n{number}")
        self.up, self.down = up, down
        self.gifts = Gifts(world.pieces, only_holder=holder)
        self.slots = Slots()
        self.waiting: dict[int, tuple[Node, Offer]] = {}
        have = everything(world.pieces) if holder else 0
        self.wants = Wants(world.pieces, have, world.chance.randrange)
        self.sent: int = 0
        self.done_at = 0.0 if holder else -1.0
        self.news_due = False

    # ── fetching ────────────────────────────────────────────────────────────────────

    def step(self) -> None:
        while (offer := self.wants.next_offer(self.world.now)) is not None:
            self.world.after(DELAY_S, lambda offer=offer: self.world.nodes[offer.node].asked(self, offer))
        again = self.wants.retry_at(self.world.now)
        if again is not None:
            self.world.after(again - self.world.now + 1e-6, self.step_once(again))

    def step_once(self, at: float) -> Callable[[], None]:
        return lambda: self.step() if self.wants.retry_at(at - 1e-9) is not None else None

    def arrived(self, flow: Flow) -> None:
        assert not self.wants.have >> flow.piece & 1, "a piece came twice"
        self.wants.arrived(flow.offer)
        if self.wants.done:
            self.done_at = self.world.now
        if not self.news_due:
            self.news_due = True
            self.world.after(NEWS_S, self.announce)
        self.step()

    def announce(self) -> None:
        self.news_due = False
        for node in self.world.nodes.values():
            if node is not self and not node.wants.done:
                node.wants.heard(self.id, self.wants.have, whole=self.wants.done)
                node.step()

    # ── holding ─────────────────────────────────────────────────────────────────────

    def asked(self, who: Node, offer: Offer) -> None:
        ticket, now = self.slots.enter(who.id)
        if now:
            self.give(who, offer)
        else:
            self.waiting[ticket] = (who, offer)

    def give(self, who: Node, offer: Offer) -> None:
        piece = self.gifts.choose(self.world.now, who.id, offer.pieces & self.wants.have)
        if piece is None:
            self.next(who, 0)
            who.wants.failed(offer, self.world.now + RETRY_S)
            self.world.after(DELAY_S, who.step)
            return
        assert who.wants.granted(offer, piece)
        self.world.begin(Flow(self, who, offer, piece))

    def next(self, who: Node, sent: int) -> None:
        ticket = self.slots.leave(who.id, sent)
        if ticket is not None:
            self.give(*self.waiting.pop(ticket))


class World:
    def __init__(
        self, receivers: int, size: int, rate: float, seed: int, *, slow: float = 0.0, piece: int = 0
    ) -> None:
        self.now = 0.0
        self.chance = random.Random(seed)
        self.piece = piece or piece_bytes(size)
        self.pieces = pieces_of(size, self.piece)
        self.ideal_s = size / rate
        made = [
            Node(self, n, holder=n == 0, up=slow if slow and n == 1 else rate, down=rate)
            for n in range(receivers + 1)
        ]
        self.nodes = {node.id: node for node in made}
        self.flows: list[Flow] = []
        self.ratio = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()

    def after(self, delay: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + delay, next(self._count), what))

    def begin(self, flow: Flow) -> None:
        self.flows.append(flow)
        self._share()

    def run(self) -> float:
        """How many times size / rate it took until the last had it."""
        holder, *others = self.nodes.values()
        for node in others:
            node.wants.company = len(others)
            node.wants.heard(holder.id, 0, whole=True)
            node.step()
        while any(node.done_at < 0 for node in others):
            assert self.now < 60 * self.ideal_s, "it stands still"
            self._advance()
        return max(node.done_at for node in others) / self.ideal_s

    def _advance(self) -> None:
        end = min((flow.left / flow.rate for flow in self.flows), default=float("inf"))
        due = self._events[0][0] - self.now if self._events else float("inf")
        step = max(0.0, min(end, due))
        assert step < float("inf"), "nothing happens any more"
        for flow in self.flows:
            flow.left -= flow.rate * step
        self.now += step
        if due <= end:
            heapq.heappop(self._events)[2]()
            return
        ended = [flow for flow in self.flows if flow.left <= 1e-3]
        self.flows = [flow for flow in self.flows if flow.left > 1e-3]
        for flow in ended:
            flow.sender.sent += 1
            flow.sender.next(flow.receiver, self.piece)
            self.after(DELAY_S, lambda flow=flow: flow.receiver.arrived(flow))
        self._share()

    def _share(self) -> None:
        """Max-min fair: the tightest link is shared evenly, what is left goes to the others."""
        room: dict[tuple[NodeId, bool], float] = {}
        users: dict[tuple[NodeId, bool], set[int]] = {}
        for at, flow in enumerate(self.flows):
            for key, rate in (
                ((flow.sender.id, True), flow.sender.up),
                ((flow.receiver.id, False), flow.receiver.down),
            ):
                room[key] = rate
                users.setdefault(key, set()).add(at)
        open_ = set(range(len(self.flows)))
        while open_:
            share, key = min((room[key] / len(users[key]), key) for key in users if users[key])
            for at in list(users[key]):
                flow = self.flows[at]
                flow.rate = share
                open_.discard(at)
                for other in ((flow.sender.id, True), (flow.receiver.id, False)):
                    users[other].discard(at)
                    room[other] = max(0.0, room[other] - share)


def measured(receivers: int, size_mib: int, seed: int = 1, rate_mbit: float = 200.0, **other: float) -> World:
    world = World(receivers, size_mib * MIB, rate_mbit * 1e6 / 8, seed, **other)  # type: ignore[arg-type]
    world.ratio = world.run()
    return world


if __name__ == "__main__":
    for size_mib in (64, 256, 768):
        for receivers in (4, 8):
            found = [measured(receivers, size_mib, seed) for seed in (1, 2, 3)]
            holder = [next(iter(world.nodes.values())).sent / world.pieces for world in found]
            ratios = " ".join(f"{world.ratio:.3f}" for world in found)
            print(f"{size_mib:4} MiB, {receivers} receivers: {ratios}  (the holder sent {max(holder):.2f})")
