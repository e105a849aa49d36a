"""Operators at work: every change is noted with what came of it, and judged at the end."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Literal

import anyio
import msgspec

from ollama_distributed.base.errors import (
    Conflict,
    DeadlineExceeded,
    NotFound,
    OllamaDistributedError,
    QueueFull,
    Unavailable,
)
from ollama_distributed.base.ids import NodeId
from ollama_distributed.cluster.ports import REFUSAL_S
from ollama_distributed.state.changes import Change, RemoveNode, SetConfig, SetDrain, SetLabels
from ollama_distributed.testing.linearizability import Call, History
from ollama_distributed.testing.simulation.node import NEWS, SimulatedNode
from ollama_distributed.testing.simulation.rules import Rules
from ollama_distributed.testing.simulation.trace import Trace

OPERATORS = 3
MEAN_PAUSE_S = 1.5
ANSWER_S = REFUSAL_S + 1.0 + 0.1
"""A change is made, refused or given up within so long: two seconds, one to see one's own."""
REMOVE_AGAIN_S = 0.5
CONFIG = "config"
"""The key of the cluster's config in the history; its versions are the revisions."""

Outcome = Literal["made", "conflict", "missing", "refused", "unknown", "unheard"]


class Done(msgspec.Struct, frozen=True):
    actor: str
    outcome: Outcome
    revision: int | None = None


class Workload:
    def __init__(
        self, nodes: list[SimulatedNode], rules: Rules, trace: Trace, history: History, chance: random.Random
    ) -> None:
        self.done: list[Done] = []
        self.pending = 0
        self._nodes = nodes
        self._rules = rules
        self._trace = trace
        self._history = history
        self._chance = chance
        self._actors = 0

    async def run(self) -> None:
        """Operators until cancelled; a change that is cut short stays unknown."""
        async with anyio.create_task_group() as group:
            for _ in range(OPERATORS):
                group.start_soon(self._operate)

    async def remove(self, node: NodeId) -> None:
        """Forget a node that left for good; again and again until it is made."""
        while True:
            if (asked := self._somewhere(servers_only=True)) is not None:
                done = await self._propose(asked, RemoveNode(node=node, force=True))
                if done == "made" or done == "missing":
                    return
            await anyio.sleep(REMOVE_AGAIN_S)

    def judge(self) -> None:
        """Once all is over: what was acknowledged was made, what was refused was not."""
        for done in self.done:
            made = self._rules.made.get(done.actor, [])
            if done.outcome == "made" and made != [done.revision]:
                self._rules.break_(f"{done.actor} was told {done.revision}, but it was made at {made}")
            if done.outcome in ("conflict", "missing", "refused") and made:
                self._rules.break_(f"{done.actor} was told that it was refused; it was made at {made}")

    # ── one operator ────────────────────────────────────────────────────────────────

    async def _operate(self) -> None:
        while True:
            await anyio.sleep(self._chance.expovariate(1 / MEAN_PAUSE_S))
            if (node := self._somewhere()) is not None:
                kinds = [self._set_config, self._put_config, self._drain, self._label, self._send]
                await self._chance.choice(kinds)(node)

    async def _set_config(self, node: SimulatedNode) -> None:
        """By compare-and-set on the version that this node shows."""
        assert node.life is not None
        base = node.life.config.current.version
        await self._propose(node, SetConfig(values={"n": self._actors}, base=base))

    async def _put_config(self, node: SimulatedNode) -> None:
        """On whatever version there is; the manager tries again where others were faster."""
        assert node.life is not None
        manager, actor = node.life.config, self._actor()
        self._rules.proposed[actor] = None
        call = self._history.call(actor, CONFIG, "write", value=actor.encode())

        async def put() -> int:
            config = await manager.put({self._chance.choice("abc"): actor}, actor=actor)
            call.done(config.version)
            return next(iter(self._rules.made.get(actor, ())), 0)

        if await self._note(node, actor, "PutConfig", put) in ("conflict", "refused"):
            call.refused()

    async def _drain(self, node: SimulatedNode) -> None:
        drained = self._chance.choice(self._nodes).id
        await self._propose(node, SetDrain(node=drained, drain=self._chance.random() < 0.5))

    async def _label(self, node: SimulatedNode) -> None:
        labelled = self._chance.choice(self._nodes).id
        value = None if self._chance.random() < 0.3 else f"v{self._actors}"
        await self._propose(node, SetLabels(node=labelled, labels={self._chance.choice("xyz"): value}))

    async def _send(self, node: SimulatedNode) -> None:
        """A message to one node, which acknowledges, or to all."""
        assert node.life is not None
        network, peer = node.life.network, self._chance.choice(self._nodes).id
        body = f"{self._actor()}@{node.id}".encode()
        self._trace.note("send", body=body.decode(), to=peer)
        try:
            if self._chance.random() < 0.5:
                await network.broadcast(NEWS, body)
            else:
                await network.send_to(peer, NEWS, body)
                self._rules.acknowledged(peer, body)
        except (Unavailable, DeadlineExceeded) as error:
            self._trace.note("not_sent", body=body.decode(), code=error.code)

    # ── steps ───────────────────────────────────────────────────────────────────────

    async def _propose(self, node: SimulatedNode, change: Change) -> Outcome:
        assert node.life is not None
        consensus, actor = node.life.consensus, self._actor()
        self._rules.proposed[actor] = change
        started = anyio.current_time()
        call: Call | None = None
        if isinstance(change, SetConfig):
            call = self._history.call(actor, CONFIG, "write", value=actor.encode(), expected=change.base)

        async def propose() -> int:
            return await consensus.propose_change(change, actor=actor)

        outcome = await self._note(node, actor, type(change).__name__, propose)
        if call is not None and isinstance(change, SetConfig):
            match outcome:
                case "made":
                    call.done(change.base + 1)
                case "conflict":
                    call.conflict()
                case "refused":
                    call.refused()
        if outcome != "unheard" and (took_s := anyio.current_time() - started) > ANSWER_S:
            self._rules.break_(f"{actor} had an answer after {took_s:.3f} s only")
        return outcome

    async def _note(
        self, node: SimulatedNode, actor: str, what: str, work: Callable[[], Awaitable[int]]
    ) -> Outcome:
        life = node.life
        self._trace.note("ask", actor=actor, at=node.id, what=what)
        self.pending += 1
        outcome: Outcome = "unknown"
        revision: int | None = None
        try:
            revision = await work()
            outcome = "made"
        except Conflict:
            outcome = "conflict"
        except NotFound:
            outcome = "missing"
        except (Unavailable, QueueFull):
            outcome = "refused"
        except DeadlineExceeded:
            outcome = "unknown"
        except OllamaDistributedError as error:
            self._rules.break_(f"{actor} got {error!r}")
        finally:
            self.pending -= 1
        if node.life is not life:
            outcome = "unheard"  # the node died or stopped meanwhile: nobody got the answer
        self._rules.counts[f"change_{outcome}"] += 1
        self._trace.note(outcome, actor=actor, revision=revision)
        self.done.append(Done(actor, outcome, revision))
        return outcome

    def _somewhere(self, *, servers_only: bool = False) -> SimulatedNode | None:
        up = [node for node in self._nodes if node.life is not None]
        if servers_only:
            up = [node for node in up if node.role == "server"]
        return self._chance.choice(up) if up else None

    def _actor(self) -> str:
        self._actors += 1
        return f"op{self._actors}"
