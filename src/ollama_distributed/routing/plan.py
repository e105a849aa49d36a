"""Which nodes are asked for an answer, and in which order.

Pure: standings, loads, what caches are believed to hold and dice in; an order out, with a reason for
each node that was left out, so that a choice can be replayed. The choice goes by the time until the
first token: tokens to read ÷ the speed of reading, the wait for a slot, loading, the hop. Among
equals: this node, since no hop is cheaper than none; else the better of two that were drawn at random,
so that gateways with the same stale figures do not all send to one node (Mitzenmacher, The Power of
Two Choices, 2001). A replica that is crowded gives way however much of the prompt it holds
(consistent hashing with bounded loads, Mirrokni et al., 2016).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter

import msgspec

from ollama_distributed.base.cluster import NodeStatus
from ollama_distributed.base.errors import (
    DiskFull,
    LoadFailed,
    ModelNotFound,
    NoCapacity,
    OllamaDistributedError,
    Quarantined,
    QueueFull,
    Unavailable,
)
from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.routing import Policy

MAX_TRIES = 3
"""Nodes asked for one answer: more would make a cluster that is full work only on refusals."""

HOP_S = 0.002
"""To another node: a connection that is open, and its loop's turn."""
LOAD_S = 2.0
"""Loading a model, where nothing better is known."""
ANSWER_S = 4.0
"""How long an answer holds its slot, where nothing better is known."""
SLOTS = 4
"""Of a model that is not loaded yet."""
READ_TOKENS_PER_S = 500.0
"""Where no replica has measured it: between a CPU's 250 and a GPU's thousands."""
LEAST_TOKENS = 32
"""Read of any prompt: its last words, and the template around them."""
EQUAL_S, EQUAL_SHARE = 0.02, 0.1
"""Times until the first token that differ by no more are equal: figures are a second old."""
CROWDED = 2.0
"""Requests for each slot from which on a replica takes no more while another has a free slot."""

ELSEWHERE: tuple[type[OllamaDistributedError], ...] = (
    Unavailable,
    QueueFull,
    NoCapacity,
    LoadFailed,
    Quarantined,
    DiskFull,
    ModelNotFound,
)
"""Refusals that are about the node, not the request. `RunnerDied` is not here: the node has
tried again by itself, and a request that kills runners must not go round the cluster."""

Dice = Callable[[int], int]
"""`Random.randrange`: a number from 0 to below the argument."""


