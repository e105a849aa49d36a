"""The leader's part of placing models: follows the state, plans, and assigns.

Every server may run it; only the one that holds the fence writes, so a leader that was replaced
assigns nothing. What was assigned is in the state (`assign.<id>`): the next leader goes on from it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Protocol, assert_never

import anyio
import msgspec
import structlog

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import Conflict, DeadlineExceeded
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.loops import keep_going
from ollama_distributed.cluster.mirror import Mirror
from ollama_distributed.cluster.ports import Fence, Write
from ollama_distributed.cluster.tasks import end
from ollama_distributed.placement.demand import wanted
from ollama_distributed.placement.facts import Replica, Rules
from ollama_distributed.placement.gauge import Gauge
from ollama_distributed.placement.outcome import Delete, Fetch, Load, Move, Plan, Unload
from ollama_distributed.placement.plan import Planner
from ollama_distributed.placement.ports import Reports
from ollama_distributed.placement.seen import content, digest_of, presence_of, site_of, wish_of
from ollama_distributed.placement.wishes import Around, Policy, around, desired_of
from ollama_distributed.state import keys
from ollama_distributed.state.cluster import ClusterState, NodeState
from ollama_distributed.state.codec import encode
from ollama_distributed.state.records import Assigned, AssignedModel, Desired, HeldModel, Task

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

ASSIGNED = "placement.assigned"
REFUSED = "placement.refused"
FENCED = "placement.fenced"

TICK_S = 1.0
"""Grace runs out, and demand changes, without any record that says so."""
SETTLE_S = 0.2
"""Changes that come together are planned together."""
MAX_WRITES = 100
"""In a batch; the next follows at once."""
REACH_S = 2.0

Offload = Callable[[Callable[[], Plan]], Awaitable[Plan]]
"""Runs a plan where it holds nobody up: a first one of 10,000 nodes takes seconds."""


class Leading(Protocol):
    """`cluster.consensus.ConsensusEngine`."""

    def fence(self) -> Fence | None: ...

    async def write(self, writes: Sequence[Write]) -> tuple[int, ...]: ...


async def at_once(plan: Callable[[], Plan]) -> Plan:
    return plan()


class _Term:
    """One time of leading; nothing of it outlives it."""

    def __init__(self, fence: Fence, rules: Rules, gauge: Gauge) -> None:
        self.fence = fence
        self.planner = Planner(rules)
        self.gauge = gauge
        self.seen = ClusterState()
        self.around = Around(policy=Policy())
        self.wanted: dict[str, tuple[Desired, HeldModel]] = {}
        """What is wanted of each model, and what it is, without an eye to demand."""
        self.busy: set[NodeId] = set()
        """Nodes whose record has tasks."""
        self.refused: frozenset[str] = frozenset()


class PlacementService:
    """An async context manager; inside, it plans whenever this node leads."""

    def __init__(
        self,
        consensus: Leading,
        mirror: Mirror,
        *,
        clock: Clock,
        chance: random.Random,
        policy: Callable[[], Policy],
        reports: Reports,
        rules: Rules | None = None,
        offload: Offload = at_once,
    ) -> None:
        self._consensus = consensus
        self._mirror = mirror
        self._clock = clock
        self._chance = chance
        self._policy = policy
        self._reports = reports
        self._rules = rules or Rules()
        self._offload = offload
        self._term: _Term | None = None
        self._news = anyio.Event()
        self._loop: asyncio.Task[None] | None = None
        self.plan: Plan | None = None
        """The latest of this time of leading; None: this node does not lead."""

    async def __aenter__(self) -> PlacementService:
        self._forget = self._mirror.on_change(self._changed)
        work = keep_going("placement", self._step, self._chance)
        self._loop = asyncio.create_task(work, name="placement")
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._forget()
        assert self._loop is not None
        await end([self._loop])

    def _changed(self, before: ClusterState, after: ClusterState) -> None:
        if (
            before.nodes is not after.nodes
            or before.desired is not after.desired
            or before.models is not after.models
        ):
            self._news.set()

    async def _step(self) -> None:
        with anyio.move_on_after(TICK_S):
            await self._news.wait()
            await anyio.sleep(SETTLE_S)
        self._news = anyio.Event()
        fence = self._consensus.fence()
        if fence is None or not self._mirror.ready:
            self._term = self.plan = None
            return
        if self._term is None or self._term.fence != fence:
            # What leaders before this one assigned must be in what is planned on.
            await self._mirror.reach(fence.revision)
            self._term = _Term(fence, self._rules, Gauge(self._reports, self._clock))
        term = self._term
        try:
            await self._lead(term)
        except (Conflict, DeadlineExceeded) as exc:
            # Replaced, or in doubt about what stands: begin again from the state.
            log.info(FENCED, error=exc.message)
            self._term = None

    async def _lead(self, term: _Term) -> None:
        state = self._mirror.state
        now, policy = self._clock.time(), self._policy()
        changed = state.nodes.differences(term.seen.nodes)
        for node in changed:
            self._take_node(term, node, state.nodes.get(node), now, policy.grace_s)
        # Only for these does time alone change anything: grace runs out.
        away = [site.node for site in term.planner.sites.values() if site.presence == "away"]
        for node in away:
            self._take_node(term, node, state.nodes.get(node), now, policy.grace_s)
        term.gauge.look()
        self._take_wishes(term, state, policy, changed)
        term.seen = state
        plan = await self._offload(term.planner.plan)
        self._report(term, plan)
        await self._assign(term, plan, state)
        self.plan = plan

    # ── what the state says ─────────────────────────────────────────────────────────

    def _take_node(
        self, term: _Term, node: NodeId, known: NodeState | None, now: float, grace_s: float
    ) -> None:
        """A node that says nothing of itself for placing gets nothing."""
        if known is not None and known.placed is not None:
            here = presence_of(known, now, grace_s)
            term.planner.put_site(site_of(known, known.placed, here))
            term.gauge.put(node, [one.model for one in known.placed.loaded] if known.alive else ())
        else:
            term.planner.drop_site(node)
            term.gauge.put(node, ())
        assigned = known.assigned if known is not None else None
        models = assigned.models if assigned is not None else ()
        standing = {one.model: Replica(node, one.warm, one.device) for one in models}
        term.planner.put_standing(node, standing)
        if assigned is not None and assigned.tasks:
            term.busy.add(node)
        else:
            term.busy.discard(node)

    def _take_wishes(self, term: _Term, state: ClusterState, policy: Policy, nodes: Iterable[NodeId]) -> None:
        """Of models about which anything may be another: `nodes` are."""
        what = around(state, policy) if state.nodes is not term.seen.nodes else term.around
        what = msgspec.structs.replace(what, policy=policy)
        if what != term.around:
            models = {*state.models, *state.desired, *term.planner.wants}
        else:
            models = {
                *state.models.differences(term.seen.models),
                *state.desired.differences(term.seen.desired),
            }
            for node in nodes:  # the version that counts is one that a living node has
                models.update(_shaken(term.seen.nodes.get(node), state.nodes.get(node)))
        term.around = what
        for model in models:
            desired = desired_of(state, model, what)
            held = content(state, desired) if desired is not None else None
            if desired is not None and held is not None:
                term.wanted[model] = desired, held
            else:
                term.wanted.pop(model, None)
                term.planner.drop_wish(model)
        busy = {
            *term.gauge.models(),
            *(want.wish.model for want in term.planner.wants.values() if want.wish.warm),
        }
        for model in models | busy:
            if model in term.wanted:
                desired, held = term.wanted[model]
                counts = wanted(
                    desired, term.gauge.demand(model), keep_alive_s=policy.keep_alive_s, nodes=what.takers
                )
                term.planner.put_wish(wish_of(desired, held, counts, policy.loading))

    # ── what the plan says ──────────────────────────────────────────────────────────

    async def _assign(self, term: _Term, plan: Plan, state: ClusterState) -> None:
        """Write the records that differ, and plan no further before they are seen."""
        tasks: dict[NodeId, list[Task]] = {}
        for move in plan.moves:
            tasks.setdefault(move.node, []).append(_task(move))
        after = term.planner.standing_after(plan)
        records = [
            record
            for node in sorted(after.keys() | tasks.keys() | term.busy)
            if node in state.nodes
            and (
                record := _record(
                    state, node, after.get(node, term.planner.standing(node)), tasks.get(node, ())
                )
            )
        ]
        revision = 0
        for start in range(0, len(records), MAX_WRITES):
            some = records[start : start + MAX_WRITES]
            writes = [
                Write(key := keys.assigned(one.node), encode(one), state.revision_of(key)) for one in some
            ]
            revision = (await self._consensus.write(writes))[-1]
            for one in some:
                log.info(ASSIGNED, node=one.node, models=len(one.models), tasks=len(one.tasks))
        if records:
            with anyio.move_on_after(REACH_S) as waited:
                await self._mirror.reach(revision)
            if waited.cancelled_caught:
                self._term = None  # nothing may be planned on what is older than what was decided

    def _report(self, term: _Term, plan: Plan) -> None:
        for refusal in plan.refusals:
            if refusal.model in term.seen.desired and refusal.model not in term.refused:
                log.warning(
                    REFUSED,
                    model=refusal.model,
                    copies=refusal.copies,
                    loaded=refusal.warm,
                    reasons=refusal.reasons,
                )
        term.refused = frozenset(refusal.model for refusal in plan.refusals)


def _shaken(before: NodeState | None, after: NodeState | None) -> Iterable[str]:
    """Models of a node that died or came back."""
    if (before is not None and before.alive) == (after is not None and after.alive):
        return ()
    parts = [known.holdings.models for known in (before, after) if known is not None and known.holdings]
    return {held.name for part in parts for held in part}


def _record(
    state: ClusterState, node: NodeId, placed: Mapping[str, Replica], tasks: Sequence[Task]
) -> Assigned | None:
    """None: it stands so already. A new leader does not write what is the same but for its epoch."""
    models = tuple(
        AssignedModel(model=model, warm=placed[model].warm, device=placed[model].device)
        for model in sorted(placed)
    )
    old = state.nodes[node].assigned
    if (old.models, old.tasks) == (models, tuple(tasks)) if old is not None else not (models or tasks):
        return None
    epoch = state.term.epoch if state.term is not None else 0
    return Assigned(node=node, epoch=epoch, models=models, tasks=tuple(tasks))


def _task(move: Move) -> Task:
    match move:
        case Fetch():
            return Task(
                kind="fetch",
                model=move.model,
                digest=digest_of(move.digest),
                size_bytes=move.size_bytes,
                holders=move.holders,
                reason=move.reason,
            )
        case Load():
            return Task(kind="load", model=move.model, device=move.device, reason=move.reason)
        case Unload():
            return Task(kind="unload", model=move.model, reason=move.reason)
        case Delete():
            return Task(kind="delete", model=move.model, reason=move.reason)
        case _:
            assert_never(move)
