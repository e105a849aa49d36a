"""The kernel is asked to run the node's loop soon, and nobody that the node starts."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or tuple(map(int, platform.release().split(".")[:2])) < (6, 12),
    reason="an older kernel does not take a slice",
)

NAMES = """
import os, subprocess, sys, threading
from ollama_distributed.node.scheduling import run_soon, slice_ns
"""
CHILD = f"{NAMES}print(slice_ns(), os.nice(0), os.sched_getscheduler(0))"
ASK = f"""{NAMES}
before, found = slice_ns(), []
taken = run_soon()
thread = threading.Thread(target=lambda: found.append(slice_ns()))
thread.start()
thread.join()
child = subprocess.run([sys.executable, "-c", {CHILD!r}], capture_output=True, check=True, text=True)
print(before, int(taken), slice_ns(), *found, child.stdout)
"""


def asked(*command: str) -> list[int]:
    """A process that `command` runs and that asks: its slice (ns) before, whether the kernel took it, its
    slice after and its thread's; its child's slice, niceness and policy."""
    done = subprocess.run([*command, sys.executable, "-c", ASK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


@pytest.mark.parametrize(
    ("command", "nice", "policy"),
    [
        ([], 0, os.SCHED_OTHER),
        (["nice", "-n", "3"], 3, os.SCHED_OTHER),
        (["chrt", "-b", "0"], 0, os.SCHED_BATCH),
    ],
    ids=["plain", "nice", "batch"],
)
def test_the_thread_that_asks_and_nobody_else(command: list[str], nice: int, policy: int) -> None:
    before, taken, after, *others = asked(*command)
    assert (taken, after) == (1, 500_000)
    assert others == [before, before, os.nice(0) + nice, policy]


@pytest.mark.parametrize(
    "command", [["chrt", "-i", "0"], ["nice", "-n", "-3"]], ids=["idle", "before others"]
)
def test_what_a_person_chose_stays(command: list[str]) -> None:
    if command[0] == "nice" and os.geteuid() != 0:
        pytest.skip("only root goes before others")
    _, taken, after, *_ = asked(*command)
    assert not taken
    assert after != 500_000
