"""Thousands of clients that trickle: `python -m bench.slow_clients [--sockets N] [--seconds N] [--assert]`.

A node in its own process with the echo engine, an honest key that asks at random moments, and in a third
process clients of three kinds, each of which comes again when it is cut: who says nothing, heads that never
end, bodies that never end (a byte a second each). Readers that do not read are in the tests.

Asserted: every honest request is answered; the p99 until its first word is at most 1.2 times what it was
without them, in the same run; slow ones are cut.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
from pathlib import Path

import msgspec
import uvloop

from bench.nodes import Node, node
from bench.open_loop import Seen, Stream
from bench.overload import p, request
from ollama_distributed.node.listeners import allow_files

SOCKETS = 2000
HONEST_PER_S = 40.0
SECONDS = 40.0
"""Four times the deadline of a head: all of the first are cut in it."""
COMING_S = 5.0
"""Until all are there."""
TRICKLE_S = 1.0
LIMIT_P99 = 1.2
TOKENS_PER_S = 20.0
"""A first word after 50 ms: what a gateway adds is to be seen beside it."""


class Attack(msgspec.Struct):
    """What became of the slow ones."""

    most: int = 0
    """At once."""
    cut: int = 0
    refused: int = 0
    """Who could not connect."""


async def slow(host: str, port: int, kind: int, attack: Attack, held: set[int]) -> None:
    """One that comes again and again."""
    head = b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    begins = (b"", head + b"X: ", head + b"Content-Length: 100000\r\n\r\n{")
    wait_s = random.uniform(0.0, COMING_S)
    while True:
        await asyncio.sleep(wait_s)
        wait_s = TRICKLE_S
        try:
            reader, writer = await asyncio.open_connection(host, port, limit=1)
        except OSError:
            attack.refused += 1
            continue
        me = id(writer)
        held.add(me)
        attack.most = max(attack.most, len(held))
        try:
            writer.write(begins[kind])
            while not (writer.is_closing() or reader.at_eof()):
                await asyncio.sleep(TRICKLE_S * random.uniform(0.8, 1.2))
                if kind:
                    writer.write(b"x")
                    await writer.drain()
        except OSError:
            pass  # cut, which is counted below
        finally:
            held.discard(me)
            writer.close()
        attack.cut += 1


async def attack_for(host: str, port: int, sockets: int, seconds: float) -> None:
    allow_files()
    attack, held = Attack(), set[int]()
    try:
        async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
            for number in range(sockets):
                group.create_task(slow(host, port, number % 3, attack, held))
    except TimeoutError:
        print(msgspec.json.encode(attack).decode(), flush=True)


async def honest(ours: Node, seconds: float, chance: random.Random) -> list[Seen]:
    wire = request(ours.host, ours.port, ours.key, 2)
    return await Stream(ours.host, ours.port, lambda: wire, chance).run(HONEST_PER_S, seconds)


async def measure(ours: Node, sockets: int, seconds: float, chance: random.Random) -> bool:
    alone = await honest(ours, seconds / 2, chance)
    attacker = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.slow_clients", "--attack", f"{ours.host}:{ours.port}"),
        *("--sockets", str(sockets), "--seconds", str(COMING_S + seconds)),
        stdout=asyncio.subprocess.PIPE,
    )
    await asyncio.sleep(COMING_S)
    beside = await honest(ours, seconds, chance)
    said, _ = await attacker.communicate()
    attack = msgspec.json.decode(said, type=Attack)
    before, now = ([one.first_s * 1e3 for one in seen if one.status == 200] for seen in (alone, beside))
    failed = sum(one.status != 200 for one in (*alone, *beside))
    ratio = p(now, 0.99) / max(p(before, 0.99), 1e-9)
    print(f"slow clients: {attack.most} at once, {attack.cut} cut, {attack.refused} times no place")
    print(f"honest, alone:      p50 {p(before, 0.5):.1f} ms, p99 {p(before, 0.99):.1f} ms ({len(before)})")
    print(f"honest, beside them: p50 {p(now, 0.5):.1f} ms, p99 {p(now, 0.99):.1f} ms ({len(now)})")
    print(f"ratio of the p99 {ratio:.3f} (limit {LIMIT_P99}); not answered: {failed}")
    return ratio <= LIMIT_P99 and failed == 0 and attack.cut > 0 and attack.most > 0.9 * sockets


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sockets", type=int, default=SOCKETS)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--attack", default="", help=argparse.SUPPRESS)
    parser.add_argument("--assert", action="store_true", dest="asserts")
    asked = parser.parse_args()
    if asked.attack:
        host, _, port = asked.attack.partition(":")
        await attack_for(host, int(port), asked.sockets, asked.seconds)
        return
    options = {"tokens_per_s": TOKENS_PER_S, "models": ["echo"]}
    engines = json.dumps([{"name": "echo", "kind": "echo", "options": options}])
    settings = {"NUM_PARALLEL": "256", "MAX_QUEUE": "4096"}
    with tempfile.TemporaryDirectory() as folder:
        async with node(Path(folder), None, engines=engines, settings=settings) as ours:
            holds = await measure(ours, asked.sockets, asked.seconds, random.Random(1))
    if asked.asserts and not holds:
        sys.exit(1)


if __name__ == "__main__":
    uvloop.run(main())
