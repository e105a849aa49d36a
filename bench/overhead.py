"""The node beside the same llama.cpp server driven directly: tokens/s, CPU, first token.

Both servers are loaded alike and answer the same requests with the same sampling, one after the
other, in pairs whose order turns round; a pair's ratio is taken before the median, since the
machine's mood changes more between pairs than inside one. Three things tilt a pair and are kept
out of it:

- What the last run left behind. llama.cpp's threads may spin for 0.2 s after an answer, and
  the other server would pay for it: each run waits until all servers are at rest.
- The client. One and the same reads both streams over TCP on loopback, as people drive either
  server, and parses nothing while they run.
- The process. In which slots a server's streams are, and where its memory lies, make one start of it
  faster by a tenth and more than the next: both are started anew between pairs.

Speed on a machine with neighbours spreads by a tenth and more from pair to pair, so each ratio
comes with an interval that holds the true median in 95 of 100 such benches, and while the limit
lies inside it more pairs are made. The CPU that a node takes (its own process and its
nats-server's, with what they do while nothing happens) hardly depends on that; on as many cores
as llama.cpp has threads, it is what the ratio loses (80 us of each 8 ms: 1 %).
"""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import psutil
from rich.console import Console
from rich.table import Table

from bench.nodes import Node, direct, node
from bench.streams import Load, Target, chat, chat_body, load
from ollama_distributed.adapters.engines.llamacpp.program import Program

STREAMS = (1, 4, 8)
RATIO_LIMIT = 0.97
"""Generated tokens/s through the node over those of the same server driven directly."""
ADDED_FIRST_TOKEN_LIMIT_S = 0.002
FIRST_TOKEN_PAIRS = 5
"""For each pair of loads."""
STARTS = 3
"""Of both servers, for as many pairs as are asked for."""
MOST_ROUNDS = 4
"""Of so many pairs as are asked for, while a limit lies inside its interval."""
FEWEST = 6
"""Of fewer pairs there is no such interval."""
CONFIDENCE = 0.95
LOOK_S = 0.05
REST_SHARE = 0.2
"""Of a core, over `LOOK_S`: one spinning thread takes all of it, a node at rest under 0.02."""
REST_DEADLINE_S = 5.0


class Pair(msgspec.Struct, frozen=True):
    direct: Load
    node: Load
    node_cpu_s: float
    """Of the node's processes, without its runner."""

    @property
    def ratio(self) -> float:
        return self.node.tokens_per_s / self.direct.tokens_per_s


class Median(msgspec.Struct, frozen=True):
    value: float
    low: float
    high: float
    """Between them lies the median of all pairs that could be, with `CONFIDENCE`."""

    def decides(self, limit: float) -> bool:
        return not self.low <= limit <= self.high


def median(values: Sequence[float]) -> Median:
    """With the interval between two of the values (the sign test's): nothing is assumed of how
    they are spread. Of five or fewer it is all of them, and holds less."""
    ordered, count = sorted(values), len(values)
    outside, rank = 0.0, 0
    while rank < count // 2:
        outside += 2 * math.comb(count, rank) / 2**count
        if outside > 1 - CONFIDENCE:
            break
        rank += 1
    cut = max(rank - 1, 0)
    return Median(statistics.median(ordered), ordered[cut], ordered[count - 1 - cut])


async def rest() -> None:
    """Wait until no server that this bench started computes or spins.

    Raises:
        TimeoutError: one goes on for `REST_DEADLINE_S` without work.
    """
    servers = psutil.Process().children(recursive=True)
    deadline = time.monotonic() + REST_DEADLINE_S
    used = cpu_s(servers)
    while True:
        await asyncio.sleep(LOOK_S)
        before, used = used, cpu_s(servers)
        if used - before <= REST_SHARE * LOOK_S:
            return
        if time.monotonic() > deadline:
            raise TimeoutError("a server computes although it was asked nothing")


def cpu_s(processes: Sequence[psutil.Process]) -> float:
    """Exact where the kernel tells it (Linux), else in steps of 10 ms."""
    try:
        return sum(
            int(thread.joinpath("schedstat").read_text().split()[0]) / 1e9
            for process in processes
            for thread in Path(f"/proc/{process.pid}/task").iterdir()
        )
    except OSError:  # another system, or a thread that has just ended
        times = [process.cpu_times() for process in processes]
        return sum(t.user + t.system for t in times)


