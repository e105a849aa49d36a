"""What a runner can do when it has been taken over: a child in the very cage of one tries (ADR 28).

Security table, zero-trust rules and S-13. What the kernel of this machine does not give is not asked.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests import caged
from tests.integration.llamacpp_programs import PROGRAMS, program_named
from tests.limits import SOON_S
from tests.models import HELLO, Models, model_spec

from ollama_distributed.adapters.engines.llamacpp import discover, stderr
from ollama_distributed.adapters.engines.llamacpp.engine import LlamaCppEngine
from ollama_distributed.adapters.engines.llamacpp.process import RUNNER
from ollama_distributed.adapters.engines.llamacpp.sandbox import calls, plan
from ollama_distributed.adapters.engines.llamacpp.sandbox.kernel import Kernel, kernel
from ollama_distributed.adapters.engines.llamacpp.sandbox.plan import NO_SANDBOX, Sandbox
from ollama_distributed.adapters.engines.llamacpp.selftest import self_test
from ollama_distributed.base.errors import LoadFailed
from ollama_distributed.base.inference import Sampling
from ollama_distributed.serving.ports import CompletionRequest, LoadPlan
from ollama_distributed.testing.recording import Recording

pytestmark = [pytest.mark.integration, pytest.mark.anyio]

PLAN = LoadPlan(slots=1, context_tokens=512, threads=1)
FILES, CALLS = bool(kernel().landlock), bool(kernel().seccomp)
needs_files = pytest.mark.skipif(not FILES, reason="this kernel has no Landlock")
needs_calls = pytest.mark.skipif(not CALLS, reason="this kernel has no seccomp filters")

MAY = {
    *("read the model", "write in its folder", "listen in its folder", "start a thread", "look at itself"),
    "import",
}  # fmt: skip
BY_FILES = {
    *("write the model", "read a secret", "write a secret", "remove a secret", "list the secrets"),
    *("make a file beside", "link a secret", "read passwords", "read the parent's environment"),
}  # fmt: skip
BY_CALLS = {
    *("connect by TCP", "connect by UDP", "connect by IPv6", "connect to a UNIX socket"),
    *("connect with an older socket", "fork", "start a program", "signal the parent", "io_uring"),
    *("attach to the parent", "send to a UNIX socket", "have the parent signalled"),
    *("have a thread of it signalled", "have it signalled by ioctl"),
    # Landlock looks at what a file holds, not at whose it is and who may.
    *("open a secret to all", "open the model to all", "give a secret away", "date a secret"),
    "cut a secret",  # nor, before its third version, at its length
}  # fmt: skip


class Outside:
    """A node's secrets, and doors that somebody else has open."""

    def __init__(self, folder: Path) -> None:
        self.own = folder / "run-1"
        self.secret = folder / "data" / "admin.json"
        self.model = folder / "model.gguf"
        self.own.mkdir()
        self.secret.parent.mkdir()
        self.secret.write_text("the key of the CA")
        self.model.write_bytes(b"GGUF" * 8)
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.door = socket.socket(socket.AF_UNIX)
        self.door.bind(str(folder / "door.sock"))
        self.door.listen()
        self.mailbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.mailbox.bind(str(folder / "mailbox.sock"))

    def close(self) -> None:
        self.tcp.close()
        self.mailbox.close()
        self.door.close()

    def attempts(self, cage: dict[str, Any] | None) -> dict[str, str]:
        told = {
            "runner": str(RUNNER), "cage": cage, "secret": str(self.secret), "own": str(self.own),
            "model": str(self.model), "port": self.tcp.getsockname()[1], "door": self.door.getsockname(),
            "mailbox": self.mailbox.getsockname(),
        }  # fmt: skip
        child = subprocess.run(
            [sys.executable, "-I", caged.__file__],
            input=json.dumps(told), capture_output=True, text=True, timeout=SOON_S, check=False,
        )  # fmt: skip
        assert child.returncode == 0, child.stderr
        found: dict[str, str] = json.loads(child.stdout)
        return found


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Outside]:
    one = Outside(tmp_path)
    yield one
    one.close()


@needs_files
@needs_calls
def test_s13_a_runner_that_was_taken_over_reaches_nothing(outside: Outside) -> None:
    before = outside.secret.stat()
    found = outside.attempts(Sandbox("on").cage(outside.own, [str(outside.model)]))
    assert set(found) == MAY | BY_FILES | BY_CALLS
    assert {name for name, end in found.items() if end == "done"} == MAY
    after = outside.secret.stat()
    assert (after.st_mode, after.st_mtime, after.st_ctime) == (
        before.st_mode,
        before.st_mtime,
        before.st_ctime,
    )
    assert outside.secret.read_text() == "the key of the CA"
    assert [path.name for path in outside.secret.parent.iterdir()] == ["admin.json"]


@needs_calls
def test_s13_without_landlock_it_still_reaches_nobody(outside: Outside) -> None:
    """An older kernel: files are as open as to the node, the network and other processes are not."""
    cage = Sandbox("auto", known=Kernel(0, kernel().seccomp)).cage(outside.own, [str(outside.model)])
    found = outside.attempts(cage)
    assert {name for name in BY_CALLS if found[name] == "done"} == set()
    assert found["read a secret"] == "done"


@needs_files
def test_s13_without_seccomp_it_still_reads_nothing(outside: Outside) -> None:
    cage = Sandbox("auto", known=Kernel(kernel().landlock, "")).cage(outside.own, [str(outside.model)])
    found = outside.attempts(cage)
    assert {name for name in BY_FILES if found[name] == "done"} == set()
    assert {name for name in MAY if found[name] != "done"} == set()
    if kernel().landlock >= 4:
        assert found["connect by TCP"] == "EACCES"
    if kernel().landlock >= 6:
        assert found["signal the parent"] == "EPERM"


