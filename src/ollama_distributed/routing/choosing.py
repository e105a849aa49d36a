"""Makes each choice of one gateway: gathers what `plan.py` decides by.

Holders from the state, loads from reports, what caches hold from this gateway's own requests. No
message, disk or consensus.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from ollama_distributed.base.cluster import NodeStatus
from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.inference import EmbedRequest, InferenceRequest, RerankRequest
from ollama_distributed.base.routing import Policy
from ollama_distributed.cluster.load import ModelLoad
from ollama_distributed.models.names import name_key
from ollama_distributed.routing.blocks import NO_CHAIN, Chain, chain_of
from ollama_distributed.routing.caches import Caches, Trip
from ollama_distributed.routing.directory import Directory
from ollama_distributed.routing.ejections import Ejections
from ollama_distributed.routing.plan import (
    LOAD_S,
    NO_LABELS,
    NO_PROMPT,
    Dice,
    Load,
    Plan,
    Prompt,
    Standing,
    plan,
)
from ollama_distributed.routing.ports import ClusterView, Local, Shelf
from ollama_distributed.routing.rosters import MOST_HOLDERS

Wanted = Callable[[InferenceRequest | EmbedRequest | RerankRequest], Mapping[str, str]]
"""Labels that a node must have to answer a request."""
STALE_S = 15.0
"""A load report that is older says nothing: an unchanged load is said every 5 s."""


def no_labels(request: InferenceRequest | EmbedRequest | RerankRequest) -> Mapping[str, str]:  # noqa: ARG001  # a `Wanted`
    """Any node may answer."""
    return NO_LABELS


class Routed(msgspec.Struct, frozen=True, gc=False):
    """A choice, and what it was made of."""

    plan: Plan
    chain: Chain
    prompt: Prompt
    trip: Trip


class Known(NamedTuple):
    """Holders of a request's model, and what is known of them and of its prompt."""

    holders: tuple[Standing, ...]
    loads: Mapping[NodeId, Load]
    chain: Chain
    prompt: Prompt


