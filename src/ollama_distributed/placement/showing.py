"""Places of models as people see them: what is wanted, what is there, what comes next, why not.

Pure. Plans as the leader does, on this node's view of the cluster; how many replicas demand
asks for is what the leader decided last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.placement import Doing, PlaceRow, PlacesAnswer
from ollama_distributed.cluster.load import Load
from ollama_distributed.placement.demand import Demand, wanted
from ollama_distributed.placement.facts import Replica, Rules
from ollama_distributed.placement.moving import may_go
from ollama_distributed.placement.outcome import Plan
from ollama_distributed.placement.plan import Planner
from ollama_distributed.placement.seen import content, files, placed_of, presence_of, site_of, wish_of
from ollama_distributed.placement.wishes import Around, Policy, around, desired_of
from ollama_distributed.state.cluster import ClusterState, NodeState
from ollama_distributed.state.records import Desired, HeldModel

MOST_OTHERS = 16
"""Nodes that have nothing to do with a model, and why: there may be thousands."""


class View(msgspec.Struct, frozen=True):
    """The cluster as one plan has it."""

    state: ClusterState
    around: Around
    planner: Planner
    plan: Plan


def look(state: ClusterState, policy: Policy, rules: Rules, now: float) -> View:
    """`now`: seconds since the Unix epoch. Of 10,000 nodes this takes seconds."""
    planner = planner_of(state, policy, rules, now)
    return View(state, around(state, policy), planner, planner.plan())


def planner_of(
    state: ClusterState, policy: Policy, rules: Rules, now: float, loads: Mapping[NodeId, Load] | None = None
) -> Planner:
    """As the leader's, as far as this node knows. `loads`: for nodes that have not said yet what
    they have for models; without it they get nothing, as at the leader."""
    planner, what = Planner(rules), around(state, policy)
    warm: dict[str, int] = {}
    for node in state.nodes.values():
        placed = node.placed if loads is None else placed_of(node, loads.get(node.id))
        if placed is not None:
            planner.put_site(site_of(node, placed, presence_of(node, now, policy.grace_s)))
        models = node.assigned.models if node.assigned is not None else ()
        planner.put_standing(node.id, {one.model: Replica(node.id, one.warm, one.device) for one in models})
        for one in models:
            warm[one.model] = warm.get(one.model, 0) + one.warm
    for model in {*state.models, *state.desired}:
        desired = desired_of(state, model, what)
        held = content(state, desired) if desired is not None else None
        if desired is not None and held is not None:
            counts = _counts(desired, warm.get(model, 0), policy, what)
            planner.put_wish(wish_of(desired, held, counts, policy.loading))
    return planner


def _counts(desired: Desired, warm: int, policy: Policy, what: Around) -> tuple[int, int]:
    least, loaded = wanted(desired, Demand(), keep_alive_s=policy.keep_alive_s, nodes=what.takers)
    if not desired.preload:
        loaded = warm if desired.max is None else min(warm, desired.max)
    if desired.replicas is not None:
        loaded = min(loaded, desired.replicas)
    return max(least, loaded), loaded


# ── one model ───────────────────────────────────────────────────────────────────────


def places(view: View, model: str, *, rows: bool = True) -> PlacesAnswer:
    state = view.state
    desired = desired_of(state, model, view.around)
    held = content(state, desired) if desired is not None else None
    current = held or state.current(model)
    want = view.planner.wants.get(model)
    shown = _rows(view, model, current)
    return PlacesAnswer(
        model=display(state, model),
        wanted=desired is not None,
        by_default=desired is not None and model not in state.desired,
        replicas=desired.replicas if desired else None,
        min=(desired.min or 0) if desired else 1,
        max=desired.max if desired else None,
        labels=desired.labels if desired else {},
        pins=tuple(names(state, desired.pins)) if desired else (),
        preload=desired.preload if desired else False,
        keep_alive_s=desired.keep_alive_s if desired else None,
        keep=desired.keep if desired else True,
        priority=desired.priority if desired else 0,
        nodes=tuple(sorted(names(state, state.models.get(model, ())))),
        copies=want.wish.copies if want else 0,
        loaded=want.wish.warm if want else 0,
        have=sum(row.has and state.nodes[NodeId(row.node)].alive for row in shown),
        running=sum(row.loaded for row in shown),
        settled=not any(row.doing for row in shown),
        missing=_missing(view, model),
        rows=tuple(_named(view, model, shown)) if rows else (),
    )


def _missing(view: View, model: str) -> tuple[str, ...]:
    return next((one.reasons for one in view.plan.refusals if one.model == model), ())


def _rows(view: View, model: str, current: HeldModel | None) -> list[PlaceRow]:
    """Of nodes that have to do with it."""
    state, found = view.state, []
    chosen = {replica.node: replica for replica in view.plan.assignments.get(model, ())}
    coming = _coming(view.planner, model)
    holders: Mapping[NodeId, HeldModel] = state.models.get(model, {})
    digest = current.digest if current is not None else ""
    for node in state.nodes.values():
        known = node.placed
        own = holders[node.id].digest if node.id in holders else ""
        loaded = known is not None and node.alive and any(one.model == model for one in known.loaded)
        doing = _doing(node, model, digest) or coming.get(node.id, "")
        failed = [one for one in known.failed if one.model == model] if known is not None else []
        replica = chosen.get(node.id)
        if replica is None and not (own or loaded or doing or failed):
            continue
        note = "; ".join(f"{one.kind} failed {_times(one.tries)}: {one.reason}" for one in failed)
        found.append(
            PlaceRow(
                node=node.id,
                name=node.name,
                copy=replica is not None,
                warm=replica is not None and replica.warm,
                has=bool(own) and own == digest,
                stale=bool(own) and own != digest,
                loaded=loaded,
                doing=doing,
                note=note,
            )
        )
    return found


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _doing(node: NodeState, model: str, digest: str) -> Doing:
    """As the node says, or as it was told."""
    if node.placed is not None:
        if files(model, digest) in node.placed.fetching:
            return "fetch"
        if model in node.placed.loading:
            return "load"
    tasks = node.assigned.tasks if node.assigned is not None else ()
    return next((task.kind for task in tasks if task.model == model), "")


def _coming(planner: Planner, model: str) -> Mapping[NodeId, Doing]:
    """What has to be done and has not begun."""
    gap = planner.gap(model)
    if gap is None:
        return {}
    moves: list[tuple[Doing, Sequence[NodeId]]] = [
        ("fetch", gap.fetches),
        ("load", [node for node, _ in gap.loads]),
        ("unload", [node for node in gap.unloads if may_go(gap, planner.sites[node])]),
        ("delete", [*gap.stale, *(() if gap.want.wish.keep else gap.deletes)]),
    ]
    return {node: doing for doing, nodes in moves for node in nodes}


def _named(view: View, model: str, rows: Iterable[PlaceRow]) -> list[PlaceRow]:
    """With why each node was chosen or not, and some nodes that were not; by name."""
    if model not in view.planner.wants:
        return sorted(rows, key=lambda row: (row.name, row.node))
    why = {one.node: one.reason for one in view.planner.explain(model)}
    found = [
        row if row.note else msgspec.structs.replace(row, note=why.get(NodeId(row.node), "")) for row in rows
    ]
    known = {row.node for row in found}
    others = [node for node in view.state.nodes.values() if node.id in why and node.id not in known]
    found += [
        PlaceRow(node=node.id, name=node.name, note=why[node.id])
        for node in sorted(others, key=lambda node: (node.name, node.id))[:MOST_OTHERS]
    ]
    return sorted(found, key=lambda row: (row.name, row.node))


def display(state: ClusterState, model: str) -> str:
    held = next(iter(state.models.get(model, {}).values()), None)
    return held.display if held is not None else model


def names(state: ClusterState, nodes: Iterable[NodeId]) -> list[str]:
    return [known.name if (known := state.nodes.get(node)) else node for node in nodes]
