"""Loads and ends one runner, with a deadline, whatever the engine does."""

from __future__ import annotations

import anyio
import structlog

from ollama_distributed.base.errors import LoadFailed, OllamaDistributedError
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.serving.ports import Engine, LoadPlan, Runner

log = structlog.get_logger(__name__)


async def load_runner(engine: Engine, spec: ModelSpec, plan: LoadPlan, stall_s: float) -> Runner:
    """A runner that answers. Cancel-safe, as the engine's `load` is.

    Raises:
        LoadFailed: the engine's reason, no progress for `stall_s`, or a defect of the engine.
        OllamaDistributedError: what else the engine says.
    """
    name = spec.display
    try:
        with anyio.fail_after(stall_s) as scope:

            def progressed(_: float) -> None:
                scope.deadline = anyio.current_time() + stall_s

            return await engine.load(spec, plan, progressed)
    except TimeoutError:
        raise LoadFailed(f"{name} made no progress loading for {stall_s:.0f} s") from None
    except OllamaDistributedError:
        raise
    except Exception as exc:
        # A defect of an engine must not leave the requests hanging; the log has it whole.
        log.exception("serving.load_defect", model=name)
        raise LoadFailed(f"the engine failed to load {name}; see the node's log") from exc


async def end_runner(runner: Runner, name: str, deadline_s: float) -> None:
    """End it; one that will not, or fails to, is left to the engine and to the log."""
    try:
        with anyio.move_on_after(deadline_s) as scope:
            await runner.unload()
        if scope.cancelled_caught:
            log.error("serving.unload_stuck", model=name)
    except Exception:
        log.exception("serving.unload_failed", model=name)
