"""`python -m ollama_distributed.testing.simulation`: run one seed, or many on several cores."""

from __future__ import annotations

import argparse
import sys

from ollama_distributed.testing.simulation.many import run_many, summary
from ollama_distributed.testing.simulation.world import FAULTS_S, Plan, Report, simulate


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ollama_distributed.testing.simulation")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from the first one on")
    parser.add_argument("--jobs", type=int, default=1, help="how many processes share the seeds")
    parser.add_argument("--nodes", type=int, help="how many nodes; the seed says if not given")
    parser.add_argument("--faults-s", type=float, default=FAULTS_S, help="virtual seconds of faults")
    parser.add_argument("--formed", action="store_true", help="begin with a cluster that was there before")
    parser.add_argument("--log", action="store_true", help="print the trace; of one seed")
    given = parser.parse_args()
    plans = [
        Plan(seed=seed, nodes=given.nodes, faults_s=given.faults_s, formed=given.formed)
        for seed in range(given.seed, given.seed + given.seeds)
    ]
    reports: list[Report] = []
    if len(plans) == 1:
        reports.append(simulate(plans[0], _say if given.log else None))
        _say(summary(reports[0]))
    else:
        for report in run_many(plans, given.jobs):
            reports.append(report)
            if report.broken or len(reports) % 100 == 0:
                _say(f"{len(reports)} of {len(plans)}; {summary(report)}")
    failed = [report for report in reports if report.broken]
    for report in failed:
        _say(f"seed {report.seed} failed: {report.broken[0]}\n  replay: {report.command}")
    _say(f"{len(reports)} runs, {len(failed)} failed")
    return 1 if failed else 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
