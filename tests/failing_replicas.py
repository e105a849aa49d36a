"""Replicas of one echo model behind a router, in one process and any loop: they are killed, they
hang and wake, and what they said meanwhile arrives late.

    replicas = Replicas(3, EchoSettings(answer="...", tokens_per_s=50))
    answer = replicas.ask()
    replicas["b"].kill()
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from ollama_distributed.adapters.peers.wire import events_frame
from ollama_distributed.adapters.peers.written import written_of
from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import Unavailable
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import NodeId, RequestId
from ollama_distributed.base.inference import (
    ChatPrompt,
    Delta,
    EmbedRequest,
    EmbedResult,
    Event,
    Failed,
    Finished,
    Generation,
    InferenceRequest,
    Message,
    Moved,
    RerankRequest,
    RerankResult,
)
from ollama_distributed.base.tokens import EngineFailed, Resume, SourceEvent, SourceSink, Written
from ollama_distributed.cluster.load import Load
from ollama_distributed.models.held import held_model
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.routing.service import Router
from ollama_distributed.serving.options import Rules
from ollama_distributed.serving.queues import Waiting
from ollama_distributed.serving.service import Serving
from ollama_distributed.serving.settings import ServingSettings
from ollama_distributed.state import keys as state_keys
from ollama_distributed.state.cluster import ClusterState, apply
from ollama_distributed.state.codec import encode
from ollama_distributed.state.records import Advert, Holdings, Intent, Member
from ollama_distributed.streams.kept import same
from ollama_distributed.streams.service import Answers
from ollama_distributed.testing.echo import EchoEngine, EchoSettings, echo_model
from tests.answering import FixedMachine, Models

NO_QUEUES: Mapping[str, Waiting] = {}
EOF_S = 0.002
"""Until a node hears that another one's process is gone."""


class Wire:
    """A generation on another node, and the connection to it."""

    def __init__(
        self, replica: Replica, request: InferenceRequest, sink: SourceSink, resume: Resume | None
    ) -> None:
        self.replica = replica
        self.request = request
        self._sink = sink
        self._late: list[SourceEvent] = []
        self._broken = False
        self._resume = resume
        self._frames: list[bytes] = []
        self._generation: Generation | None = None
        replica.wires[self] = None
        if replica.dead:
            self.cut()
        else:
            self._generation = replica.serving.start(request, self._hear, resume)

    def _hear(self, event: SourceEvent) -> None:
        self._frames.append(events_frame([event]))
        if self.replica.hangs:
            self._late.append(event)
        elif not self._broken:
            self._sink(event)

    def cut(self) -> None:
        self._broken = True
        asyncio.get_running_loop().call_later(
            EOF_S, self._sink, EngineFailed(Unavailable(f"node {self.replica.id} closed the connection"))
        )
        if self._generation is not None:
            self._generation.cancel()

    def written(self, request: InferenceRequest) -> Written | None:
        if request.request_id == self.request.request_id and same(self.request, request):
            return written_of(self._resume, self._frames)
        return None

    def wake(self) -> None:
        """What was on its way comes, to whoever still listens: even after `cancel`."""
        late, self._late = self._late, []
        for event in late:
            self._sink(event)

    def cancel(self) -> None:
        if self._generation is not None and not self.replica.hangs:
            self._generation.cancel()

    def pause(self) -> None:
        if self._generation is not None:
            self._generation.pause()

    def resume(self) -> None:
        if self._generation is not None:
            self._generation.resume()


