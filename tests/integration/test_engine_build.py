"""The steps of `engine build` with toy tools: interrupted, failing, locked, damaged."""

# ruff: noqa: ASYNC240 - a test may block its own loop, and polls what has no event

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import stat
import tarfile
from pathlib import Path

import msgspec
import pytest
from tests.limits import SOON_S

from ollama_distributed.adapters.engines.build import plan, service, source
from ollama_distributed.adapters.engines.build.toolchain import Toolchain, find_toolchain, write_wrappers
from ollama_distributed.adapters.engines.llamacpp.discover import BuildInfo
from ollama_distributed.base.errors import Conflict, DigestMismatch, DiskFull, EngineError, Unavailable

pytestmark = [pytest.mark.integration, pytest.mark.anyio]

CPU = plan.Cpu("x86_64", "toy", frozenset({"avx2"}))
KEY = plan.cache_key(CPU)

CMAKE = """#!/bin/sh
echo "-- configuring"; while [ "$1" != -B ]; do shift; done; mkdir -p "$2/bin"
"""
NINJA = """#!/bin/sh
dir="$2"; echo "[1/2] Building"
if [ -e "$dir/../fail" ]; then echo "error: no such header"; exit 3; fi
if [ -e "$dir/../hang" ]; then echo $$ > "$dir/../pid"; sleep 60; fi
echo "program" > "$dir/bin/llama-server"; echo "[2/2] Linking"
"""


