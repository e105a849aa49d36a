"""`python -m bench.prefix`: routing by prefix beside round robin and least connections.

Four whole nodes on this machine, each with the real model in its memory, and a fifth one without it
that is asked. Eight system prompts of 1,500 tokens, 200 short questions after them in one random order,
by one tenant, one after the other (`--clients` for several at once). Each policy has nodes of its own,
so that no cache is warm, and each request goes to all policies in turn before the next one: whatever else
the machine does, it does to all. Counted are the tokens that engines read, as they say themselves in each
answer's usage; and the time until the first token, as the client sees it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import httpx
import msgspec
import uvloop
from rich.console import Console
from rich.table import Table

from bench.nodes import MODEL, make_store
from ollama_distributed.base.routing import POLICIES, Policy
from ollama_distributed.cli.session import Session
from ollama_distributed.client.sync import SyncClient

NODES = 4
PROMPTS = 8
PROMPT_TOKENS = 1500
REQUESTS = 200
ANSWER_TOKENS = 4
"""The answer is not what is measured."""
CONTEXT_TOKENS = 2048
READ_LIMIT = 0.35
"""Tokens read, of those that round robin reads."""
TTFT_GOAL = 0.5
SAID = 25
"""Requests after each of which it is said how far it is."""
TOGETHER_S = 90.0
WORDS = (
    "time year people way day man thing woman life child world school state family student group country "
    "problem hand part place case week company system program question work number night point home water "
    "room mother area money story fact month lot right study book eye job word business issue side kind "
    "head house service friend father power hour game line end member law car city community name team"
)

console = Console(width=110)


class Asked(msgspec.Struct, frozen=True):
    """What came of one request."""

    node: str
    route: str
    prompt_tokens: int
    cached_tokens: int
    first_s: float
    took_s: float


class Run(msgspec.Struct, frozen=True):
    """What came of all of one policy, so far."""

    policy: Policy
    http: httpx.AsyncClient
    asked: list[Asked] = []

    @property
    def read_tokens(self) -> int:
        return sum(one.prompt_tokens - one.cached_tokens for one in self.asked)

    @property
    def first_s(self) -> float:
        return statistics.mean(one.first_s for one in self.asked)

    @property
    def took_s(self) -> float:
        return sum(one.took_s for one in self.asked)

    def line(self) -> str:
        return (
            f"{self.policy}: {len(self.asked)} requests in {self.took_s:.0f} s, "
            f"{self.read_tokens:,} tokens read, first token {self.first_s * 1000:.0f} ms"
        )


def system_prompt(number: int, tokens: int) -> str:
    chance, words = random.Random(number), WORDS.split()
    return f"Rules {number}: " + " ".join(chance.choice(words) for _ in range(tokens - 10))


def requests(count: int, prompts: int, tokens: int) -> list[dict[str, object]]:
    """Bodies of chats, in an order that is always the same."""
    chance, systems = random.Random(7), [system_prompt(number, tokens) for number in range(prompts)]
    return [
        {
            "model": MODEL,
            "messages": [
                {"role": "system", "content": chance.choice(systems)},
                {"role": "user", "content": f"Case {number}?"},
            ],
            "max_tokens": ANSWER_TOKENS,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for number in range(count)
    ]


# ── the nodes ───────────────────────────────────────────────────────────────────────


class Member:
    """One `serve` or `join`, as people run it. Each runner gets one thread: two that wait for each
    other fall to a tenth beside a busy neighbour, and here are four replicas."""

    def __init__(self, folder: Path, name: str, policy: Policy, models: Path | None) -> None:
        """`models`: a store with the model that it is to hold; None: it is asked only."""
        self.name = name
        self.folder = folder / self.name
        if models is not None:
            shutil.copytree(models, self.folder / "models", copy_function=os.link)
        settings = {
            "ROUTING_POLICY": policy,
            "PRELOAD": MODEL if models is not None else "",
            "PLACEMENT_COPIES": "1",
            "CONTEXT_LENGTH": str(CONTEXT_TOKENS),
            "KEEP_ALIVE": "1h",
            "THREADS": "1",
            "LOG_FORMAT": "json",
            "MDNS": "false",
        }
        self._env = {name: value for name, value in os.environ.items() if not name.startswith("OLLAMA")}
        self._env |= {f"OLLAMA_DISTRIBUTED_{key}": value for key, value in settings.items()}
        self._log = (folder / f"{self.name}.log").open("wb")
        self.process: asyncio.subprocess.Process | None = None
        self.url = ""

    async def start(self, *verb: str) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "ollama_distributed", *verb),
            *("--name", self.name, "--data-dir", str(self.folder), "--listen", "127.0.0.1:0"),
            *("--cluster-listen", "127.0.0.1", "--advertise", "127.0.0.1"),
            env=self._env,
            stdout=asyncio.subprocess.PIPE,
            stderr=self._log,
        )
        assert self.process.stdout is not None
        ready = (await asyncio.wait_for(self.process.stdout.readline(), TOGETHER_S)).decode().split()
        if not ready:
            raise RuntimeError(self.told())
        self.url = ready[1]

    def told(self) -> str:
        """The end of its log."""
        return Path(self._log.name).read_text()[-4000:]

    def key(self) -> str:
        return str(msgspec.json.decode((self.folder / "admin.json").read_bytes())["key"])

    def client(self) -> SyncClient:
        return Session(data_dir=str(self.folder)).client()

    async def stop(self) -> None:
        self._log.close()
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self.process.wait(), 60)
            except TimeoutError:
                self.process.kill()
                await self.process.wait()


@contextlib.asynccontextmanager
async def cluster(policy: Policy, models: Path, count: int) -> AsyncIterator[Member]:
    """A node to ask, and `count` others that hold the model in memory."""
    with tempfile.TemporaryDirectory() as folder:
        members = [Member(Path(folder), "gateway", policy, None)]
        members += [Member(Path(folder), f"replica{n}", policy, models) for n in range(1, count + 1)]
        try:
            await members[0].start("serve")
            token = await asyncio.to_thread(_token, members[0], count)
            for member in members[1:]:
                await member.start("join", token)
            await _together(members[0], count)
            yield members[0]
        finally:
            await asyncio.gather(*(member.stop() for member in members))


def _token(member: Member, uses: int) -> str:
    told = subprocess.run(
        [sys.executable, "-m", "ollama_distributed", "--data-dir", str(member.folder), "--output", "json",
         "cluster", "token", "create", "--role", "node", "--uses", str(uses)],
        stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    return str(msgspec.json.decode(told.stdout)["token"])


async def _together(gateway: Member, count: int) -> None:
    """Until the gateway knows that all have the model in memory."""
    deadline = time.monotonic() + TOGETHER_S
    while True:
        with gateway.client() as client:
            seen = await asyncio.to_thread(client.routes.explain, MODEL, prompt="hello")
        if sum(one.loaded for one in seen.candidates) == count:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"not all {count} nodes have {MODEL} in memory: {seen}")
        await asyncio.sleep(0.5)


# ── the load ────────────────────────────────────────────────────────────────────────


async def ask(http: httpx.AsyncClient, body: dict[str, object]) -> Asked:
    started, first_s, usage = time.perf_counter(), 0.0, {}
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError((await response.aread()).decode())
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = msgspec.json.decode(line[6:])
            if not first_s and any(choice["delta"].get("content") for choice in event["choices"]):
                first_s = time.perf_counter() - started
            usage = event.get("usage") or usage
        headers = response.headers
    return Asked(
        node=headers["x-ollama-node"],
        route=headers["x-ollama-route"],
        prompt_tokens=usage["prompt_tokens"],
        cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
        first_s=first_s or time.perf_counter() - started,
        took_s=time.perf_counter() - started,
    )


@contextlib.asynccontextmanager
async def clusters(models: Path, args: Args) -> AsyncIterator[list[tuple[Run, Member]]]:
    """Of each policy a run to come, and the node that is asked."""
    async with contextlib.AsyncExitStack() as closing:
        found = []
        for policy in args.policy or POLICIES:
            console.print(f"{policy}: starting {args.nodes} nodes")
            gateway = await closing.enter_async_context(cluster(policy, models, args.nodes))
            headers = {"authorization": f"Bearer {gateway.key()}"}
            http = httpx.AsyncClient(base_url=gateway.url, headers=headers, timeout=600)
            found.append((Run(policy, await closing.enter_async_context(http)), gateway))
        yield found


async def load(runs: Sequence[Run], args: Args) -> None:
    left = enumerate(requests(args.requests, args.prompts, args.tokens))

    async def client() -> None:
        for number, body in left:
            first = number % len(runs)  # in turn, so that none is always the first
            for run in (*runs[first:], *runs[:first]):
                run.asked.append(await ask(run.http, body))
            if (number + 1) % SAID == 0:
                for run in runs:
                    console.print(run.line())

    await asyncio.gather(*(client() for _ in range(args.clients)))


# ── the table ───────────────────────────────────────────────────────────────────────


def show(runs: Sequence[Run], args: Args) -> list[str]:
    """Prints it; the limits that were not met."""
    turn = next((run for run in runs if run.policy == "round-robin"), runs[0])
    table = Table(
        title=f"{args.requests} requests over {args.prompts} system prompts of {args.tokens} tokens, "
        f"{args.nodes} replicas, {args.clients} at once"
    )
    for column in (
        "policy", "tokens read", "of round robin", "first token, mean", "median", "p95", "of round robin",
        "all took", "requests by node", "routes",
    ):  # fmt: skip
        table.add_column(column)
    for one in runs:
        firsts = sorted(asked.first_s for asked in one.asked)
        table.add_row(
            one.policy,
            f"{one.read_tokens:,}",
            f"{one.read_tokens / turn.read_tokens:.2f}",
            f"{one.first_s * 1000:.0f} ms",
            f"{statistics.median(firsts) * 1000:.0f} ms",
            f"{firsts[int(len(firsts) * 0.95)] * 1000:.0f} ms",
            f"{one.first_s / turn.first_s:.2f}",
            f"{one.took_s:.0f} s",
            "/".join(str(count) for _, count in sorted(Counter(a.node for a in one.asked).items())),
            " ".join(f"{why}:{count}" for why, count in Counter(a.route for a in one.asked).most_common()),
        )
    console.print(table)
    ours = next((run for run in runs if run.policy == "prefix"), runs[0])
    read, first = ours.read_tokens / turn.read_tokens, ours.first_s / turn.first_s
    console.print(f"first token: {first:.2f} of round robin's mean (goal {TTFT_GOAL})")
    if read > READ_LIMIT:
        return [f"{read:.2f} of the tokens that round robin reads, not {READ_LIMIT}"]
    return []


class Args(argparse.Namespace):
    nodes: int
    prompts: int
    tokens: int
    requests: int
    clients: int
    save: Path | None
    policy: list[Policy]


async def measure(args: Args) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        await make_store(models)
        async with clusters(models, args) as found:
            runs = [run for run, _ in found]
            await load(runs, args)
            for run, gateway in found:
                if args.save and run.policy == "prefix":
                    await asyncio.to_thread(save, gateway, args)
    return show(runs, args)


def save(gateway: Member, args: Args) -> None:
    """Its decisions, oldest first."""
    assert args.save is not None
    with gateway.client() as sdk:
        kept = sdk.routes.decisions(limit=args.requests)
    args.save.write_bytes(b"\n".join(map(msgspec.json.encode, reversed(kept.decisions))) + b"\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.prefix",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--nodes", type=int, default=NODES)
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="different system prompts")
    parser.add_argument("--tokens", type=int, default=PROMPT_TOKENS, help="of each system prompt")
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--clients", type=int, default=1, help="requests at once")
    parser.add_argument(
        "--policy", action="append", choices=POLICIES, help="only these; default: all, which the limit needs"
    )
    parser.add_argument(
        "--save", type=Path, default=None, help="keep our policy's decisions, for `route replay`"
    )
    failures = uvloop.run(measure(parser.parse_args(namespace=Args())))
    for failure in failures:
        console.print(f"[red]limit not met:[/red] {failure}")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
