"""What this gateway believes of the replicas' prefix caches and of its own requests on them.

Between two load reports, which are a second apart, a gateway would send a burst to one node: so
what it sent itself counts at once. State only, of one event loop; nothing here waits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.tokens import Done, Progress
from ollama_distributed.routing.blocks import BLOCK_BYTES, NO_CHAIN, Chain
from ollama_distributed.routing.plan import Prompt
from ollama_distributed.routing.prefix import PrefixIndex

MOST_MODELS = 32
"""With an index each; the one that was asked for longest ago is forgotten."""
_MOST_KNOWN = 4096
"""Replicas remembered as telling what was cached."""

NOBODY: frozenset[NodeId] = frozenset()

Replica = tuple[NodeId, str]


class Caches:
    def __init__(self) -> None:
        self._indexes: OrderedDict[str, PrefixIndex] = OrderedDict()
        self._sent: dict[Replica, int] = {}
        self._tell: set[Replica] = set()
        """Those whose engine has said that something was cached: their zero means something."""

    def index(self, key: str) -> PrefixIndex:
        found = self._indexes.get(key)
        if found is None:
            found = self._indexes[key] = PrefixIndex()
            if len(self._indexes) > MOST_MODELS:
                self._indexes.popitem(last=False)
        else:
            self._indexes.move_to_end(key)
        return found

    def prompt(self, key: str, chain: Chain) -> Prompt:
        index = self.index(key)
        rate = index.tokens_per_block
        cached: Mapping[NodeId, int] = {
            node: int(blocks * rate) for node, blocks in index.cached(chain.keys).items()
        }
        tokens = int(chain.size_bytes / BLOCK_BYTES * rate)
        return Prompt(
            tokens=tokens, cached=cached, held=index.held, crammed=index.crammed if chain.keys else NOBODY
        )

    def sent(self, node: NodeId, key: str) -> int:
        """Requests of this gateway that are on the replica now."""
        return self._sent.get((node, key), 0)

    def started(self, node: NodeId, key: str) -> None:
        replica = (node, key)
        self._sent[replica] = self._sent.get(replica, 0) + 1

    def ended(self, node: NodeId, key: str) -> None:
        replica = (node, key)
        left = self._sent.get(replica, 0) - 1
        if left > 0:
            self._sent[replica] = left
        else:
            self._sent.pop(replica, None)

    def tells(self, replica: Replica, cached_tokens: int) -> bool:
        """Whether what its engine says of its cache means something."""
        if cached_tokens:
            if len(self._tell) >= _MOST_KNOWN:
                self._tell.clear()
            self._tell.add(replica)
        return replica in self._tell


class Trip:
    """One request on its way: tells `Caches` where it is, and what came of it."""

    __slots__ = (
        "_alone",
        "_caches",
        "_chain",
        "_expected",
        "_key",
        "_node",
        "_on",
        "_rest",
        "_turns",
        "reason",
    )

    def __init__(
        self,
        caches: Caches,
        key: str,
        chain: Chain = NO_CHAIN,
        expected: Mapping[NodeId, int] | None = None,
        reason: str = "",
        *,
        rest: bool = False,
    ) -> None:
        """`expected`: tokens that replicas were believed to hold. `rest`: what is read is longer than the
        prompt, by what was answered before."""
        self._rest = rest
        self._caches = caches
        self._key = key
        self._chain = chain
        self._expected = expected or {}
        self._node = NodeId("")
        self._on = False
        self._alone = False
        self._turns = 0
        self.reason = reason

    def to(self, node: NodeId, *, again: bool) -> None:
        """It is sent to this node. `again`: another one refused it."""
        self.over()
        caches, key, keys = self._caches, self._key, self._chain.keys
        self._alone = caches.sent(node, key) == 0
        self._turns = 0
        if keys and node in self._expected:
            index = caches.index(key)
            last = round(self._expected[node] / index.tokens_per_block)
            self._turns = index.turn_of(node, keys[min(max(last, 1), len(keys)) - 1])
        if again:
            self.reason = "retry"
        self._node, self._on = node, True
        caches.started(node, key)

    def reads(self, event: Progress) -> None:
        if event.processed <= event.cached:  # its first one
            self._judge(event.cached)

    def spoke(self) -> None:
        """Its first word: the prompt was read."""
        if self._chain.keys:
            self._caches.index(self._key).read(self._node, self._chain.keys)

    def done(self, event: Done) -> None:
        if event.prompt_tokens and self._chain.keys and not self._rest:
            self._caches.index(self._key).measured(self._chain.size_bytes / BLOCK_BYTES, event.prompt_tokens)
            self._judge(event.cached_tokens)

    def _judge(self, cached: int) -> None:
        caches, node = self._caches, self._node
        tells = caches.tells((node, self._key), cached)
        # Beside others a slot that holds it may just be busy: that says nothing of the cache.
        if self._turns and self._alone and tells and cached < self._expected[node] / 2:
            index = caches.index(self._key)
            index.lost(node, self._turns)
            index.full(node)
        self._turns = 0

    def over(self) -> None:
        """Nothing more comes from where it is. Idempotent."""
        if self._on:
            self._on = False
            self._caches.ended(self._node, self._key)