@pytest.fixture
def toolchain(tmp_path: Path) -> Toolchain:
    for name, text in (("cmake", CMAKE), ("ninja", NINJA)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return Toolchain((str(tmp_path / "cmake"),), (str(tmp_path / "ninja"),), ("true",), "toy 1")


@pytest.fixture
def engines(tmp_path: Path) -> Path:
    """A folder of builds, with the source already unpacked."""
    tree = tmp_path / "engines" / f"{KEY}.work" / "source"
    tree.mkdir(parents=True)
    (tree / "CMakeLists.txt").touch()
    return tmp_path / "engines"


async def passes(program: Path) -> None:
    assert program.name == "llama-server"


async def fails(program: Path) -> None:
    raise EngineError("it answered nonsense")


async def test_a_build_and_the_next(engines: Path, toolchain: Toolchain) -> None:
    told: list[plan.Progress] = []
    built = await service.build(engines, cpu=CPU, self_test=passes, toolchain=toolchain, report=told.append)
    shares = [p.share for p in told if p.share is not None]
    assert shares == sorted(shares)
    assert [told[0].step, told[-1].step, shares[-1]] == ["configure", "done", 1.0]
    program = Path(built.path)
    assert program == engines / KEY / "llama-server"
    assert program.stat().st_mode & stat.S_IXUSR
    assert (built.instruction_set, built.version, built.compiler) == ("AVX2", "b11549", "toy 1")
    assert sorted(f.name for f in program.parent.iterdir()) == ["build.log", "engine.json", "llama-server"]
    assert "[2/2] Linking" in (program.parent / "build.log").read_text()
    assert sorted(f.name for f in engines.iterdir()) == [KEY, f"{KEY}.lock"]
    told.clear()
    again = await service.build(engines, cpu=CPU, self_test=fails, toolchain=toolchain, report=told.append)
    assert again == built
    assert "there already" in told[-1].message


async def test_a_build_replaces_older_ones_of_its_cpu_only(engines: Path, toolchain: Toolchain) -> None:
    built = await service.build(engines, cpu=CPU, self_test=passes, toolchain=toolchain)
    new = engines / KEY
    for name, cpu in (("older", built.cpu), ("of-another-machine", "a better toy")):
        new.rename(engines / name)
        other = msgspec.structs.replace(built, cpu=cpu)
        (engines / name / "engine.json").write_bytes(msgspec.json.encode(other))
        (engines / f"{KEY}.work" / "source").mkdir(parents=True)
        await service.build(engines, cpu=CPU, self_test=passes, toolchain=toolchain)
    (engines / "something-else").mkdir()
    assert sorted(f.name for f in engines.iterdir() if f.is_dir()) == sorted(
        (KEY, "of-another-machine", "something-else")
    )


async def test_what_discovery_reads(engines: Path, toolchain: Toolchain) -> None:
    await service.build(engines, cpu=CPU, self_test=passes, toolchain=toolchain)
    info = msgspec.json.decode((engines / KEY / "engine.json").read_bytes(), type=BuildInfo)
    assert (info.version, info.instruction_set) == ("b11549", "AVX2")


async def test_a_damaged_build_is_not_used(engines: Path, toolchain: Toolchain) -> None:
    built = await service.build(engines, cpu=CPU, self_test=passes, toolchain=toolchain)
    assert service.find_built(engines, CPU) == built
    Path(built.path).write_text("half")
    assert service.find_built(engines, CPU) is None
    (engines / f"{KEY}.work" / "source").mkdir(parents=True)
    await service.build(engines, cpu=CPU, self_test=passes, toolchain=toolchain)
    assert service.find_built(engines, CPU) is not None


async def test_a_failing_tool_says_what_to_do(engines: Path, toolchain: Toolchain) -> None:
    work = engines / f"{KEY}.work"
    (work / "fail").touch()
    with pytest.raises(EngineError) as failed:
        await service.build(engines, cpu=CPU, self_test=passes, toolchain=toolchain)
    for part in ("compile", "status 3", "no such header", str(work), f"{KEY}.log"):
        assert part in failed.value.message
    (work / "fail").unlink()
    await service.build(engines, cpu=CPU, self_test=passes, toolchain=toolchain)


async def test_a_program_that_fails_its_test_is_not_installed(engines: Path, toolchain: Toolchain) -> None:
    with pytest.raises(EngineError, match="it answered nonsense"):
        await service.build(engines, cpu=CPU, self_test=fails, toolchain=toolchain)
    assert not (engines / KEY).exists()


async def test_cancel_ends_the_tools_and_the_next_call_goes_on(engines: Path, toolchain: Toolchain) -> None:
    work = engines / f"{KEY}.work"
    (work / "hang").touch()
    compiling = asyncio.Event()

    def report(progress: plan.Progress) -> None:
        if progress.message == "1 of 2":
            compiling.set()

    task = asyncio.create_task(
        service.build(engines, cpu=CPU, self_test=passes, toolchain=toolchain, report=report)
    )
    async with asyncio.timeout(SOON_S):
        await compiling.wait()
        while not (work / "pid").exists() or not (work / "pid").read_text().strip():
            await asyncio.sleep(0.01)
    with pytest.raises(Conflict):
        await service.build(engines, cpu=CPU, self_test=passes, toolchain=toolchain)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(ProcessLookupError):
        os.kill(int((work / "pid").read_text()), 0)
    (work / "hang").unlink()
    assert (await service.build(engines, cpu=CPU, self_test=passes, toolchain=toolchain)).path


async def test_a_full_disk_is_said_before_anything(
    engines: Path, toolchain: Toolchain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "NEEDED_DISK_BYTES", 2**60)
    with pytest.raises(DiskFull, match="GB more"):
        await service.build(engines, cpu=CPU, self_test=passes, toolchain=toolchain)


async def test_a_wrong_archive_is_refused(tmp_path: Path, toolchain: Toolchain) -> None:
    (tmp_path / "other.tar.gz").write_bytes(b"other")
    with pytest.raises(DigestMismatch):
        await service.build(
            tmp_path / "engines",
            cpu=CPU,
            self_test=passes,
            toolchain=toolchain,
            archive=tmp_path / "other.tar.gz",
        )


def sdist(path: Path) -> str:
    """A source archive as the index has it; its sha256."""
    root = f"{plan.SOURCE_PACKAGE}-{plan.SOURCE_VERSION}"
    files = {
        "PKG-INFO": f"Metadata-Version: 2.1\nName: {plan.SOURCE_PACKAGE}\nVersion: {plan.SOURCE_VERSION}\n",
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "setuptools.build_meta"\n',
        "setup.py": "raise SystemExit('the source was run')\n",
        f"{plan.SOURCE_TREE}/CMakeLists.txt": "",
    }
    with tarfile.open(path / f"{root}.tar.gz", "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(f"{root}/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return hashlib.sha256((path / f"{root}.tar.gz").read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip looks."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


async def test_pip_fetches_the_source_and_runs_nothing_of_it(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "SOURCE_SHA256", sdist(index))
    got = await source.download(tmp_path)
    source.check(got)
    source.unpack(got, tmp_path / "source")
    assert await source.download(tmp_path) == got
    assert not (tmp_path / "download").exists()


async def test_pip_refuses_another_file(index: Path, tmp_path: Path) -> None:
    sdist(index)
    with pytest.raises(Unavailable, match="--source"):
        await source.download(tmp_path)


async def test_pip_finds_nothing(index: Path, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="pip config list"):
        await source.download(tmp_path)


async def test_the_real_compiler_makes_a_program(tmp_path: Path) -> None:
    """The wrappers, through zig, on one line of C for this machine's CPU."""
    tools = write_wrappers(find_toolchain(), tmp_path / "tools")
    assert len(tools) == 5
    (tmp_path / "a.c").write_text("int main(void) { return 7; }\n")
    flag = f"-mcpu={plan.baseline(service.this_cpu())}"
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "ZIG_GLOBAL_CACHE_DIR": str(tmp_path / "z"),
    }
    compiled = await asyncio.create_subprocess_exec(
        str(tmp_path / "tools" / "cc"),
        flag,
        "-c",
        str(tmp_path / "a.c"),
        "-o",
        str(tmp_path / "a.o"),
        env=environment,
    )
    assert await compiled.wait() == 0
    assert (tmp_path / "a.o").stat().st_size > 0
