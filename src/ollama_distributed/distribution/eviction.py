"""Which models leave a disk when room is needed, and what keeps the last copy. Pure.

A copy goes only when as many other holders as copies are to stay have promised, just now, to
keep theirs (`Leaving`). Who is dropping its own copy promises nothing. So of all that drop a
model at the same time the one that began last has its promises from nodes that stay: those it
asked were not dropping when they answered, after it had begun. No order, loss or delay of
messages, and no view of the cluster that is old, changes that.

Among the holders the heaviest are the keepers (rendezvous hashing, Thaler and Ravishankar 1998).
Of two nodes that ask each other the heavier gives way, and only what a node need not keep
counts as room when models are placed: else every holder would offer the room of the same copy.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import msgspec

from ollama_distributed.base.ids import NodeId


@functools.lru_cache(maxsize=1 << 16)
def weight(digest: str, node: NodeId) -> tuple[int, NodeId]:
    """A node's among the holders of what has this digest; no two are equal."""
    value = hashlib.blake2b(f"{digest}\0{node}".encode(), digest_size=8).digest()
    return int.from_bytes(value, "big"), node


def spare(me: NodeId, digest: str, holders: Iterable[NodeId], copies: int = 1) -> bool:
    """Whether `me` is none of the `copies` heaviest holders: nodes that each drop what is spare
    to them leave so many, however old their views are."""
    mine = weight(digest, me)
    return sum(weight(digest, node) > mine for node in holders if node != me) >= copies


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A model that may go."""

    model: str
    blobs: Mapping[str, int]
    """Bytes of each, by digest; models may share them."""
    last_used: float
    planned: bool = False
    """The cluster's plan has it here, though nobody ordered that: it goes after the others."""


def choose(candidates: Iterable[Candidate], kept: Collection[str], need_bytes: int) -> tuple[str, ...]:
    """Which models go so that `need_bytes` become free: least recently used first, and none
    whose going frees nothing that is needed. `kept`: blobs of models that stay. Empty: all of
    them together would not do."""
    if need_bytes <= 0:
        return ()
    order = sorted(candidates, key=lambda one: (one.planned, one.last_used, one.model))
    users = Counter(digest for one in order for digest in one.blobs if digest not in kept)
    freed, going = 0, list[Candidate]()
    for one in order:
        going.append(one)
        for digest, size in one.blobs.items():
            if digest in users:
                users[digest] -= 1
                freed += size if not users[digest] else 0
        if freed >= need_bytes:
            break
    else:
        return ()
    for one in reversed(going[:-1]):
        back = [digest for digest in one.blobs if digest in users]
        held = sum(one.blobs[digest] for digest in back if not users[digest])
        if freed - held >= need_bytes:
            going.remove(one)
            freed -= held
            users.update(back)
    return tuple(one.model for one in going)


def freed_bytes(candidates: Iterable[Candidate], kept: Collection[str]) -> int:
    """What becomes free when all of them go."""
    blobs: dict[str, int] = {}
    for one in candidates:
        blobs |= one.blobs
    return sum(size for digest, size in blobs.items() if digest not in kept)


# ── promises ────────────────────────────────────────────────────────────────────────


class Attempt:
    """This node is about to drop a model."""

    def __init__(self, model: str, digest: str, copies: int) -> None:
        self.model = model
        self.digest = digest
        self.copies = copies
        """Other nodes that must promise to keep theirs."""
        self.promised: set[NodeId] = set()
        self.certain = False
        """It has its promises and goes."""
        self.given_up = False


class Leaving:
    """What this node is dropping, and what it promises others."""

    def __init__(self, me: NodeId) -> None:
        self._me = me
        self._attempts: dict[tuple[str, str], Attempt] = {}

    def begin(self, model: str, digest: str, copies: int) -> Attempt | None:
        """From now on nobody else is promised this copy. None: it is being dropped already."""
        if (model, digest) in self._attempts:
            return None
        attempt = self._attempts[model, digest] = Attempt(model, digest, copies)
        return attempt

    def promise(self, by: NodeId, model: str, digest: str, *, holds: bool) -> bool:
        """`by` asks whether this node keeps its copy. `holds`: it has it, whole."""
        attempt = self._attempts.get((model, digest))
        if attempt is None:
            return holds
        if attempt.certain or not holds or weight(digest, self._me) < weight(digest, by):
            return False
        attempt.given_up = True
        self.end(attempt)
        return True

    def settle(self, attempt: Attempt) -> bool:
        """Whether it goes now: all that were needed have promised, and it was not given up."""
        attempt.certain = not attempt.given_up and len(attempt.promised) >= attempt.copies
        return attempt.certain

    def end(self, attempt: Attempt) -> None:
        """It is gone, or stays after all. Idempotent."""
        key = (attempt.model, attempt.digest)
        if self._attempts.get(key) is attempt:
            del self._attempts[key]
