"""The runner process: its death, its parent's death, its secrets, its command line."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import psutil
import pytest
from tests.integration.llamacpp_programs import PROGRAMS, program_named
from tests.limits import SOON_S
from tests.models import EMOJI, SMOLLM2, Models, model_spec

from ollama_distributed.adapters.engines.llamacpp import discover
from ollama_distributed.adapters.engines.llamacpp.engine import LlamaCppEngine
from ollama_distributed.adapters.engines.llamacpp.runner_port import LlamaCppRunner
from ollama_distributed.adapters.engines.llamacpp.selftest import self_test
from ollama_distributed.adapters.engines.llamacpp.threads import can_tell
from ollama_distributed.base.errors import (
    EngineError,
    Invalid,
    LoadFailed,
    OllamaDistributedError,
    RunnerDied,
    Unavailable,
)
from ollama_distributed.base.inference import JsonSchema, Sampling
from ollama_distributed.models.scripted import script_pieces
from ollama_distributed.serving.ports import CompletionRequest, LoadPlan
from ollama_distributed.testing.recording import Recording

pytestmark = [pytest.mark.integration, pytest.mark.anyio]

PLAN = LoadPlan(slots=2, context_tokens=8192, threads=1)
Loader = Callable[[Path], Awaitable[LlamaCppRunner]]


@pytest.fixture(params=PROGRAMS)
async def load(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Loader]:
    engine = LlamaCppEngine(await program_named(request.param), runtime_dir=tmp_path / "run")
    yield lambda path: engine.load(model_spec(path), PLAN)
    await engine.close()
    assert not left_in(tmp_path / "run")


def say(prompt: str | tuple[str | tuple[int, ...], ...] = "go\n") -> CompletionRequest:
    return CompletionRequest(prompt=prompt, sampling=Sampling(temperature=0.0))


async def gone(pid: int) -> None:
    deadline = time.monotonic() + SOON_S
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"process {pid} lives on"
        await asyncio.sleep(0.01)


def left_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


# ── whom the kernel runs first ──────────────────────────────────────────────────────


@pytest.mark.skipif(not can_tell(os.getpid()), reason="this system does not tell what threads spend")
async def test_threads_that_compute_let_others_first(load: Loader, models: Models) -> None:
    runner = await load(models.endless())

    def policies() -> list[int]:
        tasks = Path(f"/proc/{runner.process.pid}/task")
        return [os.sched_getscheduler(int(task.name)) for task in tasks.iterdir()]

    assert os.SCHED_BATCH not in policies()
    asked = CompletionRequest(prompt="go\n", sampling=Sampling(num_predict=512))
    while os.SCHED_BATCH not in policies():
        runner.generate(asked, heard := Recording())
        await heard.done()
    assert policies().count(os.SCHED_OTHER) > policies().count(os.SCHED_BATCH), "who reads and writes goes on"


# ── death ───────────────────────────────────────────────────────────────────────────


async def test_a_death_is_seen_at_once_by_every_call(load: Loader, models: Models) -> None:
    runner = await load(models.endless())
    told: list[OllamaDistributedError | None] = []
    runner.on_exit(told.append)
    calls = [Recording() for _ in range(2)]
    for recording in calls:
        runner.generate(say(), recording)
    for recording in calls:
        await recording.pieces(2)
    os.kill(runner.process.pid, signal.SIGKILL)
    for recording in calls:
        error = (await recording.failed()).error
        assert isinstance(error, RunnerDied)
        assert "SIGKILL" in error.message
    (reason,) = told
    assert isinstance(reason, RunnerDied)
    late = Recording()
    runner.generate(say(), late)
    assert isinstance((await late.failed()).error, RunnerDied)
    with pytest.raises(RunnerDied):
        await runner.tokenize("x")


async def test_a_lost_connection_is_not_the_death_of_a_runner(load: Loader, models: Models) -> None:
    runner = await load(models.endless())
    lost, other = Recording(), Recording()
    call = runner.generate(say(), lost)
    runner.generate(say(), other)
    for recording in (lost, other):
        await recording.pieces(2)
    assert call._exchange is not None
    assert call._exchange._transport is not None
    call._exchange._transport.abort()
    error = (await lost.failed()).error
    assert isinstance(error, Unavailable)
    assert not isinstance(error, RunnerDied)
    await other.pieces(len(other.events) + 2)
    while not await runner.healthy():  # it has a second, which a slow machine may take for itself
        pass


async def test_no_zombie_and_no_file_is_left(load: Loader, models: Models) -> None:
    runner = await load(models.scripted("fine"))
    pid, folder = runner.process.pid, runner.process.folder
    await runner.unload()
    assert not psutil.pid_exists(pid)
    assert not folder.exists()


async def test_a_runner_that_ignores_sigterm_is_killed(load: Loader, models: Models) -> None:
    runner = await load(models.scripted("fine"))
    os.kill(runner.process.pid, signal.SIGSTOP)
    await runner.unload(grace_s=0.2)  # stopped, it would never end by itself
    assert not psutil.pid_exists(runner.process.pid)


async def test_a_cancelled_load_leaves_nothing(tmp_path: Path, models: Models) -> None:
    engine = LlamaCppEngine(await program_named("wheel"), runtime_dir=tmp_path)
    before = {p.pid for p in psutil.Process().children()}
    loading = asyncio.create_task(engine.load(model_spec(models.scripted("fine")), PLAN))
    await asyncio.sleep(0)
    assert left_in(tmp_path)
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    assert not left_in(tmp_path)
    assert {p.pid for p in psutil.Process().children()} <= before


async def test_a_load_that_stands_still_is_given_up(tmp_path: Path, models: Models) -> None:
    pipe = tmp_path / "never.gguf"
    os.mkfifo(pipe)  # opening it for reading waits for ever
    engine = LlamaCppEngine(await program_named("wheel"), runtime_dir=tmp_path / "run", load_stall_s=0.5)
    spec = model_spec(pipe, pooling="mean")  # no vocabulary is read
    with pytest.raises(LoadFailed, match="stands still"):
        await engine.load(spec, PLAN)
    assert not left_in(tmp_path / "run")


PARENT = """
import asyncio, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.integration.llamacpp_programs import program_named
from tests.models import model_spec
from ollama_distributed.adapters.engines.llamacpp.engine import LlamaCppEngine
from ollama_distributed.serving.ports import LoadPlan

