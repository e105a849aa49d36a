"""Proves a program before a user's model depends on it: load, exact answer, clean end.

A binary built for another CPU dies with SIGILL, one built by a broken compiler answers
wrongly (DESIGN.md, "Inference engine": AMX by gcc 12 crashes at load). Both show here.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from ollama_distributed.adapters.engines.llamacpp.engine import LlamaCppEngine
from ollama_distributed.adapters.engines.llamacpp.process import private_folder
from ollama_distributed.adapters.engines.llamacpp.program import Program
from ollama_distributed.adapters.engines.llamacpp.runner_port import LlamaCppRunner
from ollama_distributed.adapters.engines.llamacpp.sandbox.plan import Mode
from ollama_distributed.base.errors import DeadlineExceeded, EngineError, OllamaDistributedError
from ollama_distributed.base.inference import Sampling
from ollama_distributed.base.tokens import Done, EngineEvent, EngineFailed, Tokens
from ollama_distributed.models.scripted import scripted_model
from ollama_distributed.models.spec import Architecture, ModelSpec
from ollama_distributed.serving.ports import CompletionRequest, LoadPlan

ANSWER = "The quick brown fox jumps over the lazy dog, 1234567890 times ✓."
PLAN = LoadPlan(slots=1, context_tokens=512, threads=1)
DEADLINE_S = 60.0
"""For the whole test; it takes 0.3 s on an idle machine."""


async def self_test(program: Program, *, runtime_dir: Path | None = None, sandbox: Mode = "auto") -> None:
    """Returns when the program works in this sandbox.

    Raises:
        EngineError: it does not; the message says how.
    """
    folder = await asyncio.to_thread(private_folder, runtime_dir)
    weights = folder / "scripted.gguf"
    engine = LlamaCppEngine(program, runtime_dir=runtime_dir, load_deadline_s=DEADLINE_S, sandbox=sandbox)
    try:
        await asyncio.to_thread(weights.write_bytes, scripted_model(ANSWER))
        async with asyncio.timeout(DEADLINE_S):
            runner = await engine.load(scripted_spec(weights), PLAN)
            answer = await _answer(runner)
            if answer != ANSWER:
                raise EngineError(f"it answered {answer[:80]!r} where {ANSWER!r} is certain")
            await runner.unload(grace_s=5.0)
            returncode = runner.process.exited.result()
            if program.variant != "wheel" and returncode not in (0, -15):
                raise EngineError(f"it ended badly: {runner.process.how_it_ended()}")
    except TimeoutError as exc:
        raise EngineError(f"it did not finish the self-test within {DEADLINE_S:g} s") from exc
    except DeadlineExceeded as exc:
        raise EngineError(exc.message) from exc
    finally:
        await engine.close()
        await asyncio.to_thread(_remove, folder)


async def _answer(runner: LlamaCppRunner) -> str:
    ended: asyncio.Future[OllamaDistributedError | None] = asyncio.get_running_loop().create_future()
    parts: list[str] = []

    def sink(event: EngineEvent) -> None:
        match event:
            case Tokens():
                parts.append(event.text)
            case Done():
                ended.set_result(None)
            case EngineFailed(error):
                ended.set_result(error)
            case _:
                pass

    sampling = Sampling(temperature=0.0, num_predict=200)
    call = runner.generate(CompletionRequest(prompt="Say it.\n", sampling=sampling), sink)
    try:
        error = await ended
    finally:
        call.cancel()
    if error is not None:
        raise error
    return "".join(parts)


def scripted_spec(weights: Path) -> ModelSpec:
    """The spec of a scripted model's file."""
    return ModelSpec(
        name="self-test",
        display="self-test",
        digest="0" * 64,
        size_bytes=0,
        modified_at=0.0,
        architecture=Architecture(
            name="llama",
            layers=1,
            context_tokens=2048,
            embedding_length=256,
            heads=4,
            kv_heads=4,
            key_length=64,
            value_length=64,
            parameters=0,
            file_type="F32",
        ),
        weights=str(weights),
    )


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
