"""What `engine build` builds: CPU features to options, key, progress; and what it unpacks."""

from __future__ import annotations

import io
import tarfile
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.adapters.engines.build import plan, source
from ollama_distributed.base.errors import DigestMismatch, Invalid

ROOT = Path(__file__).parents[2]
V3 = "cx16 lahf_lm popcnt sse4_1 sse4_2 ssse3 avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"
ZEN4 = f"{V3} avx512f avx512dq avx512cd avx512bw avx512vl avx512vbmi avx512_vnni avx512_bf16"
SAPPHIRE_RAPIDS = f"{ZEN4} avx_vnni amx_tile amx_int8 amx_bf16"


def x86(flags: str) -> plan.Cpu:
    return plan.Cpu("x86_64", "a CPU", frozenset(flags.split()))


def arm(flags: str) -> plan.Cpu:
    return plan.Cpu("aarch64", "a CPU", frozenset(flags.split()))


def on(cpu: plan.Cpu) -> set[str]:
    return {
        o.removeprefix("-DGGML_").removesuffix("=ON") for o in plan.cmake_options(cpu) if o.endswith("=ON")
    }


def test_the_pinned_source_is_the_locked_wheel() -> None:
    lock = tomllib.loads((ROOT / "uv.lock").read_text())
    (package,) = [p for p in lock["package"] if p["name"] == plan.SOURCE_PACKAGE]
    assert package["version"] == plan.SOURCE_VERSION
    assert package["sdist"]["hash"] == f"sha256:{plan.SOURCE_SHA256}"


@pytest.mark.parametrize(
    ("cpu", "baseline", "label", "pays"),
    [
        (x86("sse2"), "x86_64", "x86_64", False),
        (x86("cx16 lahf_lm popcnt sse4_1 sse4_2 ssse3 avx"), "x86_64_v2", "x86_64", False),
        (x86(V3), "x86_64_v3", "AVX2", False),
        (x86(f"{V3} avx_vnni"), "x86_64_v3", "AVX2 AVX_VNNI", False),
        (x86(ZEN4), "x86_64_v3", "AVX2 AVX512 VBMI VNNI BF16", False),
        (
            x86(SAPPHIRE_RAPIDS),
            "x86_64_v3",
            "AVX2 AVX_VNNI AVX512 VBMI VNNI BF16 AMX AMX_INT8 AMX_BF16",
            True,
        ),
        (arm("asimd"), "generic", "aarch64", False),
        (arm("asimd asimdhp asimddp i8mm"), "generic+fullfp16+dotprod+i8mm", "FP16 DOTPROD I8MM", True),
    ],
)
def test_cpus(cpu: plan.Cpu, baseline: str, label: str, pays: bool) -> None:
    assert plan.baseline(cpu) == baseline
    assert plan.instruction_set(cpu) == label
    assert plan.pays(cpu) is pays
    assert f"-DCMAKE_CXX_FLAGS=-mcpu={baseline}" in plan.cmake_options(cpu)


def test_half_of_a_feature_turns_nothing_on() -> None:
    assert "AVX512" not in on(x86(f"{V3} avx512f"))
    assert "AMX_INT8" not in on(x86(f"{V3} amx_int8"))
    assert {"AVX512", "AVX512_BF16"} <= on(x86(ZEN4))


@given(st.sets(st.sampled_from(SAPPHIRE_RAPIDS.split())))
def test_only_what_the_cpu_has(flags: set[str]) -> None:
    cpu = plan.Cpu("x86_64", "", frozenset(flags))
    needs = {"AVX2": "avx2", "FMA": "fma", "AVX512_VNNI": "avx512_vnni", "AMX_TILE": "amx_tile"}
    assert all(needs[name] in flags for name in on(cpu) & needs.keys())
    assert plan.cache_key(cpu) == plan.cache_key(plan.Cpu("x86_64", "another name", frozenset(flags)))


def test_other_features_other_key() -> None:
    keys = {plan.cache_key(cpu) for cpu in (x86(V3), x86(ZEN4), x86(SAPPHIRE_RAPIDS), arm("asimd"))}
    assert len(keys) == 4