class Chooser:
    """`missed`: hears of each request for a model that is not on this node's disk."""

    def __init__(
        self,
        local: Local,
        shelf: Shelf,
        view: ClusterView,
        dice: Dice,
        ejections: Ejections,
        missed: Callable[[], None],
        policy: Policy,
        wanted: Wanted,
    ) -> None:
        self.policy: Policy = policy
        self.wanted = wanted
        self.directory = Directory(view, dice)
        self.caches = Caches()
        self.salt = dice(2**64)
        """Of the keys of prompts: they mean nothing to anybody else."""
        self._local = local
        self._shelf = shelf
        self._view = view
        self._dice = dice
        self._ejections = ejections
        self._missed = missed
        self._turn = 0
        """Choices made so far."""

    def choose(self, request: InferenceRequest, *, look: bool = False) -> Routed:
        """Where it goes. `look`: it is not sent anywhere."""
        key, wanted = name_key(request.model), self.wanted(request)
        holders = self.holders(request.model, wanted)
        if self._alone(holders) and not wanted:
            return Routed(Plan(order=(self._view.me,)), NO_CHAIN, NO_PROMPT, Trip(self.caches, key))
        holders, loads, chain, prompt = self.known(request, holders)
        made = self._planned(key, holders, loads, prompt, wanted, look=look)
        return Routed(made, chain, prompt, Trip(self.caches, key, chain, prompt.cached, made.reason))

    def known(self, request: InferenceRequest, holders: tuple[Standing, ...]) -> Known:
        """What `plan.py` goes by, for these holders of the request's model."""
        model, key = request.model, name_key(request.model)
        if len(holders) < 2 or self.policy != "prefix" or request.load_only:
            return Known(holders, self.loads(key, holders), NO_CHAIN, NO_PROMPT)
        chain = chain_of(request, key, self.directory.digest(model), self.salt)
        prompt = self.caches.prompt(key, chain)
        if unseen := prompt.cached.keys() - {one.node for one in holders}:
            # A model with very many holders: those that know the prompt in place of some that were drawn,
            # who go on if the others are crowded.
            more = self.directory.named(model, unseen)
            holders = (*holders[: max(MOST_HOLDERS - len(more), MOST_HOLDERS // 2)], *more)
        index = self.caches.index(key)
        losses = index.losses
        loads = self.loads(key, holders)
        if index.losses != losses:  # one was loaded anew: it holds nothing of the prompt
            prompt = self.caches.prompt(key, chain)
        return Known(holders, loads, chain, prompt)

    def _alone(self, holders: Sequence[Standing]) -> bool:
        return len(holders) == 1 and holders[0].node == self._view.me

    def _planned(
        self,
        key: str,
        holders: tuple[Standing, ...],
        loads: Mapping[NodeId, Load],
        prompt: Prompt,
        wanted: Mapping[str, str],
        *,
        look: bool = False,
    ) -> Plan:
        me = self._view.me
        if not look and (not holders or holders[0].node != me):
            self._missed()
        if not holders:
            return Plan()
        if wanted and holders[0].node == me:
            labels = self.directory.labels(me)
            holders = (msgspec.structs.replace(holders[0], labels=labels), *holders[1:])
        self._turn += 1
        return plan(
            self._ejections.judged(holders, key),
            me,
            loads,
            self._dice,
            prompt=prompt,
            policy=self.policy,
            turn=self._turn,
            wanted=wanted,
        )

    def plan(self, model: str, wanted: Mapping[str, str] = NO_LABELS) -> Plan:
        """Which nodes would be asked now, and why not the others. `wanted`: labels that they need."""
        key, holders = name_key(model), self.holders(model, wanted)
        if self._alone(holders) and not wanted:
            return Plan(order=(self._view.me,))
        return self._planned(key, holders, self.loads(key, holders), NO_PROMPT, wanted)

    def holders(self, model: str, wanted: Mapping[str, str] = NO_LABELS) -> tuple[Standing, ...]:
        """This node first, if it is one: not with a version that another one has superseded. `wanted`:
        labels; of very many holders some that have them."""
        others, me = self.directory.others(model, wanted), self._view.me
        here = self._shelf.version(model)
        if not here or self.directory.superseded(model, here):
            return others
        draining = bool(others) and self.directory.draining(me)
        status: NodeStatus = "draining" if draining else "online"
        load_s = others[0].load_s if others else LOAD_S
        return (Standing(node=me, status=status, load_s=load_s), *others)

    def loads(self, key: str, holders: Sequence[Standing]) -> dict[NodeId, Load]:
        """What the holders have to do for this model: the others as they said lately, and from now
        on they are listened to; what this gateway sent them meanwhile counts."""
        me, index, loads = self._view.me, self.caches.index(key), {}
        self._view.interest([holder.node for holder in holders if holder.node != me])
        for holder in holders:
            node = holder.node
            sent = self.caches.sent(node, key)
            life: object = None
            if node == me:
                one = self._local.work(key)
                life = None if one is None else one.life
            else:
                report = self._view.report(node)
                if report is None or (report.age_s or 0.0) > STALE_S:
                    continue
                one = _of(report.models, key)
                life = None if one is None else (report.boot, one.life)
            index.live(node, life)
            if one is None:  # what was sent there waits until it is loaded
                loads[node] = Load(queued=sent) if sent else _NOT_LOADED
            else:
                loads[node] = _load(one, 0 if node == me else sent)
        return loads

    def allowed(self, request: InferenceRequest, standing: Standing) -> bool:
        """Whether the request may be known to the node at all."""
        wanted = self.wanted(request)
        return not wanted or wanted.items() <= self.directory.labels(standing.node).items()


_NOT_LOADED = Load()


def _of(models: Sequence[ModelLoad], key: str) -> ModelLoad | None:
    for one in models:
        if one.name == key:
            return one
    return None


def _load(one: ModelLoad, sent: int) -> Load:
    """`sent`: requests of this gateway that are there, whether the report knows of them or not."""
    busy, queued = one.busy, one.queued
    if sent > busy + queued:
        busy = min(sent, one.slots)
        queued = sent - busy
    return Load(
        slots=one.slots, busy=busy, queued=queued, loaded=True, read_tokens_per_s=one.read_tokens_per_s
    )