async def main():
    engine = LlamaCppEngine(await program_named({name!r}), runtime_dir=Path({run!r}))
    plan = LoadPlan(slots=1, context_tokens=512, threads=1)
    runner = await engine.load(model_spec(Path({model!r})), plan)
    print(runner.process.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("name", PROGRAMS)
async def test_a_runner_dies_with_its_parent(tmp_path: Path, models: Models, name: str) -> None:
    root = str(Path(__file__).parents[2])
    code = PARENT.format(root=root, name=name, run=str(tmp_path / "r"), model=str(models.scripted("fine")))
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    async with asyncio.timeout(SOON_S):
        pid = int(await parent.stdout.readline())
    assert psutil.pid_exists(pid)
    parent.kill()
    await parent.wait()
    await gone(pid)


# ── secrets, rights, command line ───────────────────────────────────────────────────


async def test_the_process_shows_no_secret_and_only_we_may_connect(
    load: Loader, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_API_KEY", "canary-of-the-node")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    runner = await load(models.scripted("fine"))
    process = psutil.Process(runner.process.pid)
    shown = " ".join(process.cmdline()) + str(process.environ())
    assert runner._params.api_key not in shown
    assert "canary-of-the-node" not in shown
    assert process.environ()["CUDA_VISIBLE_DEVICES"] == "0"
    assert process.environ()["GGML_NO_BACKTRACE"] == "1"
    folder = runner.process.folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert os.getsid(runner.process.pid) == runner.process.pid
    assert resource.prlimit(runner.process.pid, resource.RLIMIT_CORE) == (0, 0)
    sockets = [c for c in process.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN]
    assert not sockets


FORBIDDEN = (
    *("--slot-save-path", "--sleep-idle-seconds", "--tools", "--agent", "--props", "--ui", "--webui"),
    *("--slots", "--media-path", "--rpc", "--api-key", "--path", "--ui-mcp-proxy", "--mcp-servers-config"),
)


@pytest.mark.skipif("binary" not in PROGRAMS, reason="no llama-server on PATH or in LLAMA_SERVER")
async def test_the_command_line_turns_nothing_dangerous_on(tmp_path: Path, models: Models) -> None:
    engine = LlamaCppEngine(await program_named("binary"), runtime_dir=tmp_path)
    runner = await engine.load(model_spec(models.scripted("fine")), PLAN)
    words = psutil.Process(runner.process.pid).cmdline()
    assert not set(words) & set(FORBIDDEN)
    assert {"--no-slots", "--api-key-file", "--cache-ram"} <= set(words)
    assert {"--no-ui", "--no-webui"} & set(words)
    await engine.close()


# ── exactness ───────────────────────────────────────────────────────────────────────


async def test_ids_that_the_server_withholds_are_found(load: Loader, models: Models) -> None:
    """An emoji of four byte tokens arrives as one event with one id."""
    runner = await load(models.emoji())
    recording = Recording()
    runner.generate(say(), recording)
    done = await recording.done()
    assert recording.text == EMOJI
    assert (
        len(recording.ids) == len(script_pieces(EMOJI)) == done.completion_tokens - 1
    )  # the end's own token
    rest = Recording()
    runner.generate(say(("go\n", tuple(recording.ids[:7]))), rest)
    await rest.done()
    assert rest.ids == recording.ids[7:]


@pytest.mark.skipif(not SMOLLM2.exists(), reason="the real model is not here (make models)")
async def test_ids_of_a_trained_vocabulary_are_complete(load: Loader) -> None:
    """BPE pieces hold parts of characters, also several at once: ` \xf0\x9f` is one token."""
    text = "caf\u00e9 \U0001f600\U0001f680 \u65e5\u672c\u8a9e \U0001f468\u200d\U0001f469"
    runner = await load(SMOLLM2)
    recording = Recording()
    sampling = Sampling(temperature=0.0, num_predict=80)
    runner.generate(
        CompletionRequest(prompt="Repeat:", grammar=f'root ::= "{text}"', sampling=sampling), recording
    )
    done = await recording.done()
    assert recording.text == text
    assert await runner.detokenize(recording.ids) == text
    assert len(recording.ids) == done.completion_tokens - 1


async def test_a_mixed_prompt_is_its_parts(load: Loader, models: Models) -> None:
    runner = await load(models.scripted("fine"))
    text = await runner.tokenize("go\n")
    counts = []
    for prompt in ("go\nab", ("go\n", "ab"), (tuple(text), "ab"), ("go\n", (5 + 0x61, 5 + 0x62))):
        recording = Recording()
        runner.generate(say(prompt), recording)
        counts.append((await recording.done()).prompt_tokens)
    assert counts == [len(text) + 2] * 4


async def test_a_schema_that_cannot_be_kept_is_refused(load: Loader, models: Models) -> None:
    """The wheel logs it and then answers without any constraint."""
    runner = await load(models.scripted("fine"))
    for schema in ({"$ref": "#/nowhere"}, {"type": "blah"}, {"type": "string", "pattern": "("}):
        recording = Recording()
        request = CompletionRequest(prompt="x", format=JsonSchema(schema), sampling=Sampling(num_predict=5))
        runner.generate(request, recording)
        assert isinstance((await recording.failed()).error, Invalid)


async def test_a_schema_is_kept_against_the_models_will(load: Loader, models: Models) -> None:
    runner = await load(models.scripted("fine"))
    recording = Recording()
    request = CompletionRequest(
        prompt="go\n", format=JsonSchema({"const": "no"}), sampling=Sampling(temperature=0)
    )
    runner.generate(request, recording)
    await recording.done()
    assert recording.text == '"no"'


async def test_a_schema_with_unknown_keywords_still_binds(load: Loader, models: Models) -> None:
    """llguidance drops the whole schema for a keyword it does not know, unless told otherwise."""
    runner = await load(models.random())
    schema = {
        "type": "object",
        "properties": {"a": {"oneOf": [{"const": "x"}, {"const": "y"}]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
        "additionalProperties": False,
        "x-guidance": {"lenient": False},
        "$comment": "kept",
        "readOnly": True,
    }
    for seed in range(3):
        recording = Recording()
        sampling = Sampling(temperature=1.0, seed=seed, num_predict=400)
        request = CompletionRequest(prompt="go\n", format=JsonSchema(schema), sampling=sampling)
        runner.generate(request, recording)
        await recording.done()
        assert json.loads(recording.text)["a"] in ("x", "y")


# ── choosing ────────────────────────────────────────────────────────────────────────


def fake_server(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="ascii")
    path.chmod(0o755)
    return path


async def test_a_bad_binary_is_refused_with_the_reason_and_the_wheel_serves(tmp_path: Path) -> None:
    fake_server(tmp_path / "bin" / "llama-server", "echo '--model FNAME'")
    cache = tmp_path / "cache"
    fake_server(cache / "b1" / "llama-server", "kill -ILL $$")
    fake_server(cache / "unfinished" / "llama-server", "exit 0")
    (cache / "b1" / "engine.json").write_text('{"version": "b1"}', encoding="ascii")
    choice = await discover.choose(
        cache_dir=cache, search_path=str(tmp_path / "bin"), runtime_dir=tmp_path / "r"
    )
    assert choice.program.variant == "wheel"
    assert choice.program.instruction_set
    reasons = {Path(r.path).parent.name: r.reason for r in choice.refused}
    assert "does not know" in reasons["bin"]
    assert "failed" in reasons["b1"]
    assert set(reasons) == {"bin", "b1"}
    # The verdicts are kept: the binaries are not started again.
    for path in (tmp_path / "bin" / "llama-server", cache / "b1" / "llama-server"):
        facts = path.stat()
        path.write_bytes(b"#!/bin/sh\ntouch ran\n".ljust(facts.st_size, b"\n")[: facts.st_size])
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    again = await discover.choose(
        cache_dir=cache, search_path=str(tmp_path / "bin"), runtime_dir=tmp_path / "r"
    )
    assert again == choice


async def test_a_configured_binary_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match="configured"):
        await discover.choose(configured=tmp_path / "none", search_path="")


@pytest.mark.skipif("binary" not in PROGRAMS, reason="no llama-server on PATH or in LLAMA_SERVER")
async def test_a_good_binary_is_chosen(tmp_path: Path) -> None:
    binary = (await program_named("binary")).path
    choice = await discover.choose(
        configured=Path(binary), cache_dir=tmp_path / "c", runtime_dir=tmp_path / "r"
    )
    assert choice.program.path == binary
    assert not choice.refused


async def test_the_self_test_needs_the_exact_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = await program_named("wheel")
    await self_test(program, runtime_dir=tmp_path)
    monkeypatch.setattr(
        "ollama_distributed.adapters.engines.llamacpp.selftest.scripted_model", _another_model
    )
    with pytest.raises(EngineError, match=r"it answered 'Something else\.'"):
        await self_test(program, runtime_dir=tmp_path)
    assert not left_in(tmp_path)


def _another_model(_text: str) -> bytes:
    from ollama_distributed.models.scripted import scripted_model

    return scripted_model("Something else.")