def test_cpuinfo() -> None:
    text = (
        "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2 avx512f\n\n"
        "processor\t: 1\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2\n"
    )
    cpu = plan.parse_cpuinfo(text, "x86_64")
    assert (cpu.model, cpu.features) == ("AMD EPYC", {"fpu", "avx2"})
    assert plan.parse_cpuinfo("Features\t: fp asimd\n", "aarch64").features == {"fp", "asimd"}
    assert plan.parse_cpuinfo("", "aarch64").features == frozenset()


@pytest.mark.parametrize(
    ("cores", "memory", "asked", "jobs"),
    [
        (2, 24 << 30, None, 2),
        (64, 8 << 30, None, 7),
        (4, 24 << 30, 1, 1),
        (8, 0, None, 1),
        (256, 1 << 40, None, 32),
    ],
)
def test_jobs(cores: int, memory: int, asked: int | None, jobs: int) -> None:
    assert plan.jobs(cores, memory, asked) == jobs


def test_progress_of_ninja() -> None:
    first = plan.compile_progress("[1/200] Building CXX object x.o")
    last = plan.compile_progress("[200/200] Linking CXX executable bin/llama-server")
    assert first is not None
    assert last is not None
    assert first.share is not None
    assert last.share is not None
    assert 0 < first.share < last.share < 1
    assert plan.compile_progress("ninja: Entering directory") is None
    assert plan.compile_progress("[0/0] nothing") is None


# ── unpacking ───────────────────────────────────────────────────────────────────────

TREE = f"{plan.SOURCE_PACKAGE}-{plan.SOURCE_VERSION}/{plan.SOURCE_TREE}"


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, 0o6777
    return info


def archive(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for info in (member(f"{TREE}/CMakeLists.txt"), *members):
            data = b"content" if info.isreg() else b""
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_only_the_tree_is_unpacked(tmp_path: Path) -> None:
    made = archive(
        tmp_path / "a.tar.gz",
        member(f"{TREE}/src/x.cpp"),
        member("other/file"),
        member(f"{TREE}/d", tarfile.DIRTYPE),
    )
    source.unpack(made, tmp_path / "source")
    files = sorted(f for f in (tmp_path / "source").rglob("*") if f.is_file())
    assert [str(f.relative_to(tmp_path / "source")) for f in files] == ["CMakeLists.txt", "src/x.cpp"]
    assert all(f.stat().st_mode & 0o6111 == 0 for f in files)
    assert not (tmp_path / "source.partial").exists()


@pytest.mark.parametrize(
    "hostile",
    [
        member(f"{TREE}/../../../evil"),
        member(f"{TREE}/link", tarfile.SYMTYPE, "/etc/passwd"),
        member(f"{TREE}/hard", tarfile.LNKTYPE, f"{TREE}/CMakeLists.txt"),
        member(f"{TREE}/pipe", tarfile.FIFOTYPE),
        member(f"{TREE}/device", tarfile.CHRTYPE),
    ],
    ids=lambda m: m.name.rpartition("/")[2],
)
def test_a_hostile_archive_is_refused(tmp_path: Path, hostile: tarfile.TarInfo) -> None:
    with pytest.raises(Invalid):
        source.unpack(archive(tmp_path / "a.tar.gz", hostile), tmp_path / "work" / "source")
    assert not (tmp_path / "work" / "source").exists()
    assert not (tmp_path / "evil").exists()


def test_an_absolute_name_is_not_followed(tmp_path: Path) -> None:
    made = archive(tmp_path / "a.tar.gz", member(str(tmp_path / "evil")))
    source.unpack(made, tmp_path / "source")
    assert not (tmp_path / "evil").exists()


def test_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_MAX_FILES", 2)
    many = [member(f"{TREE}/{i}") for i in range(3)]
    with pytest.raises(Invalid, match="more than 2 files"):
        source.unpack(archive(tmp_path / "a.tar.gz", *many), tmp_path / "source")


def test_an_unpack_that_was_cut_begins_again(tmp_path: Path) -> None:
    (tmp_path / "source.partial").mkdir()
    (tmp_path / "source.partial" / "half").write_text("half a file")
    source.unpack(archive(tmp_path / "a.tar.gz"), tmp_path / "source")
    assert [f.name for f in (tmp_path / "source").iterdir()] == ["CMakeLists.txt"]


def test_another_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DigestMismatch, match=plan.SOURCE_SHA256):
        source.check(archive(tmp_path / "a.tar.gz"))


def test_pip_is_found() -> None:
    assert source.pip_command()
