"""Every input of the fuzzers' corpora, one at a time, and hundreds of mutants; the fuzzers themselves
run in `make test` after the tests (`python -m tests.fuzz`)."""

from __future__ import annotations

import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from tests.fuzz.seeds import CORPUS, GGUF_GOOD, GGUF_HOSTILE, SEEDS, mutants
from tests.fuzz.targets import TARGETS

from ollama_distributed.base.errors import InvalidModel
from ollama_distributed.models import modelfile
from ollama_distributed.models.gguf import architecture_of, read_header, tells_numbers
from ollama_distributed.models.gguf.header import MAX_METADATA_BYTES

INPUTS = sorted(path for path in CORPUS.glob("*/*") if path.is_file())


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_an_input_of_the_corpus(path: Path) -> None:
    TARGETS[path.parent.name](path.read_bytes())


def test_the_corpus_is_what_seeds_writes() -> None:
    """`python -m tests.fuzz.seeds` brings them together; what was found later lies beside them."""
    for target, files in SEEDS.items():
        for name, data in files.items():
            assert (CORPUS / target / name).read_bytes() == data, (target, name)


@pytest.mark.parametrize("name", GGUF_HOSTILE)
def test_a_hostile_header_is_refused(name: str) -> None:
    with pytest.raises(InvalidModel):
        architecture_of(read_header(GGUF_HOSTILE[name]))


@pytest.mark.untraced
def test_mutants_of_good_headers() -> None:
    made = [mutant for name in ("good-llama", "good-model") for mutant in mutants(GGUF_GOOD[name])]
    assert len(made) > 300
    for mutant in made:
        TARGETS["gguf"](mutant)


# ── what is large ───────────────────────────────────────────────────────────────────

_MEASURE = """
import pathlib, re, sys
from ollama_distributed.base.errors import InvalidModel
from ollama_distributed.models.gguf import read_header
try:
    header = read_header(pathlib.Path(sys.argv[1]).read_bytes(), verbose=True)
except InvalidModel:
    pass
# Not getrusage: that counts what the process had before it became this program.
status = pathlib.Path("/proc/self/status").read_text()
print(int(re.search(r"VmHWM:\\s*(\\d+) kB", status)[1]) // 1024)
"""


def _header(pairs: int, *parts: bytes) -> bytes:
    return b"".join((b"GGUF", struct.pack("<IQQ", 3, 0, pairs), *parts))


def _key(number: int) -> bytes:
    return struct.pack("<Q8s", 8, b"%08d" % number)


def _small_arrays(size: int) -> bytes:
    """Numbers of 16 bits, kept in each array: as objects they take 20 times as much."""
    array = struct.pack("<IIQ", 9, 2, 1024) + b"\xab\xcd" * 1024
    count = size // (16 + len(array)) - 1
    return _header(count, *(_key(number) + array for number in range(count)))


def _short_strings(size: int) -> bytes:
    count = size // 10 // 3  # more than may be kept; walking the rest takes seconds
    return _header(1, _key(0), struct.pack("<IIQ", 9, 8, count), struct.pack("<Q", 2) + b"ab") + (
        struct.pack("<Q", 2) + b"xy"
    ) * (count - 1)


def _wide_text(size: int) -> bytes:
    """Characters that make a text take four bytes for each one of the file."""
    text = "\N{GRINNING FACE}".encode() + b"a" * ((4 << 20) - 4)
    value = struct.pack("<IQ", 8, len(text)) + text
    count = size // (16 + len(value))
    return _header(count, *(_key(number) + value for number in range(count)))


def _many_keys_with_arrays(size: int) -> bytes:
    array = struct.pack("<IIQ", 9, 0, 0)
    count = min(size // (16 + len(array)), 65_000)
    return _header(count, *(_key(number) + array for number in range(count)))


LARGE: dict[str, Callable[[int], bytes]] = {
    "small-arrays": _small_arrays,
    "short-strings": _short_strings,
    "wide-text": _wide_text,
}


@pytest.mark.untraced
@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc how much memory was in use")
@pytest.mark.parametrize("name", LARGE)
def test_a_large_header_takes_no_more_memory_than_it_may(name: str, tmp_path: Path) -> None:
    file = tmp_path / "large.gguf"
    file.write_bytes(LARGE[name](MAX_METADATA_BYTES - 4096))
    line = [sys.executable, "-c", _MEASURE, str(file)]
    told = subprocess.run(line, capture_output=True, text=True, check=True, timeout=300)
    assert int(told.stdout) < 256


def _cpu_s(run: Callable[[], object]) -> float:
    began = time.thread_time()
    with suppress(InvalidModel):
        run()
    return time.thread_time() - began


def _modelfile_lines(size: int) -> Callable[[], object]:
    return lambda: modelfile.parse('FROM a\nSYSTEM """' + "\n" * size)


def _modelfile_stops(size: int) -> Callable[[], object]:
    return lambda: modelfile.parse("FROM a\n" + "PARAMETER stop a\n" * size)


def _look(size: int) -> Callable[[], object]:
    data = _many_keys_with_arrays(size * 32)
    return lambda: read_header(data, enough=tells_numbers)


@pytest.mark.untraced
@pytest.mark.parametrize("made", [_modelfile_lines, _modelfile_stops, _look])
def test_four_times_as_much_takes_about_four_times_as_long(
    made: Callable[[int], Callable[[], object]],
) -> None:
    """And not sixteen: each of these did once."""
    small, large = made(8_000), made(32_000)
    ratio = min(_cpu_s(large) / max(_cpu_s(small), 1e-4) for _ in range(3))
    assert ratio < 10