class Load(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a node said last of its work on one model, or of all its work."""

    slots: int = 0
    busy: int = 0
    queued: int = 0
    loaded: bool = False
    """The model is in its memory."""
    read_tokens_per_s: float = 0.0
    """How fast it reads a prompt alone; 0: not measured."""


class Standing(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A node that holds the model, as the replicated state has it."""

    node: NodeId
    status: NodeStatus
    """`draining` for a living node that is to get no more work."""
    reachable: bool = True
    """It has told an address for forwarded requests."""
    shunned: bool = False
    """Its replica failed lately (`health.py`): others come first."""
    load_s: float = LOAD_S
    """How long loading the model may take."""
    labels: Mapping[str, str] = {}


class Prompt(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Of the request, in estimated tokens."""

    tokens: int = 0
    cached: Mapping[NodeId, int] = {}
    """Of them, those that a replica is believed to hold."""
    held: Mapping[NodeId, int] = {}
    """How much replicas have read of all prompts, in any unit: of equals the one that holds least."""
    crammed: frozenset[NodeId] = frozenset()
    """Replicas that let other prompts go for a long one that they have to read."""


class Score(msgspec.Struct, frozen=True, gc=False):
    """What is expected of a replica; times in seconds."""

    node: NodeId
    ttft_s: float
    """Until the first token: the sum of the next four."""
    hop_s: float
    load_s: float
    wait_s: float
    read_s: float
    cached_tokens: int
    read_tokens_per_s: float
    load: Load
    crowded: bool
    shunned: bool = False


class LeftOut(msgspec.Struct, frozen=True, gc=False):
    node: NodeId
    reason: str


class Plan(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    order: tuple[NodeId, ...] = ()
    """Whom to ask, one after the other until one takes it; empty: nobody holds the model."""
    barred: tuple[LeftOut, ...] = ()
    """Those that could not be asked."""
    scores: tuple[Score, ...] = ()
    """Of all that could be asked."""
    reason: str = "only"
    """Why the first one, in a word: `X-Ollama-Route`."""
    policy: Policy = "prefix"

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """All that are not asked, and why."""
        named = set(self.order)
        return self.barred + tuple(
            LeftOut(one.node, "it failed lately" if one.shunned else "others come first")
            for one in self.scores
            if one.node not in named
        )


_LAST_RESORT: Mapping[NodeStatus, int] = {
    "online": 0,
    "joining": 1,
    "suspect": 2,
    "draining": 4,
    "offline": 5,
}
_SHUNNED = 3
"""Lower is asked earlier. Offline nodes last, but asked: the state may be old, for it is
frozen while consensus is away, and only a try tells."""

NO_PROMPT = Prompt()
_UNKNOWN = Load()
_ttft_s = attrgetter("ttft_s")
NO_LABELS: Mapping[str, str] = {}


def plan(
    holders: Sequence[Standing],
    me: NodeId,
    loads: Mapping[NodeId, Load],
    dice: Dice,
    *,
    prompt: Prompt = NO_PROMPT,
    policy: Policy = "prefix",
    turn: int = 0,
    wanted: Mapping[str, str] = NO_LABELS,
) -> Plan:
    """Choose up to `MAX_TRIES` nodes. The order of `holders` decides nothing but what the dice mean.

    `turn`: a number that grows with each request, for the policies that go in turn. `wanted`: only
    nodes with these labels.
    """
    barred: list[LeftOut] = []
    tiers: dict[int, list[Score]] = {}
    fastest = max([load.read_tokens_per_s for load in loads.values()], default=0.0) or READ_TOKENS_PER_S
    some_free = False
    for standing in holders:
        node = standing.node
        if wanted and not wanted.items() <= standing.labels.items():
            barred.append(LeftOut(node, f"it lacks the labels {_labels_text(wanted)}"))
            continue
        if node != me and not standing.reachable:
            barred.append(LeftOut(node, "it has no address for forwarded requests"))
            continue
        tier = _LAST_RESORT[standing.status]
        if standing.shunned and tier < _SHUNNED:
            tier = _SHUNNED
        score = _score(standing, loads.get(node, _UNKNOWN), prompt, 0.0 if node == me else HOP_S, fastest)
        some_free = some_free or (tier == 0 and score.load.loaded and score.wait_s == 0.0)
        tiers.setdefault(tier, []).append(score)
    if not tiers:
        return Plan(barred=tuple(barred), policy=policy)
    ranked: list[Score] = []
    for tier in sorted(tiers):
        left, count = tiers[tier], MAX_TRIES - len(ranked)
        if not count:
            break
        if policy != "prefix":
            ranked += _in_turn(left, policy, turn)[:count]
        elif len(left) == 1:
            ranked += left[:count]
        else:
            ranked += _by_time(left, me, dice, count, some_free=some_free, prompt=prompt)
    lowest = min(tiers)
    return Plan(
        order=tuple([score.node for score in ranked]),
        barred=tuple(barred),
        scores=tuple([score for tier in sorted(tiers) for score in tiers[tier]]),
        reason=_reason(ranked[0], tiers[lowest], me, policy, last_resort=lowest > 0),
        policy=policy,
    )


def _score(standing: Standing, load: Load, prompt: Prompt, hop_s: float, fastest: float) -> Score:
    tokens = prompt.tokens
    cached = prompt.cached.get(standing.node, 0) if prompt.cached else 0
    if cached > tokens:
        cached = tokens
    slots, work = load.slots or SLOTS, load.busy + load.queued
    load_s = 0.0 if load.loaded else standing.load_s
    wait_s = (work + 1 - slots) / slots * ANSWER_S if work >= slots else 0.0
    rate, to_read = load.read_tokens_per_s or fastest, tokens - cached
    # Slots that work share the machine: a prompt is read more slowly beside others.
    share = 1.0 + min(work / slots, 1.0) if load.loaded else 1.0
    read_s = max(to_read, LEAST_TOKENS) / rate * share
    return Score(
        standing.node,
        hop_s + load_s + wait_s + read_s,
        hop_s,
        load_s,
        wait_s,
        read_s,
        cached,
        rate,
        load,
        work >= CROWDED * slots,
        standing.shunned,
    )


def _by_time(
    scores: Sequence[Score],
    me: NodeId,
    dice: Dice,
    count: int,
    *,
    some_free: bool,
    prompt: Prompt,
) -> list[Score]:
    """`count` of them, the shortest time until the first token first."""
    left, last = sorted(scores, key=_ttft_s), []
    if some_free:
        last = [one for one in left if one.crowded]
        left = [one for one in left if not one.crowded] if last else left
    ranked: list[Score] = []
    while left and len(ranked) < count:
        ranked.append(left.pop(_best(left, me, dice, prompt)))
    return ranked + last[: count - len(ranked)]


def _best(scores: Sequence[Score], me: NodeId, dice: Dice, prompt: Prompt) -> int:
    """Its place among them, who are in the order of their times."""
    least = scores[0].ttft_s
    enough = least + max(EQUAL_S, EQUAL_SHARE * least)
    count = 1
    while count < len(scores) and scores[count].ttft_s <= enough:
        count += 1
    if count == 1:
        return 0
    equal: Sequence[int] = range(count)
    most = max(one.cached_tokens for one in scores[:count])
    if most:
        equal = [at for at in equal if scores[at].cached_tokens == most]
    elif prompt.crammed:
        equal = [at for at in equal if scores[at].node not in prompt.crammed] or equal
    for at in equal:
        if scores[at].node == me:
            return at
    if len(equal) == 1:
        return equal[0]
    first, second = divmod(dice(len(equal) * (len(equal) - 1)), len(equal) - 1)
    second += second >= first
    return min(
        equal[first],
        equal[second],
        key=lambda at: (_work(scores[at]), prompt.held.get(scores[at].node, 0)),
    )


def _work(score: Score) -> float:
    return (score.load.busy + score.load.queued) / max(score.load.slots, 1)


def _in_turn(scores: list[Score], policy: Policy, turn: int) -> list[Score]:
    scores = sorted(scores, key=lambda one: one.node)
    start = turn % len(scores)
    scores = scores[start:] + scores[:start]
    if policy == "least-connections":
        scores.sort(key=lambda one: one.load.busy + one.load.queued)
    return scores


def _reason(first: Score, peers: Sequence[Score], me: NodeId, policy: Policy, *, last_resort: bool) -> str:
    if last_resort:
        return "last-resort"
    if len(peers) == 1:
        return "only"
    if policy != "prefix":
        return policy
    if any(one.cached_tokens > first.cached_tokens for one in peers):
        return "spill"
    if first.cached_tokens:
        return "prefix"
    if first.node == me:
        return "local"
    return "load" if all(one.load.loaded for one in peers) or not first.load.loaded else "warm"


def _labels_text(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(labels.items()))


def most_telling(errors: Sequence[OllamaDistributedError]) -> OllamaDistributedError:
    """Of several refusals the one to show: that a node is away says less than why another
    refused, and that a node does not have the model says least."""

    def weight(error: OllamaDistributedError) -> int:
        return 2 if isinstance(error, ModelNotFound) else int(isinstance(error, Unavailable))

    return min(errors, key=weight)