class Replica:
    def __init__(
        self,
        name: str,
        settings: EchoSettings,
        clock: Clock,
        model: ModelSpec,
        *,
        held: bool,
        slots: int,
        queue: Waiting | None,
    ) -> None:
        self.id = NodeId(name)
        self.engine = EchoEngine(settings)
        self.models = Models(model) if held else Models()
        self.serving = Serving(
            self.models,
            [self.engine],
            FixedMachine(),
            clock,
            ServingSettings(rules=Rules(slots=slots)),
            queue=queue,
        )
        self.held = held
        self.dead = False
        self.hangs = False
        self.wires: dict[Wire, None] = {}
        """In their order: in one of addresses no two runs would be alike."""

    def written(self, request: InferenceRequest) -> Written | None:
        """What it generated for others, as its door would say."""
        found = [written for wire in self.wires if (written := wire.written(request)) is not None]
        return max(found, key=lambda one: len(one.ids), default=None)

    @property
    def speaks(self) -> bool:
        return any(one.slots_busy for one in self.serving.loaded())

    def kill(self) -> None:
        self.dead = True
        wires, self.wires = self.wires, {}
        for wire in wires:
            wire.cut()

    def speed(self, tokens_per_s: float) -> None:
        """From now on."""
        self.engine.speaks(tokens_per_s)

    def hang(self) -> None:
        self.hangs = True

    def wake(self) -> None:
        self.hangs = False
        for wire in self.wires:
            wire.wake()


class Heard:
    """An answer as a client sees it, and when."""

    def __init__(self, answers: Answers, request: InferenceRequest, on_word: Callable[[Heard], None]) -> None:
        self.events: list[Event] = []
        self.gap_s = 0.0
        """The longest between two pieces of it."""
        self.pieces = 0
        self._on_word = on_word
        self._last_s: float | None = None
        self._ended = asyncio.Event()
        self.generation = answers.open(request, self._hear)

    def _hear(self, event: Event) -> None:
        assert not self._ended.is_set(), f"{event} after the end"
        self.events.append(event)
        now = asyncio.get_running_loop().time()
        if isinstance(event, Delta):
            if self._last_s is not None:
                self.gap_s = max(self.gap_s, now - self._last_s)
            self._last_s = now
            self.pieces += 1
            self._on_word(self)
        elif isinstance(event, Finished | Failed):
            self._ended.set()

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Delta))

    @property
    def thinking(self) -> str:
        return "".join(event.thinking for event in self.events if isinstance(event, Delta))

    @property
    def moved(self) -> list[str]:
        return [event.node for event in self.events if isinstance(event, Moved)]

    async def end(self) -> Finished | Failed:
        await self._ended.wait()
        last = self.events[-1]
        assert isinstance(last, Finished | Failed)
        return last


