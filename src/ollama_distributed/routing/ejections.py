"""What this gateway keeps of replicas that failed, and the probes that bring them back.

`health.py` decides; here are the clock, the dice and the log. A probe is one token of the model
itself, since a node whose loop and `/health` answer may have a runner that does not.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import anyio
import msgspec
import structlog

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import (
    DeadlineExceeded,
    LoadFailed,
    OllamaDistributedError,
    Quarantined,
    RunnerDied,
    Unavailable,
)
from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.routing import Circuit
from ollama_distributed.routing.health import Health
from ollama_distributed.routing.plan import Dice, Standing

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

FAILURES = (Unavailable, DeadlineExceeded, RunnerDied, LoadFailed, Quarantined)
"""Of a replica. That a node is full, or lacks the model after all, is none."""
TURN_S = 0.5
PROBE_S = 30.0
"""It may have to load the model first."""

Probe = Callable[[NodeId, str], Awaitable[None]]
"""One token of a model on a node; raises what went wrong."""


class Ejections:
    """Of one gateway; `routing.service.Router` asks and tells."""

    def __init__(self, clock: Clock, dice: Dice) -> None:
        self._clock = clock
        self._dice = dice
        self._health = Health()
        self._news = anyio.Event()
        """Something failed."""

    def judged(self, holders: Sequence[Standing], key: str) -> Sequence[Standing]:
        """With those shunned that failed lately; nearly always none. `key`: the model."""
        if not self._health:
            return holders
        now = self._clock.monotonic()
        return [
            msgspec.structs.replace(one, shunned=True)
            if self._health.shunned((one.node, key), now, self._chance)
            else one
            for one in holders
        ]

    def note(self, node: NodeId, key: str, error: OllamaDistributedError | None) -> None:
        """How a replica did; None: it answers."""
        if error is None:
            if self._health and self._health.well((node, key), self._clock.monotonic()):
                log.info("routing.well_again", node=node, model=key)
        elif isinstance(error, FAILURES):
            self._failed(node, key, error.code, error.message)

    def stalled(self, node: NodeId, key: str) -> None:
        self._failed(node, key, "stalled", "it said nothing any more")

    def slow(self, node: NodeId, key: str) -> None:
        self._failed(node, key, "slow", "it speaks much slower than before, or than its peers")

    def circuit(self, node: NodeId, key: str) -> tuple[Circuit, str]:
        """What others call a circuit breaker's state, and the code of what opened it last."""
        return self._health.circuit((node, key), self._clock.monotonic())

    def _failed(self, node: NodeId, key: str, code: str, reason: str) -> None:
        self._news.set()
        if self._health.failed((node, key), self._clock.monotonic(), code):
            log.warning("routing.ejected", node=node, model=key, code=code, reason=reason)

    def _chance(self) -> float:
        return self._dice(1000) / 1000

    async def probe(self, probe: Probe, known: Callable[[tuple[NodeId, str]], bool]) -> None:
        """Until it is cancelled: probe those whose time is over. `known`: it is a replica still."""
        async with anyio.create_task_group() as probing:
            while True:
                if not self._health:
                    self._news = anyio.Event()
                    await self._news.wait()
                await anyio.sleep(TURN_S)
                self._health.forget(known)
                for node, key in self._health.due(self._clock.monotonic()):
                    probing.start_soon(self._one, probe, node, key)

    async def _one(self, probe: Probe, node: NodeId, key: str) -> None:
        try:
            with anyio.fail_after(PROBE_S):
                await probe(node, key)
        except TimeoutError:
            self.note(node, key, DeadlineExceeded("the probe took too long"))
        except OllamaDistributedError as error:
            # A refusal for another reason, that it is full perhaps, is an answer.
            self.note(node, key, error if isinstance(error, FAILURES) else None)
        except Exception:
            log.exception("routing.probe_defect", node=node, model=key)
            self.note(node, key, Unavailable("the probe broke"))
        else:
            self.note(node, key, None)
