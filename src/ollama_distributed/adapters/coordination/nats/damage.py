"""Finds a replica that lost messages. It is taken out and in again (docs/upkeep.md).

A server whose files were damaged can go on serving what is left (seen: a halved block file).
What every replica holds follows from the last sequence alone, so two that stand at the same
one and count differently are not copies of each other; with three or more the odd one shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import anyio
import structlog

from ollama_distributed.adapters.coordination.nats.seat import Formation
from ollama_distributed.adapters.coordination.nats.system import StreamCount, System
from ollama_distributed.base.errors import Unavailable
from ollama_distributed.base.ids import NodeId

log = structlog.get_logger()

DAMAGED = "coordination.replica_damaged"

LOOKS = 3
"""A difference must last: deletions reach the replicas one after the other."""
LOOK_S = 0.5


async def damaged(system: System, formation: Formation, stream: str) -> tuple[NodeId, ...]:
    """Voters whose replica differs from what the majority holds, look after look. Servers that
    do not answer are not judged.

    Raises:
        Unavailable: no two replicas could be compared.
    """
    suspects: set[NodeId] | None = None
    for look in range(LOOKS):
        if look:
            await anyio.sleep(LOOK_S)
        odd = set(differing(await _counts(system, formation.nodes, stream)))
        suspects = odd if suspects is None else suspects & odd
        if not suspects:
            return ()
    found = tuple(sorted(suspects or ()))
    log.warning(DAMAGED, nodes=found)
    return found


def differing(counts: Mapping[NodeId, StreamCount]) -> tuple[NodeId, ...]:
    """Who counts otherwise than most of those that stand at the same last sequence. Pure.

    Raises:
        Unavailable: no two stand at the same.
    """
    sequences = Counter(count.last_seq for count in counts.values())
    last_seq, standing = sequences.most_common(1)[0] if sequences else (0, 0)
    if standing < 2:
        raise Unavailable("the replicas are under way: nothing to compare")
    level = {node: count for node, count in counts.items() if count.last_seq == last_seq}
    held = Counter(count.messages for count in level.values()).most_common()
    if len(held) > 1 and held[0][1] == held[1][1]:
        # As many say one as say the other: nothing is made up in these files, it is only lost.
        right = max(messages for messages, votes in held if votes == held[0][1])
    else:
        right = held[0][0]
    return tuple(node for node, count in level.items() if count.messages != right)


async def _counts(system: System, nodes: Sequence[NodeId], stream: str) -> dict[NodeId, StreamCount]:
    found: dict[NodeId, StreamCount] = {}
    for node in nodes:
        try:
            replica = (await system.jetstream(node)).replica(stream)
        except Unavailable:
            continue
        if replica is not None:
            found[node] = replica
    return found
