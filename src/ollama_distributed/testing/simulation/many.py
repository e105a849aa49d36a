"""Many simulations on several cores."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

from ollama_distributed.testing.simulation.world import Plan, Report, simulate


def run_many(plans: Sequence[Plan], jobs: int) -> Iterator[Report]:
    """In the order of `plans`."""
    if jobs == 1:
        yield from map(simulate, plans)
        return
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=fresh) as pool:
        yield from pool.map(simulate, plans)


def summary(report: Report) -> str:
    """One line."""
    settled = "not settled" if report.settled_s is None else f"settled in {report.settled_s:.1f} s"
    facts = ", ".join(f"{name} {count}" for name, count in report.counts.items())
    return (
        f"seed {report.seed}: {report.nodes} nodes, {report.messages} messages, {settled}, "
        f"trace {report.digest} of {report.lines} lines; {facts}"
    )
