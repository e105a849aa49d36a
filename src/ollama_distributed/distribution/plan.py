"""Who asks whom for which piece of a blob, and what a holder sends to whom.

Who fetches offers a holder some of the pieces that it lacks, the rarest first; the holder
chooses one of them, because it alone knows what it has sent already. So no answer is "not that
one", and the only holder of a blob sends every piece once before it sends any twice: what is
on its way to one node comes to the others from there. Each offer is a set that no other
holder is offered meanwhile, so nothing is fetched twice, not even at the end.

Sets of pieces are whole numbers, one bit for a piece: of 4,096 pieces in a microsecond.
Pure. `tests/unit/distribution/swarm_model.py` measures it in a model of shaped links.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ollama_distributed.base.ids import NodeId

MIB = 1 << 20
MIN_PIECE_BYTES = MIB
MAX_PIECE_BYTES = 16 * MIB
"""Held in memory while it is on its way."""
AIM_PIECES = 2048
"""Fewer are not spread evenly over many nodes; more cost a message each."""

OFFER = 24
"""Pieces offered at once: enough for a holder to find one that it has not sent yet."""
FLIGHT_BYTES = 64 * MIB
"""Of pieces on their way to one node, all holders together."""
MAX_FLIGHT = 8
"""Pieces on their way: with fewer a link runs dry between two of them."""
MIN_FLIGHT = 3
ENOUGH_HOLDERS = 4
"""From so many on each is asked for one piece at a time, of fewer for more, so that none has to
wait for the next question. More than that keeps the others from what this one could give them."""

UPLOADS = 8
"""Pieces that a node sends at once: one for each of those who fetch with it, if they are not many;
with fewer some stand idle, with more each arrives later and can be passed on later. In the model
of links 1.04 for 8 receivers of 256 MiB; with 4 at once and two of each holder 1.19."""
HOLD_S = 6.0
"""The only holder sends no piece to a second node within this, as long as others were never sent."""
HOLD_AFTER_ALL_S = 1.0
"""The same once it has sent every piece: it helps with what has not been passed on by then."""
RETRY_S = 0.25
"""When a holder has nothing to send of what it was offered."""

Draw = Callable[[int], int]
"""`draw(n)`: one of 0 … n-1, as `random.Random.randrange`."""


def beside(nodes: Sequence[NodeId], node: NodeId, most: int) -> list[NodeId]:
    """With whom a node exchanges what all of `nodes` fetch: with all, or where they are too many
    with those 1, 2, 4, ... places from it, so that it is few steps to any. Who is beside one has that
    one beside it."""
    at, count = nodes.index(node), len(nodes)
    if count <= most + 1:
        return [other for other in nodes if other != node]
    found: dict[NodeId, None] = {}
    step = 1
    while step <= count // 2 and len(found) < most - 1:
        found[nodes[(at + step) % count]] = found[nodes[at - step]] = None
        step *= 2
    return list(found)


def piece_bytes(size: int) -> int:
    """Of a blob with so many bytes: a power of two."""
    piece = MIN_PIECE_BYTES
    while piece < MAX_PIECE_BYTES and piece * AIM_PIECES < size:
        piece *= 2
    return piece


def pieces_of(size: int, piece: int) -> int:
    return -(-size // piece)


def everything(pieces: int) -> int:
    return (1 << pieces) - 1


def bits(pieces: int) -> Iterator[int]:
    """The pieces of a set, in order."""
    while pieces:
        low = pieces & -pieces
        yield low.bit_length() - 1
        pieces ^= low


def span_of(pieces: range) -> int:
    """Pieces that follow each other."""
    return ((1 << len(pieces)) - 1) << pieces.start


def _some(pieces: int, most: int, start: int) -> int:
    """At most so many of a set, from `start` on and around its end."""
    chosen = 0
    for part in (pieces >> start << start, pieces & ((1 << start) - 1)):
        while part and most:
            low = part & -part
            chosen |= low
            part ^= low
            most -= 1
    return chosen


class _Holder:
    __slots__ = ("asked", "has", "until", "whole")

    def __init__(self) -> None:
        self.has = 0
        self.whole = False
        self.asked = 0
        """Offers that it has not answered and pieces that it sends."""
        self.until = 0.0
        """Not to be asked before."""


class Offer:
    """One question to a holder; its pieces are nobody else's until it is answered."""

    __slots__ = ("node", "pieces")

    def __init__(self, node: NodeId, pieces: int) -> None:
        self.node = node
        self.pieces = pieces