async def bench_overhead(
    console: Console, store: Path, program: Program, pairs: int, tokens: int
) -> list[str]:
    """Prints the tables; the limits that were not met."""
    done: dict[int, list[Pair]] = {streams: [] for streams in STREAMS}
    later_s: list[float] = []
    for _ in range(MOST_ROUNDS if pairs >= FEWEST else 1):
        wanted = [streams for streams in STREAMS if not _told(done[streams])]
        wants_first = not (later_s and median(later_s).decides(ADDED_FIRST_TOKEN_LIMIT_S))
        if not wanted and not wants_first:
            break
        starts = min(STARTS, pairs)
        for start in range(starts):
            more = pairs * (start + 1) // starts - pairs * start // starts
            async with direct(store, program) as bare, node(store, program) as ours:
                for target in (bare, ours.target):
                    await load(target, max(STREAMS), 8, 1)
                for streams in wanted:
                    for _ in range(more):
                        done[streams].append(await _pair(bare, ours, streams, tokens, len(done[streams])))
                if wants_first:
                    for _ in range(FIRST_TOKEN_PAIRS * more):
                        later_s.append(await _later_s(bare, ours.target, len(later_s)))
    return _tell(console, program, done, tokens, median(later_s))


def _told(done: Sequence[Pair]) -> bool:
    """On which side of the limit the ratio is."""
    return bool(done) and median([pair.ratio for pair in done]).decides(RATIO_LIMIT)


def _tell(
    console: Console, program: Program, done: Mapping[int, Sequence[Pair]], tokens: int, added: Median
) -> list[str]:
    failures: list[str] = []
    table = Table(title=f"the node beside the same server driven directly ({program.variant})")
    for column in (
        "streams",
        "pairs",
        "direct tok/s",
        "node tok/s",
        "ratio",
        f"{CONFIDENCE:.0%} sure",
        "limit",
        "CPU us/token",
    ):
        table.add_column(column)
    for streams, pairs in done.items():
        ratio = median([pair.ratio for pair in pairs])
        table.add_row(
            str(streams),
            str(len(pairs)),
            f"{statistics.median(pair.direct.tokens_per_s for pair in pairs):.1f}",
            f"{statistics.median(pair.node.tokens_per_s for pair in pairs):.1f}",
            f"{ratio.value:.3f}",
            f"{ratio.low:.3f}-{ratio.high:.3f}",
            f">= {RATIO_LIMIT}",
            f"{sum(pair.node_cpu_s for pair in pairs) / (len(pairs) * streams * tokens) * 1e6:.0f}",
        )
        if ratio.value < RATIO_LIMIT:
            failures.append(
                f"{streams} streams: ratio {ratio.value:.3f} ({ratio.low:.3f}-{ratio.high:.3f}) "
                f"< {RATIO_LIMIT}"
            )
    console.print(table)
    console.print(
        f"added time to first token: p50 {added.value * 1000:.2f} ms "
        f"({added.low * 1000:.2f}-{added.high * 1000:.2f}; limit {ADDED_FIRST_TOKEN_LIMIT_S * 1000:.0f} ms)"
    )
    if added.value > ADDED_FIRST_TOKEN_LIMIT_S:
        failures.append(f"added first token {added.value * 1000:.2f} ms")
    return failures


async def _pair(bare: Target, ours: Node, streams: int, tokens: int, number: int) -> Pair:
    first_number = 10_000 * streams + 100 * number
    done: dict[str, Load] = {}
    took_s = 0.0
    for target in (bare, ours.target) if number % 2 == 0 else (ours.target, bare):
        await rest()
        processes = ours.processes()
        before = cpu_s(processes)
        done[target.name] = await load(target, streams, tokens, first_number)
        if target is ours.target:
            took_s = cpu_s(processes) - before
    return Pair(done["direct"], done["node"], took_s)


async def _later_s(bare: Target, ours: Target, number: int) -> float:
    """How much later the node's first token comes: the same cached prompt, one server after the other."""
    first = {}
    for target in (bare, ours) if number % 2 == 0 else (ours, bare):
        await rest()
        first[target.name] = (await chat(target, chat_body(target.model, 7, 2))).first_token_s
    return first["node"] - first["direct"]
