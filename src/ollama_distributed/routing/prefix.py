"""Which replica of a model lately read how long a beginning of a prompt (pure, bounded).

Fed by what this gateway sent (`read`), put right by what runners report (`lost`): an engine that
does not hold what it read at some time holds nothing that it read before, since caches let the
oldest go. A replica whose model was loaded anew has an empty cache (`live`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from ollama_distributed.base.ids import NodeId

MOST_BLOCKS = 4096
"""Remembered of a model: 4 MB of different prompts, some 1.5 MB of memory. The one that was read
longest ago goes first, and of a prompt its end."""
MOST_REPLICAS = 4
"""Remembered of a block, those that read it last: the choice needs a few, not all."""
TOKENS_PER_BLOCK = 256.0
"""Of English text; each model's own is learned."""
_NEW = 0.2
"""Weight of the latest measurement."""
_MOST_LIVES = 4096

_Readers = tuple[tuple[NodeId, int], ...]


class PrefixIndex:
    """Of one model."""

    __slots__ = (
        "_blocks",
        "_full",
        "_lives",
        "_lost",
        "_most",
        "_turn",
        "held",
        "looks",
        "losses",
        "tokens_per_block",
    )

    def __init__(self, most_blocks: int = MOST_BLOCKS) -> None:
        self._most = most_blocks
        self._blocks: OrderedDict[int, _Readers] = OrderedDict()
        """Who read it, and in which turn; who read it last comes first."""
        self._lost: dict[NodeId, int] = {}
        """What the replica read until this turn it holds no more."""
        self._lives: dict[NodeId, object] = {}
        self._full: set[NodeId] = set()
        self.held: dict[NodeId, int] = {}
        """Blocks that a replica read for the first time: how much it has to keep."""
        self._turn = 0
        self.tokens_per_block = TOKENS_PER_BLOCK
        self.losses = 0
        """How often a replica was found to hold nothing any more."""
        self.looks = 0
        """Blocks looked up so far: what a choice costs."""

    def __len__(self) -> int:
        return len(self._blocks)

    def cached(self, keys: Sequence[int]) -> dict[NodeId, int]:
        """Replicas that hold a beginning of it, and of how many blocks; at least the
        `MOST_REPLICAS` best, if there are so many."""
        found: dict[NodeId, int] = {}
        blocks, lost, before = self._blocks, self._lost, None
        at = len(keys)
        while at and len(found) < MOST_REPLICAS:
            at -= 1
            readers = blocks.get(keys[at])
            if readers is None or readers is before:
                continue
            before = readers
            for node, turn in readers:
                if node not in found and turn > lost.get(node, 0):
                    found[node] = at + 1
        self.looks += len(keys) - at
        return found

    def read(self, node: NodeId, keys: Sequence[int]) -> None:
        """The replica holds all of it now."""
        self._turn += 1
        blocks, fresh = self._blocks, 0
        mine = (node, self._turn)
        alone: _Readers = (mine,)
        shared: tuple[_Readers, _Readers] = ((), alone)
        """Blocks that the same ones read have one and the same tuple: `cached` passes over it."""
        for key in reversed(keys):  # its end first: it is older then than its beginning, and goes first
            readers = blocks.get(key)
            if readers is None:
                blocks[key] = alone
                fresh += 1
                continue
            others = tuple(one for one in readers if one[0] != node)
            fresh += len(others) == len(readers)
            if others != shared[0]:
                shared = (others, (mine, *others[: MOST_REPLICAS - 1]))
            blocks[key] = shared[1]
            blocks.move_to_end(key)
        self.held[node] = self.held.get(node, 0) + fresh
        while len(blocks) > self._most:
            blocks.popitem(last=False)

    def turn_of(self, node: NodeId, key: int) -> int:
        """When the replica read this block last; 0: not known."""
        return next((turn for reader, turn in self._blocks.get(key, ()) if reader == node), 0)

    def lost(self, node: NodeId, turn: int) -> None:
        """It did not hold what it had read in this turn."""
        if turn > self._lost.get(node, 0):
            self._lost[node] = turn

    def forget(self, node: NodeId) -> None:
        """It holds nothing, and has room."""
        self.losses += 1
        self.lost(node, self._turn)
        self._full.discard(node)
        self.held.pop(node, None)

    def full(self, node: NodeId) -> None:
        """It let something go: what it reads anew takes the place of what it holds."""
        self._full.add(node)

    @property
    def crammed(self) -> frozenset[NodeId]:
        """Replicas whose cache is full."""
        return frozenset(self._full)

    def live(self, node: NodeId, life: object) -> None:
        """What tells one load of the replica's model from the next; None: it is not loaded."""
        known = self._lives.get(node, self)
        if known == life:
            return
        if known is not self or life is None:
            self.forget(node)
        if len(self._lives) >= _MOST_LIVES:
            self._lives.clear()
        self._lives[node] = life

    def measured(self, size_blocks: float, tokens: int) -> None:
        """So long a prompt had so many tokens."""
        if size_blocks >= 1.0 and tokens > 0:
            self.tokens_per_block += _NEW * (tokens / size_blocks - self.tokens_per_block)