@needs_files
def test_a_cage_that_cannot_be_set_up_ends_the_runner(outside: Outside) -> None:
    """Never silently without one: whether it can is found out when the node starts."""
    cage = Sandbox("auto").cage(outside.own)
    assert cage is not None
    cage["landlock"] |= {"files": 1 << 60}
    task = {
        "task": "info",
        "guard": {"parent_pid": os.getpid(), "address_space_bytes": None, "open_files": 64},
    }
    child = subprocess.run(
        [sys.executable, "-I", str(RUNNER)],
        input=json.dumps(task | {"cage": cage}), capture_output=True, text=True, timeout=SOON_S, check=False,
    )  # fmt: skip
    assert child.returncode == 1
    assert child.stdout == ""
    assert (
        stderr.reason(child.stderr)
        == "the sandbox cannot be set up: landlock_create_ruleset: Invalid argument"
    )


@needs_files
async def test_a_machine_that_breaks_the_cage_goes_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto`, and said so; `on` does not start."""
    monkeypatch.setattr(plan, "handled", lambda _version: {"files": 1 << 60, "tcp": 0, "scopes": 0})
    assert not (await discover.wheel()).caged
    with pytest.raises(LoadFailed, match="the sandbox cannot be set up"):
        await discover.wheel("on")


def status_of(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text(encoding="ascii")


@pytest.fixture(params=PROGRAMS)
async def engine(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[LlamaCppEngine]:
    made = LlamaCppEngine(await program_named(request.param), runtime_dir=tmp_path / "run")
    yield made
    await made.close()


async def test_s13_a_caged_runner_loads_and_answers(engine: LlamaCppEngine, models: Models) -> None:
    held = await engine.load(model_spec(models.scripted()), PLAN)
    recording = Recording()
    held.generate(CompletionRequest(prompt="go\n", sampling=Sampling(temperature=0.0)), recording)
    await recording.done()
    assert recording.text == HELLO
    status = dict(line.split(":\t") for line in status_of(held.process.pid).splitlines())
    if FILES or CALLS:
        assert status["NoNewPrivs"] == "1"
        assert int(status["CapEff"], 16) & ~(1 << 2 | 1 << 14) == 0
    if CALLS:
        assert status["Seccomp"] == "2"
    assert held.info.sandbox == engine.sandbox.kept


async def test_off_gives_up_nothing(tmp_path: Path, models: Models) -> None:
    engine = LlamaCppEngine(await program_named("wheel"), runtime_dir=tmp_path, sandbox="off")
    held = await engine.load(model_spec(models.scripted()), PLAN)
    assert "NoNewPrivs:\t0" in status_of(held.process.pid)
    assert held.info.sandbox == NO_SANDBOX
    await engine.close()


@needs_files
async def test_a_llama_server_that_the_sandbox_breaks_runs_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto`, and said so (`caged`); `on` refuses it."""
    tested: list[str] = []

    async def fails_in_a_cage(_program: Any, *, runtime_dir: Path | None, sandbox: str) -> None:
        tested.append(sandbox)
        if sandbox != "off":
            raise LoadFailed("error while loading shared libraries")

    binary = tmp_path / "llama-server"
    binary.write_text("#!/bin/sh\necho 'version: 1 (build 11669)'\n")
    binary.chmod(0o755)
    monkeypatch.setattr(discover, "self_test", fails_in_a_cage)
    cache = tmp_path / "cache"
    choice = await discover.choose(configured=binary, cache_dir=cache)
    assert not choice.program.caged
    assert tested == ["auto", "off"]
    assert LlamaCppEngine(choice.program, sandbox="auto").info.sandbox == NO_SANDBOX
    assert (await discover.choose(configured=binary, cache_dir=cache)) == choice
    assert tested == ["auto", "off"], "the verdict was kept"
    with monkeypatch.context() as newer:
        forbidden = calls._FORBIDDEN | {"getcpu": (309, 168)}
        newer.setattr(calls, "_FORBIDDEN", forbidden)
        newer.setattr(plan, "machine_rules", lambda **_: [("/opt", 1)])
        assert (await discover.choose(configured=binary, cache_dir=cache)) == choice
    assert tested[2:] == ["auto", "off"], "and made anew where the sandbox is another one"
    del tested[2:]
    with pytest.raises(LoadFailed, match="shared libraries"):
        await discover.choose(configured=binary, cache_dir=cache, sandbox="on")
    assert tested[2:] == ["on"], "a verdict holds for the sandbox it was made in"


async def test_a_gpu_that_only_shows_itself_outside_goes_without_a_sandbox(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wheel = await discover.wheel()

    async def asked(sandbox: str, *, gpu: bool) -> Any:
        assert gpu
        devices = ("NVIDIA H200",) if sandbox == "off" else ()
        return msgspec.structs.replace(wheel, devices=devices)

    monkeypatch.setattr(discover, "gpu_here", lambda: True)
    monkeypatch.setattr(discover, "_asked", asked)
    found = await discover.wheel("auto")
    assert found.devices == ("NVIDIA H200",)
    assert not found.caged
    with pytest.raises(LoadFailed, match="NVIDIA H200"):
        await discover.wheel("on")


async def test_the_wheel_passes_its_self_test_in_the_strictest_cage(tmp_path: Path) -> None:
    if FILES and CALLS:
        await self_test(await discover.wheel("on"), runtime_dir=tmp_path, sandbox="on")