class Wants:
    """What a node still needs of one blob, and whom to ask next."""

    def __init__(self, pieces: int, have: int, draw: Draw, *, flight: int = MAX_FLIGHT) -> None:
        self.pieces = pieces
        self.have = have
        self.company = 1
        """Nodes that hold or fetch the blob, also those that have nothing of it yet."""
        self._all = everything(pieces)
        self._flight = flight
        self._taken = 0
        """Offered to someone, or on the way."""
        self._asked = 0
        self._holders: dict[NodeId, _Holder] = {}
        self._levels: list[int] = [self._all]
        """At `n`: pieces that `n` of the nodes that fetch too have."""
        self._draw = draw

    @property
    def done(self) -> bool:
        return self.have == self._all

    @property
    def full(self) -> bool:
        """As much is on its way as may be."""
        return self._asked >= self._flight

    @property
    def holders(self) -> tuple[NodeId, ...]:
        return tuple(self._holders)

    def heard(self, node: NodeId, has: int, *, whole: bool = False) -> None:
        """What a node has by now; it never has less."""
        holder = self._holders.setdefault(node, _Holder())
        if holder.whole:
            return
        self._count(holder, 0 if whole else has & self._all)
        if whole:
            holder.whole = True
            holder.has = self._all

    def drop(self, node: NodeId) -> None:
        """It is gone, or lied. Its offers must be ended as `failed`."""
        holder = self._holders.pop(node, None)
        if holder is not None and not holder.whole:
            self._count(holder, 0)

    def next_offer(self, now: float) -> Offer | None:
        """Whom to ask now; None: nobody, or enough is on its way."""
        if self.full:
            return None
        wanted = self._all & ~self.have & ~self._taken
        if not wanted:
            return None
        best: tuple[tuple[int, bool, int], NodeId] | None = None
        most = self.most_of_one()
        for node, holder in self._holders.items():
            if holder.asked < most and holder.until <= now and holder.has & wanted:
                # Who fetches too before who has it all: only the latter can give what is rare.
                rank = (holder.asked, holder.whole, self._draw(1 << 16))
                if best is None or rank < best[0]:
                    best = (rank, node)
        if best is None:
            return None
        holder = self._holders[best[1]]
        offer = Offer(best[1], self._rarest(wanted & holder.has))
        holder.asked += 1
        self._asked += 1
        self._taken |= offer.pieces
        return offer

    def retry_at(self, now: float) -> float | None:
        """When a holder that was not to be asked may be asked again."""
        return min((one.until for one in self._holders.values() if one.until > now), default=None)

    def granted(self, offer: Offer, piece: int) -> bool:
        """The holder sends this piece; the others are free again. False: it was not offered."""
        if not offer.pieces >> piece & 1:
            return False
        self._taken &= ~(offer.pieces ^ (1 << piece))
        offer.pieces = 1 << piece
        return True

    def lost(self, piece: int) -> None:
        """What was taken to be here is not."""
        self.have &= ~(1 << piece)

    def unasked(self) -> bool:
        """Something is missing that nobody was asked for."""
        return bool(self._all & ~self.have & ~self._taken)

    def most_of_one(self) -> int:
        """Pieces that one holder is asked for at once."""
        return max(1, -(-ENOUGH_HOLDERS // max(self.company, len(self._holders))))

    def elsewhere(self, offer: Offer) -> bool:
        """Another holder has some of it, too."""
        most = self.most_of_one()
        return any(
            node != offer.node and holder.has & offer.pieces and holder.asked < most
            for node, holder in self._holders.items()
        )

    def arrived(self, offer: Offer) -> None:
        """What was granted is here and has the right hash."""
        self.have |= offer.pieces
        self._over(offer)

    def failed(self, offer: Offer, again_at: float) -> None:
        """Nothing came of it; the holder is left alone until `again_at`."""
        self._over(offer)
        holder = self._holders.get(offer.node)
        if holder is not None:
            holder.until = max(holder.until, again_at)

    def _over(self, offer: Offer) -> None:
        self._taken &= ~offer.pieces
        self._asked -= 1
        holder = self._holders.get(offer.node)
        if holder is not None:
            holder.asked = max(0, holder.asked - 1)

    def _rarest(self, possible: int) -> int:
        chosen, left = 0, OFFER
        for level in self._levels:
            some = _some(possible & level, left, self._draw(self.pieces))
            chosen |= some
            left -= some.bit_count()
            if not left:
                break
        return chosen

    def _count(self, holder: _Holder, has: int) -> None:
        """All at once, not one by one: of a blob of a terabyte they are 65,536."""
        gone, new = holder.has & ~has, has & ~holder.has
        holder.has = has
        stay = self._all & ~(gone | new)
        old = [0, *self._levels, 0, 0]
        self._levels = [
            (same & stay) | (fewer & new) | (more & gone)
            for fewer, same, more in zip(old, old[1:], old[2:], strict=False)
        ]
        while len(self._levels) > 1 and not self._levels[-1]:
            self._levels.pop()


class Gifts:
    """What a node has sent of one blob, and what it sends next."""

    def __init__(self, pieces: int, *, only_holder: bool) -> None:
        self._never = everything(pieces)
        self._only_holder = only_holder
        self._sent: dict[int, tuple[int, float, NodeId]] = {}
        """How often, when last and to whom."""

    def choose(self, now: float, node: NodeId, offered: int) -> int | None:
        """One of the offered pieces, for this node; None: none of them now."""
        fresh = offered & self._never
        if fresh:
            return self._note(now, node, (fresh & -fresh).bit_length() - 1)
        hold_s = 0.0 if not self._only_holder else HOLD_S if self._never else HOLD_AFTER_ALL_S
        best: tuple[int, float, int] | None = None
        for piece in bits(offered):
            times, at, to = self._sent[piece]
            if (now - at >= hold_s or to == node) and (best is None or (times, at, piece) < best):
                best = (times, at, piece)
        return None if best is None else self._note(now, node, best[2])

    def broken(self, piece: int, node: NodeId) -> None:
        """It did not get there: as if it had not been sent, unless others were sent it since."""
        times, at, to = self._sent.get(piece, (0, 0.0, node))
        if to != node:
            return
        if times > 1:
            self._sent[piece] = (times - 1, at, to)
        else:
            self._sent.pop(piece, None)
            self._never |= 1 << piece

    def _note(self, now: float, node: NodeId, piece: int) -> int:
        times = self._sent.get(piece, (0, 0.0, node))[0]
        self._never &= ~(1 << piece)
        self._sent[piece] = (times + 1, now, node)
        return piece


class Slots:
    """A node's uplink: so many pieces at once, and whoever gets least is next."""

    def __init__(self, slots: int = UPLOADS) -> None:
        self._free = slots
        self._running: dict[NodeId, int] = {}
        self._sent_bytes: dict[NodeId, int] = {}
        self._waiting: list[tuple[int, NodeId]] = []
        self._tickets = 0

    def enter(self, node: NodeId) -> tuple[int, bool]:
        """A ticket, and whether its turn has come; else `next` names it later."""
        self._tickets += 1
        if self._free:
            self._start(node)
            return self._tickets, True
        self._waiting.append((self._tickets, node))
        return self._tickets, False

    def give_up(self, ticket: int) -> None:
        """One that waits goes away."""
        self._waiting = [one for one in self._waiting if one[0] != ticket]

    def leave(self, node: NodeId, sent_bytes: int) -> int | None:
        """One that ran ends. Returns the ticket whose turn has come."""
        self._free += 1
        self._running[node] -= 1
        if not self._running[node]:
            del self._running[node]
        self._sent_bytes[node] = self._sent_bytes.get(node, 0) + sent_bytes
        if not self._waiting:
            if not self._running:
                self._sent_bytes.clear()  # what was is forgotten when nobody wants anything
            return None

        def least(one: tuple[int, NodeId]) -> tuple[int, int, int]:
            return (self._running.get(one[1], 0), self._sent_bytes.get(one[1], 0), one[0])

        ticket, chosen = min(self._waiting, key=least)
        self.give_up(ticket)
        self._start(chosen)
        return ticket

    def _start(self, node: NodeId) -> None:
        self._free -= 1
        self._running[node] = self._running.get(node, 0) + 1