class Replicas:
    """Nodes a, b, ... that hold the model, and the gateway `g`, which does not."""

    def __init__(
        self,
        count: int,
        settings: EchoSettings,
        clock: Clock,
        *,
        seed: int = 0,
        thinks: bool = False,
        slots: int = 4,
        queues: Mapping[str, Waiting] = NO_QUEUES,
    ) -> None:
        """`queues`: by name of a node, in place of the simplest one."""
        self.random = random.Random(seed)
        self.model = echo_model("m")
        if thinks:
            able = self.model.capabilities | {"thinking"}
            tags = ("<think>", "</think>")
            self.model = msgspec.structs.replace(self.model, capabilities=able, thinking_tags=tags)
        names = "abcdefgh"[:count]
        self.all = {
            name: Replica(name, settings, clock, self.model, held=True, slots=slots, queue=queues.get(name))
            for name in names
        }
        self.all["g"] = Replica("g", settings, clock, self.model, held=False, slots=slots, queue=None)
        self.loads: dict[NodeId, Load] = {}
        self._state = ClusterState()
        for replica in self.all.values():
            self._write(
                state_keys.advert(replica.id),
                Advert(node=replica.id, name=replica.id.upper(), role="node", version="1", boot="b",
                       started_at=1.0, hop=("x:1",)),
            )  # fmt: skip
            self._hold(replica, (self.model,) if replica.held else ())
            self._write(state_keys.member(replica.id), Member(node=replica.id, status="online", since=1.0))
        self.routers = {
            name: Router(
                replica.serving,
                Shelf(replica),
                self,
                View(self, replica.id),
                self.random.randrange,
                clock=clock,
            )
            for name, replica in self.all.items()
        }
        self._clock = clock
        self.answers = {name: self._answers(name) for name in self.all}

    def _answers(self, name: str) -> Answers:
        router = self.routers[name]
        return Answers(router, self._clock, self.random.random, self.all[name].written, router.paced)

    def restart(self, name: str) -> None:
        """The gateway `name` remembers nothing."""
        self.answers[name] = self._answers(name)

    def __getitem__(self, name: str) -> Replica:
        return self.all[name]

    def ask(
        self,
        at: str = "g",
        on_word: Callable[[Heard], None] = lambda _: None,
        text: str = "hello there",
        **fields: Any,
    ) -> Heard:
        """Ask at node `at`."""
        return Heard(self.answers[at], self.request(text, **fields), on_word)

    def request(self, text: str = "hello there", **fields: Any) -> InferenceRequest:
        request = InferenceRequest(
            request_id=RequestId("r1"),
            identity=Identity("local"),
            model="m",
            prompt=ChatPrompt(messages=(Message(role="user", content=text),)),
        )
        return msgspec.structs.replace(request, **fields)

    def drain(self, name: str) -> None:
        """As an operator says it."""
        self._write(state_keys.intent(self.all[name].id), Intent(node=self.all[name].id, drain=True))

    def holds_another(self, name: str) -> None:
        """Its model of that name has other content."""
        other = msgspec.structs.replace(self.model, digest="f" * 64)
        self.all[name].models.models["m"] = other
        self._hold(self.all[name], (other,))

    def _hold(self, replica: Replica, models: tuple[ModelSpec, ...]) -> None:
        held = Holdings(node=replica.id, models=tuple(map(held_model, models)))
        self._write(state_keys.holdings(replica.id), held)

    def speaking(self) -> Replica:
        """The one that answers now."""
        (one,) = (replica for replica in self.all.values() if replica.speaks)
        return one

    def state(self) -> ClusterState:
        return self._state

    def _write(self, key: str, record: msgspec.Struct) -> None:
        self._state = apply(self._state, key, encode(record), self._state.revision + 1)

    # ── routing.ports.Peers ─────────────────────────────────────────────────────────

    def start(
        self, node: NodeId, request: InferenceRequest, sink: SourceSink, resume: Resume | None = None
    ) -> Wire:
        return Wire(self.all[node], request, sink, resume)

    async def written(self, node: NodeId, request: InferenceRequest) -> Written | None:
        replica = self.all[node]
        if replica.dead:
            raise Unavailable(f"node {node} cannot be reached")
        return self.answers[node].written(request)

    async def hand_over(self, node: NodeId, request: InferenceRequest, written: Written) -> None:
        self._there(node)
        self.answers[node].handed(request, written)

    async def embed(self, node: NodeId, request: EmbedRequest) -> EmbedResult:
        return await self._there(node).embed(request)

    async def rerank(self, node: NodeId, request: RerankRequest) -> RerankResult:
        return await self._there(node).rerank(request)

    async def count_tokens(self, node: NodeId, request: InferenceRequest) -> int:
        return await self._there(node).count_tokens(request)

    def _there(self, node: NodeId) -> Serving:
        if self.all[node].dead:
            raise Unavailable(f"node {node} cannot be reached")
        return self.all[node].serving

    async def close(self) -> None:
        for replica in self.all.values():
            replica.hangs = False
            await replica.serving.close(0.0)


class Shelf:
    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    def version(self, name: str) -> str:
        return "d" if self._replica.held and name == "m" else ""


class View:
    """`routing.ports.ClusterView`."""

    def __init__(self, replicas: Replicas, me: NodeId) -> None:
        self._replicas = replicas
        self.me = me

    def state(self) -> ClusterState:
        return self._replicas.state()

    def interest(self, nodes: Iterable[NodeId]) -> None:
        pass

    def report(self, node: NodeId) -> Load | None:
        return self._replicas.loads.get(node)
