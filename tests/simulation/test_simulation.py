"""The cluster under faults, from many seeds: the form of CI. `make accept-simulation`: more."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from ollama_distributed.testing.simulation import Failed, Plan, Report
from ollama_distributed.testing.simulation.many import run_many

SEEDS = 200
"""A second of CPU each. So many, and two of 1,000 nodes, are what issue 3 asks of CI: not fewer."""
JOBS = 2


def _pass(reports: list[Report]) -> Counter[str]:
    """All of them; what they came across together."""
    seen: Counter[str] = Counter()
    for report in reports:
        if report.broken:
            raise Failed(report)
        seen.update(report.counts)
    return seen


@pytest.mark.slow
@pytest.mark.untraced
@pytest.mark.timeout(1800)
def test_many_seeds_of_5_to_30_nodes() -> None:
    reports = list(run_many([Plan(seed=seed) for seed in range(SEEDS)], JOBS))
    seen = _pass(reports)
    assert {report.nodes for report in reports} == set(range(5, 31))
    for event in (
        "change_made", "change_conflict", "change_refused", "change_unknown", "change_missing",
        "crash", "crash_of_leader", "message", "fence_refused", "resync", "term", "damped",
        "member_joining", "member_online", "member_suspect", "member_offline",
    ):  # fmt: skip
        assert seen[event] > SEEDS // 10, f"{event} hardly came up: {seen[event]}"


@pytest.mark.slow
@pytest.mark.untraced
@pytest.mark.timeout(600)
def test_two_seeds_of_a_thousand_nodes() -> None:
    plans = [Plan(seed=seed, nodes=1000, faults_s=20.0, formed=True) for seed in (1, 2)]
    seen = _pass(list(run_many(plans, JOBS)))
    assert seen["change_made"]


def _run(seed: int, hash_seed: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "ollama_distributed.testing.simulation", "--seed", str(seed), "--log"],
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    return done.stdout


@pytest.mark.untraced
def test_the_same_seed_gives_the_same_trace_whatever_the_hash_seed() -> None:
    first, second = _run(4, "1"), _run(4, "2")
    assert first == second
    assert re.search(r"trace [0-9a-f]{32} of [1-9][0-9]{2,} lines", first)


def test_another_seed_gives_another_trace() -> None:
    reports = list(run_many([Plan(seed=seed, nodes=5, faults_s=20) for seed in (1, 2)], 1))
    assert reports[0].digest != reports[1].digest
