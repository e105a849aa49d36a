"""`python -m bench`: ratios against a peer or a limit, all in one run.

engines    generated tokens/s of each llama.cpp on this machine, beside the wheel's
overhead   the node beside the same llama.cpp server driven directly
gateway    requests/s and CPU of the gateway over the echo engine
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec
import uvloop
from rich.console import Console
from rich.table import Table

from bench.nodes import direct, make_store, node
from bench.overhead import bench_overhead, rest
from bench.requests import drive
from bench.streams import Load, Target, load
from ollama_distributed.adapters.engines.llamacpp.discover import choose, wheel
from ollama_distributed.node.settings import default_cache_dir

STREAMS = (1, 4, 8)
BUILT_OVER_WHEEL = 2.0
"""Where the CPU has AMX, which the wheel does not use."""

console = Console(width=100)


class Args(argparse.Namespace):
    what: list[str]
    rounds: int
    pairs: int
    tokens: int
    seconds: float
    wheel: bool
    check: bool


async def measure(target: Target, streams: int, tokens: int, rounds: int) -> Load:
    """The median of `rounds`."""
    runs = []
    for r in range(rounds):
        await rest()
        runs.append(await load(target, streams, tokens, 1000 * r))
    middle = statistics.median(run.tokens_per_s for run in runs)
    return Load(streams, middle, statistics.median(run.first_token_s for run in runs))


async def bench_engines(store: Path, args: Args) -> list[str]:
    """Each engine alone on the machine, one after the other."""
    chosen = (await choose(cache_dir=default_cache_dir() / "engines")).program
    programs = [await wheel()] + ([chosen] if chosen.path else [])
    table = Table(title="llama.cpp on SmolLM2-135M, tokens/s (first token, ms)")
    for column in ("engine", "instruction set", *(f"{n} streams" for n in STREAMS)):
        table.add_column(column)
    speeds: list[list[float]] = []
    for program in programs:
        async with direct(store, program) as target:
            await load(target, 1, 8, 1)
            runs = [await measure(target, n, args.tokens, args.rounds) for n in STREAMS]
        speeds.append([run.tokens_per_s for run in runs])
        cells = [f"{run.tokens_per_s:.0f} ({run.first_token_s * 1000:.0f})" for run in runs]
        table.add_row(program.variant, program.instruction_set, *cells)
    if len(speeds) == 2:
        ratios = [new / old for new, old in zip(speeds[1], speeds[0], strict=True)]
        table.add_row("ratio", "", *(f"{ratio:.2f} x" for ratio in ratios))
    console.print(table)
    if len(speeds) == 1:
        console.print("only the wheel is here; `ollama-distributed engine build` makes one for this CPU")
        return []
    if "AMX" in programs[1].instruction_set and max(ratios) < BUILT_OVER_WHEEL:
        return [f"the built engine is {max(ratios):.2f} x the wheel, not {BUILT_OVER_WHEEL}"]
    return []


async def overhead(store: Path, args: Args) -> list[str]:
    if args.wheel:
        program = await wheel()
    else:
        program = (await choose(cache_dir=default_cache_dir() / "engines")).program
    return await bench_overhead(console, store, program, args.pairs, args.tokens)


async def bench_gateway(store: Path, args: Args) -> list[str]:
    """The whole gateway (host, identity, limits, log, metrics) over an engine that costs nothing."""
    engines = '[{"name": "echo", "kind": "echo"}]'
    kib = "word " * 205
    bodies: Sequence[tuple[str, str, dict[str, object], int]] = (
        (
            "1 KiB chat, 1 token",
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": kib}], "max_tokens": 1},
            32,
        ),
        (
            "1 KiB Ollama chat, 1 token",
            "/api/chat",
            {"messages": [{"role": "user", "content": kib}], "stream": False, "options": {"num_predict": 1}},
            32,
        ),
        (
            "streamed chat, 200 chunks",
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": kib}], "max_tokens": 200, "stream": True},
            8,
        ),
    )
    table = Table(title="gateway over the echo engine, one process")
    for column in ("request", "requests/s", "CPU us/request", "chunks/s", "CPU us/chunk"):
        table.add_column(column)
    async with node(store, None, engines=engines) as ours:
        for name, path, body, connections in bodies:
            wire = msgspec.json.encode({"model": "echo", **body})
            requests, chunks = await drive(
                ours.host, ours.port, path, wire, pid=ours.pid, connections=connections, seconds=args.seconds
            )
            streamed = [f"{chunks.per_s:,.0f}", f"{chunks.cpu_us:.1f}"] if chunks.per_s else ["", ""]
            table.add_row(name, f"{requests.per_s:,.0f}", f"{requests.cpu_us:.0f}", *streamed)
    console.print(table)
    return []


BENCHES = {"engines": bench_engines, "overhead": overhead, "gateway": bench_gateway}


async def run(args: Args) -> list[str]:
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        await make_store(store)
        for name in args.what or list(BENCHES):
            failures += await BENCHES[name](store, args)
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", choices=[*BENCHES, []], help="benches to run (all)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of which `engines` takes the median")
    parser.add_argument(
        "--pairs",
        type=int,
        default=12,
        help="pairs of `overhead` for each number of streams; up to four times as many while the limit "
        "lies inside the interval",
    )
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each load on the gateway")
    parser.add_argument("--wheel", action="store_true", help="`overhead` over the wheel, whatever is built")
    parser.add_argument("--assert", dest="check", action="store_true", help="fail when a limit is not met")
    args = parser.parse_args(namespace=Args())
    failures = uvloop.run(run(args))
    for failure in failures:
        console.print(f"[red]limit not met:[/red] {failure}")
    return bool(failures) and args.check


if __name__ == "__main__":
    sys.exit(main())
