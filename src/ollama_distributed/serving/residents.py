"""One loaded model and those who use it: resident, lease, ticket.

State only; the fleet moves it.
"""

from __future__ import annotations

import asyncio
from typing import Literal, Protocol, TypeAlias

from ollama_distributed.base.errors import OllamaDistributedError, RunnerDied
from ollama_distributed.base.queue import ANYONE, Ask, Run
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.serving.options import Shape, serves
from ollama_distributed.serving.plan import renewed
from ollama_distributed.serving.ports import LoadPlan, Runner
from ollama_distributed.serving.speeds import Device

LoadKey = str
Order: TypeAlias = tuple[int, int]
"""Who comes before whom, whatever model they wait for: the lower. A ticket's number comes last."""


def load_key(spec: ModelSpec) -> LoadKey:
    """Equal for names that one runner can serve: same files, same template."""
    if spec.remote is not None:
        return f"{spec.remote.engine}\0{spec.remote.name}"
    return "\0".join((spec.weights, *spec.projectors, "", *spec.adapters, "", spec.chat_template))


class Resident:
    """One model on this node, from the decision to load it until its runner is gone."""

    __slots__ = (
        "active",
        "crowds",
        "drain_from",
        "expiry",
        "expiry_due",
        "heard",
        "keep_alive_s",
        "key",
        "last_used",
        "memory_bytes",
        "oversized",
        "plan",
        "ready_at",
        "runner",
        "shape",
        "slots_busy",
        "spec",
        "state",
        "watch",
    )

    def __init__(
        self, key: LoadKey, spec: ModelSpec, shape: Shape, plan: LoadPlan, memory_bytes: int
    ) -> None:
        self.key = key
        self.spec = spec
        self.shape = shape
        self.plan = plan
        self.memory_bytes = memory_bytes
        self.state: Literal["loading", "ready", "unloading", "gone"] = "loading"
        self.runner: Runner | None = None
        self.active = 0
        """Leases out."""
        self.slots_busy = 0
        """Of them, those that generate."""
        self.crowds = 0
        """How often one began to generate beside others."""
        self.drain_from: Order | None = None
        """Requests from here on wait: another model needs the room, and comes before."""
        self.last_used = 0.0
        self.ready_at = 0.0
        """When its runner was there, by a monotonic clock: tells this load from the next."""
        self.keep_alive_s = 0.0
        self.expiry: asyncio.TimerHandle | None = None
        self.expiry_due = 0.0
        self.oversized = False
        """It was busy beside others with more threads than its share: better loaded again."""
        self.heard = False
        """Its runner gave a sign of life since the watch looked last."""
        self.watch: asyncio.Task[None] | None = None

    def lease(self, keeper: Keeper, keep_alive_s: float | None, run: Run | None) -> Lease:
        """`run`: with a slot."""
        slot = run is not None
        assert self.runner is not None
        self.active += 1
        self.slots_busy += slot
        self.crowds += slot and self.slots_busy > 1
        self.keep_alive_s = renewed(self.keep_alive_s, keep_alive_s)
        return Lease(keeper, self, self.runner, run)

    @property
    def on_gpu(self) -> bool:
        """The engine sees a GPU, and layers may go there."""
        return self.runner is not None and bool(self.runner.info.devices) and self.plan.gpu_layers != 0

    @property
    def device(self) -> Device:
        return "gpu" if self.on_gpu else "cpu"

    @property
    def life(self) -> int:
        """Another number after each load."""
        return round(self.ready_at * 1e6)

    @property
    def on_cores(self) -> bool:
        """Whether its threads work on this machine's cores, not a GPU or another server."""
        return self.spec.remote is None and not self.on_gpu

    def forget(self) -> None:
        """It is no longer there for requests: nobody looks after it any more."""
        if self.expiry is not None:
            self.expiry.cancel()
            self.expiry = None
        if self.watch is not None:
            self.watch.cancel()
            self.watch = None

    def takes(self, shape: Shape, *, slot: bool) -> bool:
        """Whether a request that is next in turn can have a lease now."""
        return (
            self.state == "ready"
            and not (self.oversized and self.active == 0)
            and (not slot or self.slots_busy < self.plan.slots)
            and serves(self.shape, shape)
        )


class Keeper(Protocol):
    """Who gave the lease; the fleet."""

    def released(self, resident: Resident, run: Run | None) -> None: ...

    def died(self, resident: Resident, error: OllamaDistributedError) -> None: ...


class Lease:
    """A runner that will not be unloaded until `release`; with a slot, if one was asked for."""

    __slots__ = ("_alone", "_crowds", "_keeper", "_resident", "_run", "plan", "ready_at", "runner")

    def __init__(self, keeper: Keeper, resident: Resident, runner: Runner, run: Run | None) -> None:
        self._keeper = keeper
        self._resident: Resident | None = resident
        self._run = run
        self._alone = run is not None and resident.slots_busy == 1
        self._crowds = resident.crowds
        self.runner = runner
        self.plan = resident.plan
        self.ready_at = resident.ready_at

    def heard(self) -> None:
        """The runner gave a sign of life."""
        if self._resident is not None:
            self._resident.heard = True

    @property
    def resident(self) -> Resident | None:
        """None: it was given back."""
        return self._resident

    def answered(self, tokens: int) -> None:
        """The answer has ended well, and has so many."""
        if self._run is not None:
            self._run.tokens = tokens

    @property
    def alone(self) -> Resident | None:
        """The resident, if nobody else has generated on it since this lease began."""
        resident = self._resident
        return resident if resident and self._alone and resident.crowds == self._crowds else None

    def release(self) -> None:
        """Idempotent."""
        resident, self._resident = self._resident, None
        if resident is not None:
            self._keeper.released(resident, self._run)

    def broken(self, error: RunnerDied) -> None:
        """The runner died under this request: release, and let nobody have it again."""
        resident = self._resident
        if resident is not None:
            self._keeper.died(resident, error)
        self.release()


class Ticket:
    """One request's place in the queue of its model; a `base.queue.Waiter`."""

    __slots__ = ("ask", "cost", "future", "keep_alive_s", "number", "shape", "slot", "spec")

    def __init__(
        self,
        number: int,
        spec: ModelSpec,
        shape: Shape,
        keep_alive_s: float | None,
        slot: bool,
        ask: Ask = ANYONE,
    ) -> None:
        self.number = number
        self.spec = spec
        self.shape = shape
        self.keep_alive_s = keep_alive_s
        self.slot = slot
        self.ask = ask
        self.cost = 1.0
        self.future: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()

    def refuse(self, error: OllamaDistributedError) -> None:
        if not self.future.done():
            self.future.set_exception(error)
