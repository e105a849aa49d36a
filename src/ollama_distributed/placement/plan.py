"""Decides which node holds and runs which model: keep what may stay, fill what is short, move.

Pure: the same sites, wishes and earlier decisions give the same plan on every node, in whatever
order they came. A `Planner` keeps what it worked out, so that after one event it looks at what
the event touched and not at the whole cluster; its plan is always that of a new planner with the
same inputs. What was decided before (`put_standing`) stays while it can: a plan moves little, and
planning its own outcome again moves nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import msgspec

from ollama_distributed.base.ids import NodeId
from ollama_distributed.placement.board import MANY, Board
from ollama_distributed.placement.facts import Replica, Rules, Site, Wish
from ollama_distributed.placement.filling import Filling
from ollama_distributed.placement.keeping import Offer, Want, keep, offers, taken_of
from ollama_distributed.placement.moving import Gap, begin, gap, lacking
from ollama_distributed.placement.outcome import Because, Plan, Refusal
from ollama_distributed.placement.refusing import NO_SOURCE, obstacle, refusal
from ollama_distributed.state.maps import SortedMap

_SOURCES = ("here", "wavering", "leaving")


def plan(
    sites: Iterable[Site],
    wishes: Iterable[Wish],
    standing: Mapping[NodeId, Mapping[str, Replica]] | None = None,
    rules: Rules | None = None,
) -> Plan:
    """The whole plan at once. `standing`: what was decided before, by node and model."""
    planner = Planner(rules or Rules())
    for wish in wishes:
        planner.put_wish(wish)
    for site in sites:
        planner.put_site(site)
    for node, replicas in (standing or {}).items():
        planner.put_standing(node, replicas)
    return planner.plan()


class Planner:
    """Takes events one by one; `plan` says what follows from all of them."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.sites: dict[NodeId, Site] = {}
        self.wants: dict[str, Want] = {}
        self.offered: dict[str, dict[NodeId, Offer]] = {}
        """What nodes have to do with each model."""
        self.board = Board(rules)
        self._standing: dict[NodeId, Mapping[str, Replica]] = {}
        self._wanted_blobs: dict[str, set[str]] = {}
        """Models by blob."""
        self._pinned: dict[NodeId, set[str]] = {}
        self._labels: Counter[str] = Counter()
        """How many models ask for each label."""
        self._holders: dict[str, set[NodeId]] = {}
        """Live nodes by blob."""
        self._at: dict[NodeId, dict[str, Offer]] = {}
        """`offered`, by node."""
        self._fetching = 0
        self._used: dict[NodeId, tuple[int, int, int]] = {}
        """GPU and main memory that models have now, those that are being loaded among them, and how
        many they are."""
        self._adopted: SortedMap[str, tuple[Replica, ...]] = SortedMap()
        """`_standing`, by model."""
        self._kept: dict[str, dict[NodeId, Replica]] = {}
        self._short: set[str] = set()
        self._settled: set[str] = set()
        """Models that are as they are to be; their replicas are `_kept`."""
        self._assigned: SortedMap[str, tuple[Replica, ...]] = SortedMap()
        self._gaps: dict[str, Gap] = {}
        self._new_sites: set[NodeId] = set()
        """They are or have something else."""
        self._same_sites: set[NodeId] = set()
        """They are as they were, but something else may be wanted of them."""
        self._restood: set[NodeId] = set()
        """Something else was decided for them."""
        self._new_models: set[str] = set()

    # ── events ──────────────────────────────────────────────────────────────────────

    def put_site(self, site: Site) -> None:
        """A node is new, or is or has something else now."""
        old = self.sites.get(site.node)
        if old == site:
            return
        self._hold(site.node, old, site)
        self._fetching += _coming(site) - (_coming(old) if old else 0)
        self.sites[site.node] = site
        self._new_sites.add(site.node)

    def drop_site(self, node: NodeId) -> None:
        """A node is no longer of the cluster."""
        old = self.sites.pop(node, None)
        if old is not None:
            self._hold(old.node, old, None)
            self._fetching -= _coming(old)
            self._new_sites.add(node)

    def put_wish(self, wish: Wish) -> None:
        old = self.wants.get(wish.model)
        if old is not None and old.wish == wish:
            return
        if old is not None and _same_for_nodes(old.wish, wish):
            want = self.wants[wish.model] = Want(wish)
            if bool(old.wish.warm) != bool(wish.warm):
                self._same_sites.update(want.pins & self.sites.keys())
            self._new_models.add(wish.model)
            return
        self.drop_wish(wish.model)
        want = self.wants[wish.model] = Want(wish)
        for digest in want.digests:
            self._wanted_blobs.setdefault(digest, set()).add(wish.model)
        for node in want.pins:
            self._pinned.setdefault(node, set()).add(wish.model)
        self._labels.update(wish.labels.keys())
        self._touch(want)
        self._new_models.add(wish.model)

    def drop_wish(self, model: str) -> None:
        """Nobody cares any more where it is."""
        want = self.wants.pop(model, None)
        if want is None:
            return
        for node in self._kept.pop(model, {}):
            self.board.put(want.wish, node, None)
        for digest in want.digests:
            self._wanted_blobs[digest].discard(model)
        for node in want.pins:
            self._pinned[node].discard(model)
        self._labels.subtract(want.wish.labels.keys())
        self._labels += Counter()  # drops those that nobody asks for
        self._touch(want)
        self._new_models.add(model)

    def put_standing(self, node: NodeId, replicas: Mapping[str, Replica]) -> None:
        """What was decided for a node before, by model."""
        before = self._standing.get(node, {})
        for model in before.keys() | replicas.keys():
            placed = {one.node: one for one in self._adopted.get(model, ())}
            placed.pop(node, None)
            if model in replicas:
                placed[node] = replicas[model]
            self._adopted = self._adopted.with_(model, tuple(placed[key] for key in sorted(placed)))
        self._stand(node, dict(replicas))

    def _stand(self, node: NodeId, replicas: Mapping[str, Replica]) -> None:
        if replicas != self._standing.get(node, {}):
            self._standing[node] = replicas
            self._restood.add(node)

    def adopt(self, decided: Plan) -> None:
        """What a plan decided stands from now on, and nothing else."""
        for node, standing in self.standing_after(decided).items():
            self._stand(node, standing)
        self._adopted = decided.assignments

    def standing(self, node: NodeId) -> Mapping[str, Replica]:
        """What stands of what was decided for a node."""
        return self._standing.get(node, {})

    def standing_after(self, decided: Plan) -> dict[NodeId, dict[str, Replica]]:
        """What stands once a plan is adopted, of the nodes for which that is anything else."""
        by_node: dict[NodeId, dict[str, Replica]] = {}
        for model in decided.assignments.differences(self._adopted):
            before = {replica.node: replica for replica in self._adopted.get(model, ())}
            after = {replica.node: replica for replica in decided.assignments.get(model, ())}
            for node in before.keys() | after.keys():
                if before.get(node) != after.get(node):
                    changed = by_node.setdefault(node, dict(self.standing(node)))
                    changed.pop(model, None)
                    if node in after:
                        changed[model] = after[node]
        return by_node

    # ── the plan ────────────────────────────────────────────────────────────────────

    def plan(self) -> Plan:
        """Where everything belongs, and what to do next."""
        if self.board.shelves.labels != self._labels.keys():
            self.board.relabel(self._labels)
        touched = self._new_models
        for node in self._new_sites | self._same_sites | self._restood:
            touched |= self._look_at(node)
        for looked_at in (self._new_sites, self._same_sites, self._restood):
            looked_at.clear()
        self._new_models = set()
        for model in touched:
            self._keep(model)
        refusals = self._fill(touched)
        moves, waiting = begin(
            self._gaps.values(),
            self.rules,
            self.sites,
            self._free_now,
            lambda digest: sorted(self._holders.get(digest, ())),
            self._fetching,
        )
        refusals = (*refusals, *self._stranded({refused.model for refused in refusals}))
        return Plan(assignments=self._assigned, moves=moves, waiting=waiting, refusals=refusals)

    def explain(self, model: str) -> list[Because]:
        """Of every node why the latest plan chose it for this model, or did not. Sorted by node."""
        want = self.wants[model]
        chosen = {replica.node: replica for replica in self._assigned.get(model, ())}
        return [
            Because(node, node in chosen, obstacle(want, self.board.spots[node], chosen.get(node)))
            for node in sorted(self.sites)
        ]

    def gap(self, model: str) -> Gap | None:
        """What separates a model from where the latest plan wants it; None: nothing."""
        return self._gaps.get(model)

    def _look_at(self, node: NodeId) -> set[str]:
        """What a node offers by now; the models for which anything about it may be another."""
        site = self.sites.get(node)
        before = self._at.pop(node, {})
        if site is None:
            for model in before:
                del self.offered[model][node]
                self._kept.get(model, {}).pop(node, None)
            self._used.pop(node, None)
            if node in self.board.spots:
                self.board.drop_site(node)
            return set(before)
        standing = self._standing.get(node, {})
        names = self._concerned(site, standing)
        changed = node in self._new_sites
        if changed:
            self.board.put_site(site, taken_of(site, self.wants, self._wanted_blobs))
        elif node in self._same_sites:
            self.board.put_taken(node, taken_of(site, self.wants, self._wanted_blobs))
        spot = self.board.spots[node]
        wants = [self.wants[name] for name in names]
        after = offers(site, spot.domain, wants, standing, self.rules, spot.taken)
        other = set()
        for model in before.keys() - after.keys():
            del self.offered[model][node]
            other.add(model)
        for model, offer in after.items():
            if offer != before.get(model):
                self.offered.setdefault(model, {})[node] = offer
                other.add(model)
        self._at[node] = after
        if changed or site.loading or node in self._same_sites:
            self._used[node] = self._in_use(site, standing)
        return names.union(before) if changed else other

    def _concerned(self, site: Site, standing: Mapping[str, Replica]) -> set[str]:
        """Models that have anything to do with a node."""
        there = (*standing, *site.loaded, *site.loading, *site.named)
        names = {model for model in there if model in self.wants}
        names.update(self._pinned.get(site.node, ()))
        for digest in (*site.blobs, *site.arriving):
            names.update(self._wanted_blobs.get(digest, ()))
        return names

    def _in_use(self, site: Site, standing: Mapping[str, Replica]) -> tuple[int, int, int]:
        gpu = sum(loaded.memory_bytes for loaded in site.loaded.values() if loaded.device == "gpu")
        memory = sum(loaded.memory_bytes for loaded in site.loaded.values() if loaded.device == "cpu")
        for model in site.loading:
            if model in self.wants and model not in site.loaded:
                device = standing[model].device if model in standing else "cpu"
                more = self.wants[model].wish.need.of(device)
                gpu, memory = gpu + more[0], memory + more[1]
        return gpu, memory, len(site.loading | site.loaded.keys())

    def _keep(self, model: str) -> None:
        """Decide anew what of a model may stay."""
        want = self.wants.get(model)
        before = self._kept.get(model, {})
        if want is None:
            self._short.discard(model)
            self._settled.discard(model)
            return
        kept = keep(want, self.offered.get(model, {}))
        after = self._kept[model] = kept.replicas
        if before != after:
            for node in before.keys() | after.keys():
                if before.get(node) != after.get(node):
                    self.board.put(want.wish, node, after.get(node))
        (self._short.discard if kept.enough else self._short.add)(model)
        (self._settled.add if kept.settled else self._settled.discard)(model)

    def _fill(self, touched: set[str]) -> tuple[Refusal, ...]:
        """Find room for what is short, and note what each model needs to get there."""
        refusals: list[Refusal] = []
        self.board.try_out()
        short = sorted((self.wants[model].order, model) for model in self._short)
        for _, model in short:
            want = self.wants[model]
            filling = Filling(want, self._kept[model], self.offered.get(model, {}), self.board)
            has_source = all(self._holders.get(digest) for digest in want.digests)
            filling.run(has_source=has_source)
            self._assign(model, filling.replicas)
            refused = refusal(want, filling, self.board, has_source=has_source)
            if refused is not None:
                refusals.append(refused)
        self.board.undo()
        for model in touched - self._short:
            self._assign(model, self._kept.get(model, {}) if model in self.wants else {})
        return tuple(refusals)

    def _stranded(self, refused: set[str]) -> Iterator[Refusal]:
        """Models that have their places, but that nobody can bring there."""
        for model in sorted(self._gaps.keys() - refused):
            one = self._gaps[model]
            if all(self._holders.get(digest) for digest in one.want.digests):
                continue
            nodes = [
                node
                for node in one.fetches
                if any(not self._holders.get(blob.digest) for blob in lacking(one, self.sites[node]))
            ]
            if nodes:
                yield Refusal(model=model, copies=len(nodes), reasons=(NO_SOURCE,))

    def _assign(self, model: str, replicas: Mapping[NodeId, Replica]) -> None:
        placed = tuple(replicas[node] for node in sorted(replicas))
        if not placed:
            self._assigned = self._assigned.without(model)
        elif placed != self._assigned.get(model):
            self._assigned = self._assigned.with_(model, placed)
        want = None if model in self._settled else self.wants.get(model)
        found = gap(want, replicas, self.offered.get(model, {}), self.sites) if want else None
        if found:
            self._gaps[model] = found
        else:
            self._gaps.pop(model, None)

    def _free_now(self, node: NodeId) -> tuple[int, int, int]:
        site, used = self.sites[node], self._used[node]
        seats = site.seats - used[2] if site.seats else MANY
        return site.gpu_bytes - used[0], site.memory_bytes - used[1], seats

    # ── indexes ─────────────────────────────────────────────────────────────────────

    def _hold(self, node: NodeId, old: Site | None, new: Site | None) -> None:
        before = old.blobs if old is not None and old.presence in _SOURCES else frozenset()
        after = new.blobs if new is not None and new.presence in _SOURCES else frozenset()
        for digest in before - after:
            self._holders[digest].discard(node)
        for digest in after - before:
            self._holders.setdefault(digest, set()).add(node)

    def _touch(self, want: Want) -> None:
        """Look again at every node that this model concerns."""
        model = want.wish.model
        self._same_sites.update(self.offered.get(model, ()))
        self._same_sites.update(want.pins & self.sites.keys())
        for node, site in self.sites.items():
            if (
                not want.digests.isdisjoint(site.blobs)
                or not want.digests.isdisjoint(site.arriving)
                or model in site.loaded
                or model in site.loading
                or model in site.named
            ):
                self._same_sites.add(node)
        self._same_sites.update(node for node, standing in self._standing.items() if model in standing)


def _coming(site: Site) -> int:
    """Blobs on their way to it; to a node that is not there nothing comes."""
    return len(site.arriving) if site.presence in _SOURCES else 0


def _same_for_nodes(old: Wish, new: Wish) -> bool:
    """Whether no node has anything else to do with it, but for those that it is pinned to."""
    return (
        msgspec.structs.replace(new, copies=old.copies, warm=old.warm, keep=old.keep, display=old.display)
        == old
    )
