"""The node beside the same llama.cpp server driven directly: tokens/s, CPU, first token.

Both servers are loaded alike and answer the same requests, one after the other, in pairs
whose order turns round; a pair's ratio is taken before the median, since the machine's mood
changes more between pairs than inside one. Two things tilt a pair and are kept out of it:

- What the last run left behind. llama.cpp's threads may spin for 0.2 s after an answer, and
  the other server would pay for it: each run waits until all servers are at rest.
- The client. One and the same reads both streams over TCP on loopback, as people drive either
  server, and parses nothing while they run.

Speed on a machine with neighbours spreads by a tenth and more: the quartiles show it. The
node's CPU per token does not depend on that; on as many cores as llama.cpp has threads, it
is what the ratio loses (250 us of each 8 ms: 3 %).
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
import psutil
from rich.console import Console
from rich.table import Table

from bench.nodes import direct, node
from bench.streams import Load, Target, chat, chat_body, load
from ollama_distributed.adapters.engines.llamacpp.program import Program

PAIRS: Mapping[int, int] = {1: 6, 4: 3, 8: 2}
"""Streams -> pairs in a round: about as many seconds for each."""
RATIO_LIMIT = 0.97
"""Generated tokens/s through the node over those of the same server driven directly."""
ADDED_FIRST_TOKEN_LIMIT_S = 0.002
LOOK_S = 0.05
REST_SHARE = 0.2
"""Of a core, over `LOOK_S`: one spinning thread takes all of it, a node at rest under 0.02."""
REST_DEADLINE_S = 60.0


class Pair(msgspec.Struct, frozen=True):
    direct: Load
    node: Load
    node_cpu_s: float
    """Of the node's process, without its runner; in steps of 10 ms, so only sums tell."""

    @property
    def ratio(self) -> float:
        return self.node.tokens_per_s / self.direct.tokens_per_s


async def rest() -> None:
    """Wait until no server that this bench started computes or spins.

    Raises:
        TimeoutError: one goes on for `REST_DEADLINE_S` without work.
    """
    servers = psutil.Process().children(recursive=True)
    deadline = time.monotonic() + REST_DEADLINE_S
    used = _cpu_s(servers)
    while True:
        await asyncio.sleep(LOOK_S)
        before, used = used, _cpu_s(servers)
        if used - before <= REST_SHARE * LOOK_S:
            return
        if time.monotonic() > deadline:
            raise TimeoutError("a server computes although it was asked nothing")


def _cpu_s(processes: list[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return sum(t.user + t.system for t in times)


async def bench_overhead(
    console: Console, store: Path, program: Program, rounds: int, tokens: int
) -> list[str]:
    """Prints the tables; the limits that were not met."""
    failures: list[str] = []
    table = Table(title=f"the node beside the same server driven directly ({program.variant})")
    for column in (
        "streams",
        "pairs",
        "direct tok/s",
        "node tok/s",
        "ratio",
        "quartiles",
        "limit",
        "CPU us/token",
    ):
        table.add_column(column)
    async with direct(store, program) as bare, node(store, program) as ours:
        for target in (bare, ours.target):
            await load(target, max(PAIRS), 8, 1)
        for streams, in_a_round in PAIRS.items():
            pairs = [
                await _pair(bare, ours.target, ours.pid, streams, tokens, number)
                for number in range(in_a_round * rounds)
            ]
            ratio = statistics.median(pair.ratio for pair in pairs)
            low, _, high = statistics.quantiles((pair.ratio for pair in pairs), n=4)
            table.add_row(
                str(streams),
                str(len(pairs)),
                f"{statistics.median(pair.direct.tokens_per_s for pair in pairs):.1f}",
                f"{statistics.median(pair.node.tokens_per_s for pair in pairs):.1f}",
                f"{ratio:.3f}",
                f"{low:.2f}-{high:.2f}",
                f">= {RATIO_LIMIT}",
                f"{sum(pair.node_cpu_s for pair in pairs) / (len(pairs) * streams * tokens) * 1e6:.0f}",
            )
            if ratio < RATIO_LIMIT:
                failures.append(f"{streams} streams: ratio {ratio:.3f} < {RATIO_LIMIT}")
        console.print(table)
        added = await added_first_token_s(bare, ours.target, pairs=20 * rounds)
    console.print(
        f"added time to first token: p50 {added * 1000:.2f} ms "
        f"(limit {ADDED_FIRST_TOKEN_LIMIT_S * 1000:.0f} ms)"
    )
    if added > ADDED_FIRST_TOKEN_LIMIT_S:
        failures.append(f"added first token {added * 1000:.2f} ms")
    return failures


async def _pair(bare: Target, ours: Target, pid: int, streams: int, tokens: int, number: int) -> Pair:
    gateway = [psutil.Process(pid)]
    first_number = 10_000 * streams + 100 * number
    done: dict[str, Load] = {}
    cpu_s = 0.0
    for target in (bare, ours) if number % 2 == 0 else (ours, bare):
        await rest()
        before = _cpu_s(gateway)
        done[target.name] = await load(target, streams, tokens, first_number)
        if target is ours:
            cpu_s = _cpu_s(gateway) - before
    return Pair(done["direct"], done["node"], cpu_s)


async def added_first_token_s(bare: Target, ours: Target, pairs: int) -> float:
    """Median of the differences of pairs: the same cached prompt, one after the other."""
    differences = []
    for number in range(pairs):
        first = {}
        for target in (bare, ours) if number % 2 == 0 else (ours, bare):
            await rest()
            first[target.name] = (await chat(target, chat_body(target.model, 7, 2))).first_token_s
        differences.append(first["node"] - first["direct"])
    return statistics.median(differences)
