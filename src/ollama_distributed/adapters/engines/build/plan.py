"""What to build: CPU features -> compiler options, cache key, progress. Pure.

The options turn on exactly the instruction sets that the CPU and the kernel report, on
top of a fixed baseline; nothing is left to "native" detection, so that the cache key
says all that the binary needs. Sources: ggml's CMakeLists, Linux `/proc/cpuinfo` flag
names, and zig's CPU names (it takes `-mcpu`, and `-march` only for x86).
"""

from __future__ import annotations

import hashlib
import re
from typing import Literal

import msgspec

SOURCE_PACKAGE = "xllamacpp"
SOURCE_VERSION = "2026.10.11549"
"""The wheel that the project pins; its sdist carries the llama.cpp it was made from."""
SOURCE_SHA256 = "c17ee1163006f70726abb9f72137830818f3d8cb60bfc34cb232d08428eaa22b"
"""Of the sdist, as in `uv.lock` (a test compares)."""
SOURCE_TREE = "thirdparty/llama.cpp"
"""llama.cpp inside the sdist."""

_RECIPE = 1
"""Counts changes of the options that change the binary."""

NEEDED_DISK_BYTES = 1_500_000_000
"""Source 0.2 GB, objects 0.8 GB, compiler cache 0.1 GB, and air."""
_BYTES_PER_JOB = 1_200_000_000
"""The compiler's peak on the largest file (server-context.cpp)."""
_MAX_JOBS = 32

Machine = Literal["x86_64", "aarch64"]
Step = Literal["source", "unpack", "configure", "compile", "self-test", "install", "done"]


class Progress(msgspec.Struct, frozen=True):
    step: Step
    message: str
    share: float | None = None
    """Of the whole build, 0..1."""


class Cpu(msgspec.Struct, frozen=True):
    machine: Machine
    model: str
    features: frozenset[str]
    """Flag names of `/proc/cpuinfo`."""


class _Option(msgspec.Struct, frozen=True):
    name: str
    """A CMake option (x86) or a zig feature (ARM)."""
    needs: tuple[str, ...]
    """Every one of these features."""
    label: str


_X86_OPTIONS = (
    _Option("GGML_SSE42", ("sse4_2",), "SSE42"),
    _Option("GGML_AVX", ("avx",), "AVX"),
    _Option("GGML_AVX2", ("avx2",), "AVX2"),
    _Option("GGML_FMA", ("fma",), "FMA"),
    _Option("GGML_F16C", ("f16c",), "F16C"),
    _Option("GGML_BMI2", ("bmi2",), "BMI2"),
    _Option("GGML_AVX_VNNI", ("avx_vnni",), "AVX_VNNI"),
    _Option("GGML_AVX512", ("avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"), "AVX512"),
    _Option("GGML_AVX512_VBMI", ("avx512f", "avx512vbmi"), "VBMI"),
    _Option("GGML_AVX512_VNNI", ("avx512f", "avx512_vnni"), "VNNI"),
    _Option("GGML_AVX512_BF16", ("avx512f", "avx512_bf16"), "BF16"),
    _Option("GGML_AMX_TILE", ("amx_tile",), "AMX"),
    _Option("GGML_AMX_INT8", ("amx_tile", "amx_int8"), "AMX_INT8"),
    _Option("GGML_AMX_BF16", ("amx_tile", "amx_bf16"), "AMX_BF16"),
)
_X86_V2 = frozenset({"cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"})
_X86_V3 = _X86_V2 | {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}

_ARM_OPTIONS = (
    _Option("fullfp16", ("asimdhp",), "FP16"),
    _Option("dotprod", ("asimddp",), "DOTPROD"),
    _Option("i8mm", ("i8mm",), "I8MM"),
    _Option("bf16", ("bf16",), "BF16"),
    _Option("sve", ("sve",), "SVE"),
    _Option("sve2", ("sve2",), "SVE2"),
)

_ALWAYS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DCMAKE_EXE_LINKER_FLAGS=-s",  # 12 MB instead of 149 MB
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_NATIVE=OFF",
    "-DGGML_OPENMP=OFF",
    "-DGGML_CCACHE=OFF",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_BUILD_NUMBER=" + SOURCE_VERSION.rpartition(".")[2],
    "-DLLAMA_BUILD_COMMIT=" + SOURCE_PACKAGE,
)


