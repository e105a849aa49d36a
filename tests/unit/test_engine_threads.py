"""Threads that compute let others go first; those that wait, and read and write, do not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ollama_distributed.adapters.engines.llamacpp.threads import Computing, can_tell

pytestmark = pytest.mark.skipif(
    not can_tell(os.getpid()), reason="this system does not tell what threads spend"
)

# Its first thread loads, the second computes when told, the third waits.
PROGRAM = """
import os, sys, threading, time
def spend(s):
    end = time.thread_time() + s
    while time.thread_time() < end: pass
def compute():
    for _ in sys.stdin: spend(0.1); print("spent", flush=True)
def wait(): threading.Event().wait()
spend(0.2)
print(os.getpid(), *(start(one) for one in (compute, wait)), flush=True)
"""
START = """
def start(target):
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread.native_id
"""


@contextmanager
def program() -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    code = PROGRAM.replace("spend(0.2)", f"spend(0.2)\n{START}") + "\nthreading.Event().wait()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            yield process, [int(word) for word in process.stdout.readline().split()]
        finally:
            process.kill()


def policies(threads: list[int]) -> list[int]:
    return [os.sched_getscheduler(thread) for thread in threads]


def compute(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "spent\n"


def test_those_that_compute_after_the_load_and_nobody_else() -> None:
    with program() as (process, threads):
        computing = Computing(process.pid)
        computing.let_others_first()  # nobody has computed yet
        assert policies(threads) == [os.SCHED_OTHER] * 3
        compute(process)
        computing.let_others_first()
        assert policies(threads) == [os.SCHED_OTHER, os.SCHED_BATCH, os.SCHED_OTHER]


def test_what_a_person_chose_stays() -> None:
    with program() as (process, threads):
        computing = Computing(process.pid)
        os.sched_setscheduler(threads[1], os.SCHED_IDLE, os.sched_param(0))
        compute(process)
        computing.let_others_first()
        assert policies(threads) == [os.SCHED_OTHER, os.SCHED_IDLE, os.SCHED_OTHER]


def test_a_process_that_ended_is_nothing() -> None:
    with program() as (process, _):
        computing = Computing(process.pid)
        compute(process)
        process.kill()
        process.wait()
        assert not Path(f"/proc/{process.pid}").exists()
        computing.let_others_first()


def test_it_is_looked_at_after_more_and_more_answers() -> None:
    computing = Computing(os.getpid())
    assert [number for number in range(1, 70) if computing.answered()] == [1, 2, 4, 8, 16, 32, 64]
