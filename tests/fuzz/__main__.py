"""Runs the fuzzers: `python -m tests.fuzz [TARGET…] --seconds 20`; a file in place of seconds: that one.

Each target has a process of its own with libFuzzer (by atheris), as many at once as there are cores. It
begins with `corpus/TARGET` and with what earlier runs here found worth keeping (`.fuzz/TARGET/corpus`).
A finding is an exception that is no refusal of ours, an input that takes more than 2 s of the processor,
or a process of more than 256 MiB. It is shown, kept under `.fuzz/TARGET`, and the exit status is 1; once
mended, the input goes to `corpus/TARGET` and stays.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NAMES = ("gguf", "manifest", "modelfile", "authorization")
KEPT = Path(".fuzz")
CORPUS = Path(__file__).parent / "corpus"
MOST_INPUT_S = 2.0
"""Of the processor, so that a busy neighbour is no finding."""
HUNG_S = 60
"""One that never returns is ended by the clock."""
MOST_MEMORY_MIB = 256
MOST_BYTES = 64 * 1024
"""Of an input: larger ones find little more, and slowly."""
LINES = 60
"""Of a failed run, that are shown."""
_INSTRUMENTED = (
    "ollama_distributed.models",
    "ollama_distributed.access",
    "ollama_distributed.gateway.gate",
    "ollama_distributed.gateway.cookies",
    "ollama_distributed.adapters.engines.llamacpp.vocabulary",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(NAMES)}; none: all")
    parser.add_argument("--seconds", type=int, default=20, help="for each target")
    parser.add_argument("--input", type=Path, help="run this file once, without libFuzzer")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    targets = asked.targets or list(NAMES)
    if unknown := set(targets) - set(NAMES):
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    if asked.input:
        for target in targets:
            _function(target)(asked.input.read_bytes())
        return 0
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not to be had on this platform; the tests run the corpus all the same")
        return 0
    if asked.worker:
        _fuzz(targets[0], asked.seconds)
    with ThreadPoolExecutor(min(len(targets), os.cpu_count() or 1)) as pool:
        good = list(pool.map(lambda target: _watched(target, asked.seconds), targets))
    return 0 if all(good) else 1


def _function(target: str) -> Callable[[bytes], None]:
    """Imported late: see `_fuzz`."""
    found: Callable[[bytes], None] = importlib.import_module("tests.fuzz.targets").TARGETS[target]
    return found


def _watched(target: str, seconds: int) -> bool:
    """Runs one target in a process and says how that went."""
    line = [sys.executable, "-m", "tests.fuzz", target, "--seconds", str(seconds), "--worker"]
    told: deque[str] = deque(maxlen=LINES)
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        told.extend(process.stdout)
    text = "".join(told)
    numbers = dict(re.findall(r"stat::(\w+):\s*(\d+)", text))
    good = process.returncode == 0
    print(
        f"{target}: {'nothing found' if good else 'FOUND SOMETHING'} in "
        f"{int(numbers.get('number_of_executed_units', 0)):,} runs, {seconds} s; "
        f"new inputs {numbers.get('new_units_added', '?')}, memory {numbers.get('peak_rss_mb', '?')} MiB",
        flush=True,
    )
    if not good:
        print(text, f"again: python -m tests.fuzz {target} --input .fuzz/{target}/FILE", flush=True)
    return good


def _fuzz(target: str, seconds: int) -> None:
    """Ends the process."""
    import atheris

    folder = KEPT / target
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    with atheris.instrument_imports(include=list(_INSTRUMENTED)):
        run = _function(target)

    def one(data: bytes) -> None:
        began = time.thread_time()
        run(data)
        took = time.thread_time() - began
        assert took < MOST_INPUT_S, f"it took {took:.1f} s of the processor"

    atheris.Setup(
        [
            target,
            f"-max_total_time={seconds}",
            f"-timeout={HUNG_S}",
            f"-rss_limit_mb={MOST_MEMORY_MIB}",
            f"-max_len={MOST_BYTES}",
            f"-artifact_prefix={folder}/",
            "-print_final_stats=1",
            "-verbosity=0",
            str(folder / "corpus"),
            str(CORPUS / target),
        ],
        one,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
