"""Answers what people ask of models' places: where one fits, where it is wanted, what if.

Reads come from this node's mirror and from load reports; orders go to the leader as changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import anyio

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import (
    Invalid,
    InvalidName,
    ModelNotFound,
    OllamaDistributedError,
    Unsupported,
)
from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.placement import (
    FitAnswer,
    FitRow,
    MovedRow,
    PlaceAsk,
    PlacementFigures,
    PlacesAnswer,
    RefusedRow,
    ReplicasAsk,
    WhatIfAnswer,
)
from ollama_distributed.cluster.load import Load
from ollama_distributed.models.names import ModelName, name_key
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.placement.facts import Rules
from ollama_distributed.placement.fit import Question, fit, what_if
from ollama_distributed.placement.ports import Outside
from ollama_distributed.placement.seen import (
    machine_of,
    presence_of,
)
from ollama_distributed.placement.showing import View, display, look, names, places, planner_of
from ollama_distributed.placement.wishes import Policy
from ollama_distributed.state.changes import Change
from ollama_distributed.state.cluster import ClusterState
from ollama_distributed.state.wanting import Pin, SetReplicas, Unpin, Unplace

LOOK_S = 0.02
LOOKS = 30
"""0.6 s for first load reports: a node that is asked answers within milliseconds, or is away."""
MOST_ASKED = 512
"""Nodes whose load is asked for at once; of the others the hardware alone is known."""
MAX_CONTEXT_TOKENS = 1 << 24
MAX_SLOTS = 1024


class Catalogue(Protocol):
    async def resolve(self, name: str) -> ModelSpec: ...


class Reports(Protocol):
    def interest(self, nodes: Iterable[NodeId]) -> None: ...

    def report(self, node: NodeId) -> Load | None: ...


class Proposing(Protocol):
    async def __call__(self, change: Change, *, actor: str) -> object: ...


class Desk:
    """Implements `gateway.placement_port.Places`."""

    def __init__(
        self,
        *,
        catalogue: Catalogue,
        state: Callable[[], ClusterState],
        reports: Reports,
        propose: Proposing,
        clock: Clock,
        policy: Callable[[], Policy],
        rules: Rules | None = None,
        outside: Outside | None = None,
        figures: Callable[[], PlacementFigures] = PlacementFigures,
    ) -> None:
        """`outside`: looks at models in their registries; `figures`: this node's numbers."""
        self._catalogue = catalogue
        self._state = state
        self._reports = reports
        self._propose = propose
        self._clock = clock
        self._policy = policy
        self._rules = rules or Rules()
        self._outside = outside
        self.figures = figures

    # ── fit ─────────────────────────────────────────────────────────────────────────

    async def fit(
        self, name: str, *, context_tokens: int | None, slots: int | None, look: bool = True
    ) -> FitAnswer:
        registry, count = "", 0
        try:
            spec = await self._catalogue.resolve(name)
        except ModelNotFound as missing:
            if self._outside is None or not look:
                raise
            spec, count = await self._looked(name, self._outside, missing)
            registry = ModelName.parse(spec.name).host
        if spec.remote is not None:
            raise Unsupported(f"{spec.display} is served by another engine, which has its own memory")
        if not spec.architecture.layers:
            raise Unsupported(
                f"the nodes that hold {spec.display} are too old to say what its memory follows from"
            )
        question = self._question(spec, context_tokens, slots)
        state = self._state()
        loads = await self._loads(state)
        now = self._clock.time()
        machines = [
            machine_of(node, loads.get(node.id), presence=presence_of(node, now), digest=spec.digest)
            for node in state.nodes.values()
        ]
        holds = {machine.node for machine in machines if machine.has_files}
        rows = tuple(
            FitRow(
                node=row.node,
                name=row.name,
                verdict=row.verdict,
                holds=row.node in holds,
                device=row.device,
                context_tokens=row.context_tokens,
                slots=row.slots,
                memory_bytes=row.memory_bytes,
                unload=tuple(display(state, model) for model in row.unload),
                tokens_per_s=row.tokens_per_s,
                speed_from=row.speed_from,
                fetch_bytes=row.fetch_bytes,
                reason=row.reason,
            )
            for row in fit(question, machines)
        )
        return FitAnswer(
            model=spec.display,
            size_bytes=spec.size_bytes,
            context_tokens=question.context_tokens,
            slots=question.slots,
            nodes=rows,
            registry=registry,
            bytes_read=count,
        )

    async def _looked(self, name: str, outside: Outside, missing: ModelNotFound) -> tuple[ModelSpec, int]:
        """
        Raises:
            OllamaDistributedError: it cannot be looked at where its name says; says that no node
                has it either.
        """
        try:
            return await outside.look(name)
        except InvalidName:
            raise missing from None
        except ModelNotFound as exc:
            host = ModelName.parse(name).host
            raise ModelNotFound(f"no node has model '{name}', and neither has {host}") from exc
        except OllamaDistributedError as exc:
            raise type(exc)(f"no node has model '{name}', and it cannot be looked at: {exc.message}") from exc

    def _question(self, spec: ModelSpec, context_tokens: int | None, slots: int | None) -> Question:
        loading = self._policy().loading
        context = loading.context_tokens if context_tokens is None else context_tokens
        count = loading.slots if slots is None else slots
        if not 1 <= context <= MAX_CONTEXT_TOKENS or not 1 <= count <= MAX_SLOTS:
            raise Invalid(f"context is 1 to {MAX_CONTEXT_TOKENS} tokens, slots are 1 to {MAX_SLOTS}")
        if trained := spec.architecture.context_tokens:
            context = min(context, trained)
        return Question(
            architecture=spec.architecture,
            weights_bytes=spec.size_bytes,
            size_bytes=spec.size_bytes,
            context_tokens=context,
            slots=count,
            kv_type=loading.kv_type,
            batch=loading.batch,
        )

    async def _loads(self, state: ClusterState) -> Mapping[NodeId, Load]:
        """Of the nodes that live and tell soon."""
        asked = [node.id for node in state.nodes.values() if node.alive][:MOST_ASKED]
        self._reports.interest(asked)
        for _ in range(LOOKS):
            if all(self._reports.report(node) is not None for node in asked):
                break
            await anyio.sleep(LOOK_S)
        return {node: load for node in asked if (load := self._reports.report(node)) is not None}

    # ── orders ──────────────────────────────────────────────────────────────────────

    async def places(self, name: str) -> PlacesAnswer:
        model = self._model(name)
        return places(await self._look(), model)

    async def all_places(self) -> Sequence[PlacesAnswer]:
        """Of every model, by name, without rows."""
        view = await self._look()
        known = sorted({*view.state.models, *view.state.desired})
        return await anyio.to_thread.run_sync(lambda: [places(view, model, rows=False) for model in known])

    async def _look(self) -> View:
        state, policy, now = self._state(), self._policy(), self._clock.time()
        return await anyio.to_thread.run_sync(look, state, policy, self._rules, now)

    async def replicas(self, name: str, ask: ReplicasAsk, *, actor: str) -> PlacesAnswer:
        change = SetReplicas(model=self._model(name), replicas=ask.replicas, min=ask.min, max=ask.max)
        return await self._order(name, change, actor)

    async def place(self, name: str, ask: PlaceAsk, *, actor: str) -> PlacesAnswer:
        model = self._model(name)
        change: Change = SetReplicas(
            model=model,
            labels=ask.labels,
            preload=ask.preload,
            keep_alive_s=ask.keep_alive_s,
            keep=ask.keep,
            priority=ask.priority,
        )
        return await self._order(name, Unplace(model=model) if ask.clear else change, actor)

    async def pin(self, name: str, node: str, *, actor: str) -> PlacesAnswer:
        return await self._order(name, Pin(model=self._model(name), node=self._state().resolve(node)), actor)

    async def unpin(self, name: str, node: str, *, actor: str) -> PlacesAnswer:
        model, state = self._model(name), self._state()
        desired = state.desired.get(model)
        # A node that was removed is still pinned to, by its id.
        known = NodeId(node) if desired is not None and node in desired.pins else state.resolve(node)
        return await self._order(name, Unpin(model=model, node=known), actor)

    async def _order(self, name: str, change: Change, actor: str) -> PlacesAnswer:
        """As it is to be now: what is left to do has not begun."""
        await self._propose(change, actor=actor)
        return await self.places(name)

    def _model(self, name: str) -> str:
        model, state = name_key(name), self._state()
        if model not in state.models and model not in state.desired:
            raise ModelNotFound(f"model '{name}' not found")
        return model

    # ── what if ─────────────────────────────────────────────────────────────────────

    async def what_if(self, lose: Sequence[str]) -> WhatIfAnswer:
        """What would come of losing these nodes for good."""
        if not lose:
            raise Invalid("say which nodes would be lost")
        state = self._state()
        nodes = [state.resolve(node) for node in lose]
        loads = await self._loads(state)
        policy, now = self._policy(), self._clock.time()
        planner = await anyio.to_thread.run_sync(planner_of, state, policy, self._rules, now, loads)
        living = {node.id for node in state.nodes.values() if node.alive}
        held = {model: [n for n in there if n in living] for model, there in state.models.items()}
        found = await anyio.to_thread.run_sync(what_if, planner, nodes, held)
        return WhatIfAnswer(
            lost=tuple(names(state, found.lost)),
            moved=tuple(
                MovedRow(
                    model=display(state, one.model),
                    gone=tuple(names(state, (replica.node for replica in one.gone))),
                    new=tuple(names(state, (replica.node for replica in one.new))),
                    loads=tuple(names(state, one.loads)),
                )
                for one in found.moved
            ),
            no_longer=tuple(
                RefusedRow(
                    model=display(state, one.model), copies=one.copies, loaded=one.warm, reasons=one.reasons
                )
                for one in found.no_longer
            ),
            last_copies=tuple(display(state, model) for model in found.last_copies if held[model]),
            planned=len(planner.wants),
        )