def parse_cpuinfo(text: str, machine: Machine) -> Cpu:
    """The features that all cores share; `text` is `/proc/cpuinfo`."""
    names = ("flags", "Features")
    per_core: list[frozenset[str]] = []
    model = ""
    for line in text.splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key in names:
            per_core.append(frozenset(value.split()))
        elif key == "model name" and not model:
            model = value
    features = frozenset.intersection(*per_core) if per_core else frozenset[str]()
    return Cpu(machine, model or machine, features)


def _options(cpu: Cpu) -> list[_Option]:
    table = _X86_OPTIONS if cpu.machine == "x86_64" else _ARM_OPTIONS
    return [option for option in table if cpu.features.issuperset(option.needs)]


def baseline(cpu: Cpu) -> str:
    """The compiler's `-mcpu`."""
    if cpu.machine == "aarch64":
        return "+".join(("generic", *(option.name for option in _options(cpu))))
    if cpu.features >= _X86_V3:
        return "x86_64_v3"
    return "x86_64_v2" if cpu.features >= _X86_V2 else "x86_64"


def cmake_options(cpu: Cpu) -> tuple[str, ...]:
    """The `-D` options that decide what the binary is; toolchain paths come beside them."""
    chosen = {option.name for option in _options(cpu)}
    switches: tuple[str, ...] = ()
    if cpu.machine == "x86_64":
        switches = tuple(f"-D{o.name}={'ON' if o.name in chosen else 'OFF'}" for o in _X86_OPTIONS)
    flags = f"-mcpu={baseline(cpu)}"
    return (*_ALWAYS, f"-DCMAKE_C_FLAGS={flags}", f"-DCMAKE_CXX_FLAGS={flags}", *switches)


def instruction_set(cpu: Cpu) -> str:
    """What people read, e.g. `AVX2 AVX512 VBMI VNNI BF16`: what every CPU of today has is left out."""
    common = {"SSE42", "AVX", "FMA", "F16C", "BMI2"}
    labels = [option.label for option in _options(cpu) if option.label not in common]
    return " ".join(labels) or cpu.machine


def pays(cpu: Cpu) -> bool:
    """Whether a build is worth minutes of compiling, against the wheel (AVX2; plain NEON).

    Measured with a 135M model in Q4: AMX 2.5 times as fast, AVX-512 only 1.0 to 1.13 times.
    On ARM the integer instructions are what the wheel leaves unused; not measured here.
    """
    return bool({"AMX_INT8", "DOTPROD", "I8MM"} & set(instruction_set(cpu).split()))


def cache_key(cpu: Cpu) -> str:
    """A folder name: one for each source, recipe and set of CPU features in use."""
    what = "\n".join((str(_RECIPE), SOURCE_SHA256, cpu.machine, *cmake_options(cpu)))
    digest = hashlib.sha256(what.encode()).hexdigest()[:12]
    return f"llama.cpp-{SOURCE_VERSION}-{cpu.machine}-{digest}"


def jobs(cores: int, memory_available_bytes: int, asked: int | None = None) -> int:
    """Compilers to run at once: bounded by cores, memory and reason."""
    fits = max(1, memory_available_bytes // _BYTES_PER_JOB)
    return max(1, min(asked or cores, fits, _MAX_JOBS))


# ── progress ────────────────────────────────────────────────────────────────────────

_SHARES: dict[Step, tuple[float, float]] = {
    "source": (0.0, 0.02),
    "unpack": (0.02, 0.03),
    "configure": (0.03, 0.15),
    "compile": (0.15, 0.98),
    "self-test": (0.98, 0.99),
    "install": (0.99, 1.0),
    "done": (1.0, 1.0),
}
"""Begin and end of each step in the whole, as measured on two cores."""
_NINJA = re.compile(r"^\[(\d+)/(\d+)\] (.*)$")


def progress(step: Step, message: str, share_of_step: float = 0.0) -> Progress:
    begin, end = _SHARES[step]
    return Progress(step, message, round(begin + (end - begin) * share_of_step, 4))


def compile_progress(line: str) -> Progress | None:
    """What a line of ninja's output says, e.g. `[12/211] Building CXX object …`."""
    found = _NINJA.match(line)
    if found is None or not int(found[2]):
        return None
    done, total = int(found[1]), int(found[2])
    return progress("compile", f"{done} of {total}", done / total)
