"""Sends each request where it is answered: to this node's own serving, or to another node.

Implements `streams.ports.Source` over both. Until the first word of an answer a refusal that
is about the node, not the request, leads to the next one of the plan, unseen by the client;
after it `streams` asks for the answer's continuation (`Resume`). Nothing here waits for
consensus: the choice is made from the last state that this node knows, and a node that the
state calls offline is still tried when no other holds the model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

import anyio
import msgspec
import structlog

from ollama_distributed.base.clock import Clock, SystemClock
from ollama_distributed.base.errors import NoCapacity, OllamaDistributedError, QueueFull
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import NodeId, RequestId
from ollama_distributed.base.inference import (
    EmbedRequest,
    EmbedResult,
    Generation,
    InferenceRequest,
    RerankRequest,
    RerankResult,
    Sampling,
    TextPrompt,
)
from ollama_distributed.base.routing import Policy, RouteDecision
from ollama_distributed.base.tokens import (
    Done,
    EngineFailed,
    Resume,
    SourceEvent,
    SourceSink,
    Tokens,
    Written,
)
from ollama_distributed.models.names import name_key
from ollama_distributed.routing.attempts import Attempts
from ollama_distributed.routing.caches import Trip
from ollama_distributed.routing.choosing import Chooser, Routed, Wanted, no_labels
from ollama_distributed.routing.decisions import Decisions, Record
from ollama_distributed.routing.ejections import Ejections
from ollama_distributed.routing.hedging import Hedges, first_answer, kind_of
from ollama_distributed.routing.paces import Paces
from ollama_distributed.routing.plan import ELSEWHERE, Dice, Plan, most_telling
from ollama_distributed.routing.ports import ClusterView, Local, Peers, Shelf
from ollama_distributed.routing.refusals import Asker, Refusals, asker_of
from ollama_distributed.routing.successors import MOST_ASKED, Successors

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

T = TypeVar("T")


def _no_labelled(model: str, wanted: Mapping[str, str]) -> NoCapacity:
    labels = ", ".join(f"{name}={value}" for name, value in sorted(wanted.items()))
    return NoCapacity(f"no node with the labels {labels} holds {model}")


PROBE_ID = RequestId("probe")


class Router:
    """Implements `streams.ports.Source`. `dice`: `random.Random(seed).randrange`. `missed`: hears
    of each request for a model that is not on this node's disk. `wanted`: labels that a node must
    have to answer a request."""

    def __init__(
        self,
        local: Local,
        shelf: Shelf,
        peers: Peers,
        view: ClusterView,
        dice: Dice,
        missed: Callable[[], None] = lambda: None,
        clock: Clock | None = None,
        *,
        policy: Policy = "prefix",
        wanted: Wanted = no_labels,
    ) -> None:
        self._clock = clock or SystemClock()
        self._ejections = Ejections(self._clock, dice)
        self._paces = Paces()
        self._hedges = Hedges()
        self._refusals = Refusals()
        self.chooser = Chooser(local, shelf, view, dice, self._ejections, missed, policy, wanted)
        self._successors = Successors(self.chooser, self._ejections, view, dice)
        self.decisions = Decisions(
            lambda: view.me, self._called, lambda node, model: self._ejections.circuit(node, name_key(model))
        )
        self._local = local
        self._peers = peers
        self._view = view

    def use(self, policy: Policy) -> None:
        """From the next choice on."""
        self.chooser.policy = policy

    def plan(self, model: str) -> Plan:
        """Which nodes would be asked now, and why not the others."""
        return self.chooser.plan(model)

    def start(self, request: InferenceRequest, sink: SourceSink, resume: Resume | None = None) -> Generation:
        me, key = self._view.me, name_key(request.model)
        if resume is None:
            routed = self.chooser.choose(request)
            self.decisions.add(self._record(request, routed))
            order, trip = routed.plan.order, routed.trip
            if not order and (lacking := self._lacking(request, routed.plan)) is not None:
                sink(EngineFailed(lacking))
                return NOTHING
        else:
            order, known = self._successors.order(request, resume)
            trip = Trip(self.chooser.caches, key, known.chain, known.prompt.cached, "failover", rest=True)
        if request.load_only and request.keep_alive_s == 0:
            order = self._unload(request, order)
        if order in ((), (me,)):
            # Nobody else could do it; a model that nobody holds is refused in the usual words.
            return self._local.start(request, sink, resume)

        asker = asker_of(request) if resume is None else None
        order, full = self._refusals.left(order, key, asker, self._clock.monotonic())
        if full is not None and not order:
            sink(EngineFailed(full))
            return NOTHING

        def begin(node: NodeId, hear: SourceSink) -> Generation:
            self._refusals.asked(node, key, asker, self._clock.monotonic())
            if node == me:
                return self._local.start(request, hear, resume)
            return self._peers.start(node, request, hear, resume)

        if resume is not None and resume.left and resume.left[-1].stalled:
            self._ejections.stalled(NodeId(resume.left[-1].replica) or me, key)

        def noted(node: NodeId, error: OllamaDistributedError | None) -> None:
            self._noted(node, key, asker, error)

        def taken(node: NodeId) -> None:
            self._refusals.taken(node, key, asker)

        return Attempts(order, begin, sink, request.request_id, self._name_of, noted, trip, full, taken)

    def _noted(
        self, node: NodeId, key: str, asker: Asker | None, error: OllamaDistributedError | None
    ) -> None:
        """How a node took a request. `asker`: whose, if another of theirs would fare alike."""
        self._ejections.note(node, key, error)
        if asker is not None and isinstance(error, QueueFull):
            self._refusals.refused(node, key, asker, error, self._clock.monotonic())

    # ── the choice ──────────────────────────────────────────────────────────────────

    def explain(self, request: InferenceRequest) -> RouteDecision:
        """What would be chosen for it now; nothing is sent, and nothing is remembered."""
        routed = self.chooser.choose(request, look=True)
        record = self._record(request, routed)
        record.request_id = ""
        return self.decisions.shown(record)

    def _record(self, request: InferenceRequest, routed: Routed) -> Record:
        return Record(
            request.request_id,
            request.identity.team,
            request.model,
            self._clock.time(),
            routed.plan,
            routed.chain.keys,
            routed.prompt.tokens,
        )

    def _lacking(self, request: InferenceRequest, made: Plan) -> NoCapacity | None:
        """Why nobody may be asked, where labels are the reason."""
        wanted = self.chooser.wanted(request)
        if not wanted or not made.left_out:
            return None
        return _no_labelled(request.model, wanted)

    def _unload(self, request: InferenceRequest, order: tuple[NodeId, ...]) -> tuple[NodeId, ...]:
        """`ollama stop`: the model leaves every memory that reports it. Who answers the client."""
        directory, others = self.chooser.directory, self.chooser.directory.everyone(request.model)
        loads = self.chooser.loads(name_key(request.model), others[:MOST_ASKED])
        told = directory.warm(request.model)
        loaded = [
            one.node for one in others if (loads[one.node].loaded if one.node in loads else one.node in told)
        ]
        if self._view.me not in order and loaded:
            order = (loaded.pop(0),)

        def heard(event: SourceEvent) -> None:
            if isinstance(event, EngineFailed):
                log.warning("routing.not_unloaded", request_id=request.request_id, reason=event.error.message)

        for node in loaded:
            if node not in order[:1]:
                self._peers.start(node, request, heard)
        return order

    def elsewhere(self, request: InferenceRequest, resume: Resume) -> bool:
        """Whether a node that it did not leave, lives and takes work could go on with it."""
        return self._successors.exist(request, resume)

    async def written(self, request: InferenceRequest) -> Written | None:
        """The longest that a node has which may have generated it."""
        found: list[Written] = []

        async def ask(node: NodeId) -> None:
            try:
                written = await self._peers.written(node, request)
            except OllamaDistributedError as error:
                log.debug("routing.not_written", request_id=request.request_id, node=node, code=error.code)
            else:
                found.extend([written] if written is not None else [])

        async with anyio.create_task_group() as asking:
            for node in self._successors.keepers(request):
                asking.start_soon(ask, node)
        return max(found, key=lambda one: len(one.ids), default=None)

    async def hand_over(self, request: InferenceRequest, written: Written) -> None:
        """To the first that takes it of those who are asked for it later (`written`)."""
        for node in self._successors.keepers(request):
            try:
                await self._peers.hand_over(node, request, written)
                return
            except OllamaDistributedError as error:
                log.debug("routing.not_taken", request_id=request.request_id, node=node, code=error.code)

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        node, why, result = await self._ask(
            request.model,
            request.request_id,
            lambda: self._local.embed(request),
            lambda node: self._peers.embed(node, request),
            sum(map(len, request.inputs)),
            asker=asker_of(request),
            wanted=self.chooser.wanted(request),
        )
        return msgspec.structs.replace(result, node=node, route=why)

    async def rerank(self, request: RerankRequest) -> RerankResult:
        node, why, result = await self._ask(
            request.model,
            request.request_id,
            lambda: self._local.rerank(request),
            lambda node: self._peers.rerank(node, request),
            len(request.query) + sum(map(len, request.documents)),
            asker=asker_of(request),
            wanted=self.chooser.wanted(request),
        )
        return msgspec.structs.replace(result, node=node, route=why)

    async def count_tokens(self, request: InferenceRequest) -> int:
        *_, tokens = await self._ask(
            request.model,
            request.request_id,
            lambda: self._local.count_tokens(request),
            lambda node: self._peers.count_tokens(node, request),
            wanted=self.chooser.wanted(request),
        )
        return tokens

    def paced(self, model: str, replica: str, tokens: int, seconds: float) -> None:
        """What a replica said in the last second, in answers that were spoken for `seconds` together."""
        node, key = NodeId(replica) or self._view.me, name_key(model)
        if self._paces.said((node, key), tokens, seconds) and len(self.chooser.holders(model)) > 1:
            self._ejections.slow(node, key)

    async def probe(self) -> None:
        """Until it is cancelled: see whether replicas that failed are well again."""
        await self._ejections.probe(self._probe, self._known)

    def _known(self, replica: tuple[NodeId, str]) -> bool:
        node, key = replica
        if node == self._view.me:
            return True
        # One that drains comes last anyway, and refuses probes.
        return node in self._view.state().models.get(key, ()) and not self.chooser.directory.draining(node)

    async def _probe(self, node: NodeId, key: str) -> None:
        held = self._view.state().models.get(key)
        known = held.get(node) if held is not None else None
        if known is not None and "completion" not in known.capabilities:
            asked = EmbedRequest(request_id=PROBE_ID, identity=Identity("local"), model=key, inputs=("1",))
            await (self._local.embed(asked) if node == self._view.me else self._peers.embed(node, asked))
            return
        ended: asyncio.Future[OllamaDistributedError | None] = asyncio.get_running_loop().create_future()

        def hear(event: SourceEvent) -> None:
            if isinstance(event, EngineFailed | Done | Tokens) and not ended.done():
                ended.set_result(event.error if isinstance(event, EngineFailed) else None)

        one = InferenceRequest(
            request_id=PROBE_ID,
            identity=Identity("local"),
            model=key,
            prompt=TextPrompt(text="1", raw=True),
            sampling=Sampling(num_predict=1),
        )
        there = self._local.start(one, hear) if node == self._view.me else self._peers.start(node, one, hear)
        try:
            if (error := await ended) is not None:
                raise error
        finally:
            there.cancel()

    async def _ask(
        self,
        model: str,
        request_id: RequestId,
        here: Callable[[], Awaitable[T]],
        there: Callable[[NodeId], Awaitable[T]],
        size: int | None = None,
        *,
        asker: Asker | None = None,
        wanted: Mapping[str, str],
    ) -> tuple[str, str, T]:
        """The name of the node that answered (empty: this one), why that one, the answer. `size`: of
        the question, in characters; one that has a size is asked twice where its answer is late
        (`hedging.py`)."""
        made, key = self.chooser.plan(model, wanted), name_key(model)
        if wanted and not made.order and made.left_out:
            raise _no_labelled(model, wanted)
        order = made.order or (self._view.me,)
        full: QueueFull | None = None
        if order != (self._view.me,):
            order, full = self._refusals.left(order, key, asker, self._clock.monotonic())
            if full is not None and not order:
                raise full

        def noted(node: NodeId, error: OllamaDistributedError | None) -> None:
            self._noted(node, key, asker, error)
            if error is None:
                self._refusals.taken(node, key, asker)
            if error is not None and len(order) > 1:
                say = log.debug if isinstance(error, QueueFull) else log.warning
                say("routing.refused", request_id=request_id, node=node, reason=error.message)

        def lost(node: NodeId) -> None:
            if self._hedges.lost(node, key):
                self._ejections.slow(node, key)

        async def ask(node: NodeId) -> T:
            self.chooser.caches.started(node, key)
            self._refusals.asked(node, key, asker, self._clock.monotonic())
            try:
                return await (here() if node == self._view.me else there(node))
            finally:
                self.chooser.caches.ended(node, key)

        def may() -> bool:
            taken = self._hedges.take()
            if taken:
                log.info("routing.asked_twice", request_id=request_id, node=second)
            return taken

        second = self._second(made, key) if size is not None else None
        kind = kind_of(key, size or 0)
        after_s = self._hedges.begin(kind) if second is not None else None
        began = self._clock.monotonic()
        try:
            node, answer = await first_answer(
                order, ask, noted, after_s=after_s, second=second, may=may, lost=lost
            )
        except ELSEWHERE as error:
            if full is None:
                raise
            raise most_telling((full, error)) from error
        self._hedges.answered(node, key)
        if second is not None:
            self._hedges.ended(kind, self._clock.monotonic() - began)
        return self._name_of(node), made.reason if node == order[0] else "retry", answer

    def _second(self, made: Plan, key: str) -> NodeId | None:
        """Who may be asked beside the first one: a replica that is well and in memory."""
        nodes, warm = self._view.state().nodes, {one.node for one in made.scores if one.load.loaded}
        for node in made.order[1:]:
            well = (known := nodes.get(node)) is not None and known.status == "online"
            if well and node in warm and self._ejections.circuit(node, key)[0] != "open":
                return node
        return None

    def _name_of(self, node: NodeId) -> str:
        """That people see, if a header can carry it; empty: this one."""
        return "" if node == self._view.me else self._called(node)

    def _called(self, node: NodeId) -> str:
        known = self._view.state().nodes.get(node)
        name = known.name if known is not None else node
        return name if name.isascii() and name.isprintable() else node


class _Nothing:
    """A generation that ended before it began."""

    def cancel(self) -> None: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...


NOTHING = _Nothing()
