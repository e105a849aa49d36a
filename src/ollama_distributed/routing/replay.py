"""What another policy would have done with the choices that were recorded (pure but for
dice with a seed of their own).

Each policy begins with empty caches and sees the requests in their order and at their times. A replica
is busy with a request for as long as that one took (or as its time until the first token says), reads
what its cache does not hold at the speed that was recorded, and remembers what it read. So the policies
are compared with each other under one model of the replicas; `recorded` is what happened in truth.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Sequence

import msgspec

from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.routing import Candidate, Policy, RouteDecision
from ollama_distributed.routing.plan import LOAD_S, Load, Prompt, Standing, plan
from ollama_distributed.routing.prefix import PrefixIndex

_KEY_DIGITS = 16


class Replayed(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the table."""

    policy: str
    """`recorded`: what happened."""
    requests: int = 0
    read_tokens: int = 0
    """Of prompts, that no cache held."""
    ttft_s: float = 0.0
    """Mean time until the first token; of `recorded` as measured."""
    ttft_p95_s: float = 0.0
    waited: int = 0
    """Requests that found no free slot."""
    nodes: dict[str, int] = {}
    """Requests by the node's name."""


def keys_of(decision: RouteDecision) -> tuple[int, ...]:
    text = decision.prefix
    return tuple(int(text[at : at + _KEY_DIGITS], 16) for at in range(0, len(text), _KEY_DIGITS))


def usable(decisions: Iterable[RouteDecision]) -> list[RouteDecision]:
    """Those between whose replicas there was a choice, oldest first."""
    return sorted((one for one in decisions if len(one.candidates) > 1), key=lambda one: one.at)


def recorded(decisions: Sequence[RouteDecision]) -> Replayed:
    """What happened, of those that ended."""
    ended = [one.times for one in decisions if one.times is not None]
    nodes: dict[str, int] = {}
    for times in ended:
        nodes[times.node] = nodes.get(times.node, 0) + 1
    firsts = [times.load_s + times.wait_s + times.prefill_s for times in ended]
    return Replayed(
        policy="recorded",
        requests=len(ended),
        read_tokens=sum(times.prompt_tokens - times.cached_tokens for times in ended),
        ttft_s=sum(firsts) / len(firsts) if firsts else 0.0,
        ttft_p95_s=_p95(firsts),
        waited=sum(times.wait_s > 0.05 for times in ended),
        nodes=dict(sorted(nodes.items())),
    )


def replay(decisions: Sequence[RouteDecision], policy: Policy, seed: int = 0) -> Replayed:
    """`decisions`: as `usable` says."""
    dice = random.Random(seed).randrange  # noqa: S311  # its own seed: the same table each time
    replicas, indexes = _Replicas(), dict[str, PrefixIndex]()
    read_tokens, waited, firsts = 0, 0, []
    nodes: dict[str, int] = {}
    for turn, decision in enumerate(decisions):
        keys = keys_of(decision)
        index = indexes.setdefault(decision.model, PrefixIndex())
        tokens = decision.times.prompt_tokens if decision.times is not None else decision.prompt_tokens
        per_block = tokens / max(len(keys), 1)
        held = {node: int(blocks * per_block) for node, blocks in index.cached(keys).items()}
        loads = {one.node: replicas.load(decision, one) for one in decision.candidates}
        made = plan(
            [_standing(one) for one in decision.candidates],
            next((one.node for one in decision.candidates if one.here), NodeId("")),
            loads,
            dice,
            prompt=Prompt(tokens=tokens, cached=held),
            policy=policy,
            turn=turn,
        )
        score = next(one for one in made.scores if one.node == made.order[0])
        name = next(one.name for one in decision.candidates if one.node == score.node)
        nodes[name] = nodes.get(name, 0) + 1
        read_tokens += tokens - score.cached_tokens
        waited += score.wait_s > 0.0
        firsts.append(score.ttft_s)
        index.read(score.node, keys)
        replicas.took(decision, score.node, score.ttft_s)
    return Replayed(
        policy=policy,
        requests=len(decisions),
        read_tokens=read_tokens,
        ttft_s=sum(firsts) / len(firsts) if firsts else 0.0,
        ttft_p95_s=_p95(firsts),
        waited=waited,
        nodes=dict(sorted(nodes.items())),
    )


def _standing(one: Candidate) -> Standing:
    return Standing(node=one.node, status="online", load_s=one.load_s or LOAD_S)


def _p95(values: Sequence[float]) -> float:
    return sorted(values)[int(len(values) * 0.95)] if values else 0.0


class _Replicas:
    """Who works until when."""

    def __init__(self) -> None:
        self._until: dict[tuple[str, NodeId], list[float]] = {}

    def load(self, decision: RouteDecision, one: Candidate) -> Load:
        working = self._until.setdefault((decision.model, one.node), [])
        while working and working[0] <= decision.at:
            heapq.heappop(working)
        slots, work = max(one.slots, 1), len(working)
        return Load(
            slots=slots,
            busy=min(work, slots),
            queued=max(work - slots, 0),
            loaded=one.loaded,
            read_tokens_per_s=one.read_tokens_per_s,
        )

    def took(self, decision: RouteDecision, node: NodeId, ttft_s: float) -> None:
        decode_s = decision.times.decode_s if decision.times is not None else 0.0
        heapq.heappush(self._until[decision.model, node], decision.at + ttft_s + decode_s)
