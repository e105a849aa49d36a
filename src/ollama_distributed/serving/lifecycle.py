"""The life of the models in this node's memory: loading, ready, unloading, gone.

Does what was decided and says what came of it; of those who wait it knows nothing. A runner that is
gone without our will is counted once (`quarantine.py`), however many requests saw it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from functools import partial
from typing import Any, Protocol

import structlog

from ollama_distributed.base.clock import Clock
from ollama_distributed.base.errors import EngineError, OllamaDistributedError
from ollama_distributed.serving.loading import end_runner, load_runner
from ollama_distributed.serving.ports import Engine, Runner
from ollama_distributed.serving.quarantine import Quarantine
from ollama_distributed.serving.residents import LoadKey, Resident
from ollama_distributed.serving.settings import ServingSettings
from ollama_distributed.serving.watch import watch

log = structlog.get_logger(__name__)

LOADING, WATCHING, UNLOADING = "loading", "watching", "unloading"
"""Names of the tasks."""


class Owner(Protocol):
    """Who decides; the fleet."""

    def loaded(self, resident: Resident) -> None: ...

    def refused(self, resident: Resident, error: OllamaDistributedError) -> None:
        """It could not be loaded; its room is free."""
        ...

    def freed(self) -> None:
        """One is gone."""
        ...


class Lifecycle:
    def __init__(self, owner: Owner, clock: Clock, quarantine: Quarantine, settings: ServingSettings) -> None:
        self._owner = owner
        self._clock = clock
        self._quarantine = quarantine
        self._settings = settings
        self._tasks: set[asyncio.Task[None]] = set()
        self.residents: dict[LoadKey, Resident] = {}
        """Changed here only."""

    def configure(self, settings: ServingSettings) -> None:
        """Use other settings from now on."""
        self._settings = settings

    def load(self, resident: Resident, engine: Engine) -> None:
        self.residents[resident.key] = resident
        self._spawn(self._load(resident, engine), LOADING)

    async def _load(self, resident: Resident, engine: Engine) -> None:
        started, name = self._clock.monotonic(), resident.spec.display
        stall_s = self._settings.load_timeout_s
        try:
            runner = await load_runner(engine, resident.spec, resident.plan, stall_s)
        except OllamaDistributedError as error:
            log.warning("serving.load_failed", model=name, reason=error.message)
            self._remove(resident)
            if isinstance(error, EngineError):
                self._quarantine.crashed(resident.key, resident.spec, error.message)
            self._owner.refused(resident, error)
            return
        except asyncio.CancelledError:
            self._remove(resident)
            raise
        now = self._clock.monotonic()
        log.info("serving.loaded", model=name, took_s=round(now - started, 3), threads=resident.plan.threads)
        resident.runner, resident.state, resident.last_used = runner, "ready", now
        resident.ready_at = now
        runner.on_exit(partial(self._exited, resident))
        self._owner.loaded(resident)

    def look_after(self, resident: Resident) -> None:
        """See that its runner answers, from its first request on. Once."""
        resident.watch = self._spawn(watch(resident, self._settings.quiet_s), WATCHING)

    def _exited(self, resident: Resident, error: OllamaDistributedError | None) -> None:
        if error is not None:
            self.died(resident, error)
        elif resident.state == "ready":
            self._remove(resident)
            self._owner.freed()

    def died(self, resident: Resident, error: OllamaDistributedError) -> None:
        """The runner is gone without our will. Idempotent."""
        if resident.state != "ready":
            return
        log.error("serving.runner_died", model=resident.spec.display, reason=error.message)
        self._remove(resident)
        self._quarantine.crashed(resident.key, resident.spec, error.message)
        if resident.runner is not None:
            self._spawn(self._end(resident, resident.runner), UNLOADING)
        self._owner.freed()

    def unload(self, resident: Resident) -> None:
        """Of a ready one."""
        assert resident.state == "ready"
        assert resident.runner is not None
        resident.state = "unloading"
        resident.forget()
        self._spawn(self._end(resident, resident.runner), UNLOADING)

    async def _end(self, resident: Resident, runner: Runner) -> None:
        name = resident.spec.display
        try:
            await end_runner(runner, name, self._settings.unload_timeout_s)
        finally:
            if resident.state == "unloading":
                log.info("serving.unloaded", model=name)
                self._remove(resident)
            self._owner.freed()

    def _remove(self, resident: Resident) -> None:
        resident.state = "gone"
        resident.forget()
        if self.residents.get(resident.key) is resident:
            del self.residents[resident.key]

    async def unload_all(self) -> None:
        """End all runners and all loads, whoever uses them. Nothing may be loaded any more."""
        for task in [task for task in self._tasks if task.get_name() != UNLOADING]:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for resident in tuple(self.residents.values()):
            self.unload(resident)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
