"""One simulation: a cluster starts, things go wrong, all heals, and everything must be right.

    report = simulate(seed=7)

Everything follows from the seed: how many nodes there are, what fails when, what operators
ask. Same seed, same trace.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping

import anyio
import msgspec

from ollama_distributed.base.ids import NodeId, NodeRole
from ollama_distributed.cluster.membership.plan import JOINED
from ollama_distributed.cluster.ports import ABSENT, Write
from ollama_distributed.state import keys
from ollama_distributed.state.codec import decode, encode
from ollama_distributed.state.records import Config, Member
from ollama_distributed.testing import virtual_time
from ollama_distributed.testing.linearizability import History, Undecided, Violation
from ollama_distributed.testing.simulation.defects import watching_logs
from ollama_distributed.testing.simulation.engine import WatchedEngine
from ollama_distributed.testing.simulation.faults import Faults
from ollama_distributed.testing.simulation.link import FaultyLink
from ollama_distributed.testing.simulation.node import SimulatedNode, Surroundings
from ollama_distributed.testing.simulation.rules import Rules
from ollama_distributed.testing.simulation.sharing import sharing_steps
from ollama_distributed.testing.simulation.sweep import Problem, problems
from ollama_distributed.testing.simulation.trace import Trace
from ollama_distributed.testing.simulation.workload import CONFIG, Workload
from ollama_distributed.testing.virtual_time import EPOCH, VirtualClock, VirtualLoop

LEAST_NODES, MOST_NODES = 5, 30
FAULTS_S = 120.0
FORMING_S = 15.0
"""From the first start to one leader and everyone online."""
SETTLING_S = 30.0
"""From the healing of all faults to a cluster where everything is right."""
HELD_S = 75.0
"""A node that flapped is held back up to `membership.plan.MAX_HOLD_S`, and then some."""
POLL_S = 0.237
"""Not a divisor of the lease's second: a look must not always meet a renewal on its way."""
MAX_DRIFT = 0.02
"""A clock runs so much fast or slow at most; real ones a hundredth of that."""
WATCH_EVERY = 8
"""One node of so many has a watch of its own that is checked event by event."""
LATE_SHARE = 5
"""One node of so many joins while things go wrong; never the first, or nobody might lead."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    seed: int
    nodes: int
    digest: str
    """Of the trace."""
    lines: int
    broken: tuple[str, ...]
    settled_s: float | None
    """After the healing; None: it was not."""
    messages: int
    counts: Mapping[str, int]
    options: str
    """Of the command that replays it."""
    tail: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """What replays it."""
        return f"python -m ollama_distributed.testing.simulation {self.options}"


class Failed(AssertionError):
    """A simulation found something; the message has what, the last events and how to replay."""

    def __init__(self, report: Report) -> None:
        super().__init__(
            "\n".join([*report.tail, *report.broken, f"seed {report.seed} failed; replay:", report.command])
        )
        self.report = report


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    seed: int
    nodes: int | None = None
    """None: the seed says."""
    faults_s: float = FAULTS_S
    formed: bool = False
    """The cluster was there before: every node is known and online from the start."""


def simulate(plan: Plan, tell: Callable[[str], None] | None = None) -> Report:
    """Run one simulation to its end, or to the first rule that breaks."""
    worlds: list[World] = []

    async def main() -> Report:
        worlds.append(World(plan, tell, defects))
        return await worlds[0].run()

    with watching_logs() as defects, sharing_steps():
        try:
            return virtual_time.run(main, plan.seed, limit_s=FORMING_S + plan.faults_s + 2 * HELD_S)
        except Exception as error:
            if not worlds:
                raise
            return worlds[0].report([f"the simulation ended with {error!r}"])


class World:
    def __init__(self, plan: Plan, tell: Callable[[str], None] | None, defects: list[str]) -> None:
        self._plan = plan
        self._size = plan.nodes or self._chance("size").randint(LEAST_NODES, MOST_NODES)
        self._trace = trace = Trace(tell)
        self._rules = rules = Rules(trace, asyncio.get_running_loop().time)
        self._link = link = FaultyLink(self._chance("link"))
        self._engine = engine = WatchedEngine(link, rules)
        self._history = History()
        self._defects = defects
        self._removed: set[NodeId] = set()
        around = Surroundings(
            seed=plan.seed,
            engine=engine,
            link=link,
            rules=rules,
            trace=trace,
            removed=self._removed.__contains__,
        )
        self._nodes = self._make_nodes(around)
        self._workload = Workload(self._nodes, rules, trace, self._history, self._chance("operators"))
        rules.leading = lambda: [node.id for node in self._nodes if node.leads]
        rules.on_broken = self._stop
        self._over = anyio.CancelScope()
        self._settled_s: float | None = None

    async def run(self) -> Report:
        with self._over:
            await self._live()
        for node in self._nodes:
            node.stop()
        for node in self._nodes:
            await node.ended()
        broken = [*self._rules.broken, *self._leftovers()]
        return self.report(broken)

    def report(self, broken: list[str]) -> Report:
        return Report(
            seed=self._plan.seed,
            nodes=self._size,
            digest=self._trace.digest,
            lines=self._trace.lines,
            broken=tuple(broken),
            settled_s=self._settled_s,
            messages=self._link.sent,
            counts=dict(sorted(self._rules.counts.items())),
            options=_options(self._plan),
            tail=tuple(self._trace.tail) if broken else (),
        )

    async def _live(self) -> None:
        if self._plan.formed:
            self._preload()
        chance = self._chance("start")
        late = [] if self._plan.formed else chance.sample(self._nodes[1:], self._size // LATE_SHARE)
        for node in self._nodes:
            if node not in late:
                await node.start()
                await anyio.sleep(chance.expovariate(self._size))
        await self._until_right([node for node in self._nodes if node not in late], FORMING_S)
        with anyio.move_on_after(self._plan.faults_s):
            await self._trouble(late)
        await self._heal()
        self._settled_s = await self._until_right(self._nodes, SETTLING_S)
        self._judge()

    async def _trouble(self, late: list[SimulatedNode]) -> None:
        faults = Faults(self._nodes, self._engine, self._link, self._trace, self._chance("faults"))
        chance = self._chance("joins")
        async with anyio.create_task_group() as group:
            group.start_soon(faults.run, group)
            group.start_soon(self._workload.run)
            for node in late:
                await anyio.sleep(chance.uniform(0, self._plan.faults_s / len(late)))
                await node.start()
            self._leave(chance.choice(self._nodes))
            await anyio.sleep_forever()

    def _leave(self, node: SimulatedNode) -> None:
        if node.role == "node":
            node.gone = True
            node.stop()
            self._removed.add(node.id)

    async def _heal(self) -> None:
        self._trace.note("heal")
        self._link.heal()
        self._engine.available = True
        await anyio.sleep(max(0.0, self._link.clogged_until - anyio.current_time()))
        for node in self._nodes:
            await node.start()
        self._trace.note("healed")

    async def _until_right(self, nodes: list[SimulatedNode], limit_s: float) -> float:
        """Seconds until nothing is wrong; a broken rule where that takes longer than `limit_s`."""
        began = anyio.current_time()
        async with anyio.create_task_group() as group:
            for node in sorted(self._removed):
                group.start_soon(self._workload.remove, node)
            while wrong := self._wrong(nodes):
                waited_s = anyio.current_time() - began
                late = [p for p in wrong if waited_s > (HELD_S if p.held else limit_s)]
                if late:
                    self._rules.break_(f"after {waited_s:.1f} s: " + "; ".join(p.what for p in late[:5]))
                await anyio.sleep(POLL_S)
            group.cancel_scope.cancel()
        self._trace.note("right", nodes=len(nodes))
        return anyio.current_time() - began

    def _wrong(self, nodes: list[SimulatedNode]) -> list[Problem]:
        found = problems(nodes, self._engine, self._rules)
        if self._workload.pending:
            found.append(Problem(f"{self._workload.pending} changes are pending"))
        return found

    def _judge(self) -> None:
        """Over the whole history, now that it is complete."""
        self._workload.judge()
        entry = self._engine.entries.get(keys.CONFIG)
        config = decode(entry.value, Config) if entry else None
        last = self._history.call("all", CONFIG, "read")
        last.done(config.version if config else ABSENT, config.by.encode() if config else None)
        try:
            self._history.check()
        except (Violation, Undecided) as error:
            self._rules.break_(f"the config's history is not linearizable: {error}")

    def _leftovers(self) -> list[str]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        left = [f"task {task.get_name()} was left" for task in sorted(tasks, key=hash)]
        raised = [f"raised where nobody saw it: {error!r}" for error in loop.unhandled]
        loop.unhandled.clear()
        return [*left, *raised, *self._defects]

    # ── making ──────────────────────────────────────────────────────────────────────

    def _chance(self, purpose: str) -> random.Random:
        """Each purpose has its own, so that a change to one leaves the others' draws alone."""
        return random.Random(f"{self._plan.seed}/{purpose}")  # noqa: S311  # repeatable by intent

    def _make_nodes(self, around: Surroundings) -> list[SimulatedNode]:
        chance = self._chance("nodes")
        servers = chance.choice([3, 5])
        nodes = []
        for number in range(self._size):
            role: NodeRole = "server" if number < servers else "node"
            clock = VirtualClock(skew_s=chance.uniform(-60, 60), drift=chance.uniform(-MAX_DRIFT, MAX_DRIFT))
            node = SimulatedNode(
                around, NodeId(f"n{number:03}"), role=role, clock=clock, watched=number % WATCH_EVERY == 0
            )
            nodes.append(node)
        return nodes

    def _preload(self) -> None:
        writes = []
        for node in self._nodes:
            member = Member(
                node=node.id, status="online", since=EPOCH, reason=JOINED, boot=node.advert(1).boot
            )
            writes.append(Write(keys.advert(node.id), encode(node.advert(1))))
            writes.append(Write(keys.member(node.id), encode(member)))
        self._engine.preload(writes)

    def _stop(self) -> None:
        self._over.cancel()


def _options(plan: Plan) -> str:
    size = "" if plan.nodes is None else f" --nodes {plan.nodes}"
    time = "" if plan.faults_s == FAULTS_S else f" --faults-s {plan.faults_s}"
    return f"--seed {plan.seed}{size}{time}{' --formed' * plan.formed} --log"
