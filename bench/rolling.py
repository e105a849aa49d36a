"""`python -m bench.rolling`: three nodes under streams are restarted one after the other; nothing is lost.

Half of the clients are our SDK with the URLs of all nodes, in an order of their own: they are told
nothing of the restarts. The other half are plain HTTP clients, as behind a load balancer: a node takes
no new ones of them from the moment that it is told to stop until it is ready again, and what runs on it
ends within its `drain_timeout`. No plain client can outlive its gateway; so with a drain that is shorter
than the answers (`--drain 2 --plain 0`) all streams are the SDK's.

Each text must be the whole one. Exit status 1 if a stream failed or was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx
import msgspec
from tests.e2e.conftest import add_model
from tests.limits import SOON_S
from tests.nodes import Nodes, until

from ollama_distributed.client import wire
from ollama_distributed.client.aio import Client
from ollama_distributed.client.errors import ClientError
from ollama_distributed.models.scripted import CHATML_TEMPLATE, scripted_model

NAMES = ("n1", "n2", "n3")
CONTEXT_TOKENS = 2048
MODEL, PROMPT = "m", "Say it."
STOP_S = 120.0
SILENCE_S = 60.0
"""A client gives up a stream that says nothing for so long."""


class Tally(msgspec.Struct):
    """What clients saw."""

    complete: int = 0
    failed: list[str] = msgspec.field(default_factory=list)
    """How streams ended that have no whole text."""
    gap_s: float = 0.0
    """The longest silence in a stream, after its first word."""


class Rolling:
    """Streams that begin again and again until `stop`, on a loop of their own."""

    def __init__(self, urls: list[str], text: str) -> None:
        self.sdk, self.plain = Tally(), Tally()
        self.in_turn = list(urls)
        """Nodes that a load balancer would give a new plain client."""
        self.opening: Counter[str] = Counter()
        """Plain requests that a node was given and has not begun to answer. Told to stop now, it would
        break connections that it has not read yet: a load balancer waits, too."""
        self._urls = urls
        self._text = text
        self._stop = threading.Event()

    @contextmanager
    def running(self, sdk: int, plain: int) -> Iterator[None]:
        thread = threading.Thread(target=lambda: asyncio.run(self._all(sdk, plain)), name="clients")
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    async def _all(self, sdk: int, plain: int) -> None:
        kinds = [(self._by_sdk, self.sdk)] * sdk + [(self._by_http, self.plain)] * plain
        await asyncio.gather(*(self._again(read, tally, seed) for seed, (read, tally) in enumerate(kinds)))

    async def _again(
        self, read: Callable[[random.Random, Tally], Awaitable[str]], tally: Tally, seed: int
    ) -> None:
        chance = random.Random(seed)  # which node first
        while not self._stop.is_set():
            try:
                text = await read(chance, tally)
            except (ClientError, httpx.HTTPError, ValueError) as error:
                tally.failed.append(f"{type(error).__name__}: {error}"[:300])
                continue
            if text == self._text:
                tally.complete += 1
            else:
                tally.failed.append(f"another text, of {len(text)} characters")

    async def _by_sdk(self, chance: random.Random, tally: Tally) -> str:
        urls = chance.sample(self._urls, len(self._urls))
        text, at_s = "", 0.0
        async with Client(urls, timeout=SILENCE_S) as client:
            async for piece in client.generate_stream(wire.GenerateRequest(model=MODEL, prompt=PROMPT)):
                at_s = _noted(tally, at_s)
                text += piece.response
        return text

    async def _by_http(self, chance: random.Random, tally: Tally) -> str:
        text, at_s, url = "", 0.0, chance.choice(self.in_turn)
        async with (
            httpx.AsyncClient(base_url=url, timeout=SILENCE_S, verify=False) as http,
            self._opened(http, url) as response,
        ):
            if response.status_code != 200:
                raise ValueError(f"{response.status_code} {(await response.aread())[:200]!r}")
            async for line in response.aiter_lines():
                at_s = _noted(tally, at_s)
                said = json.loads(line)
                if "error" in said:
                    raise ValueError(line)
                text += said["response"]
        return text

    @asynccontextmanager
    async def _opened(self, http: httpx.AsyncClient, url: str) -> AsyncIterator[httpx.Response]:
        self.opening[url] += 1
        opening = True
        try:
            async with http.stream(
                "POST", "/api/generate", json={"model": MODEL, "prompt": PROMPT}
            ) as response:
                self.opening[url] -= 1
                opening = False
                yield response
        finally:
            self.opening[url] -= opening


def _noted(tally: Tally, before_s: float) -> float:
    now_s = time.monotonic()
    if before_s:
        tally.gap_s = max(tally.gap_s, now_s - before_s)
    return now_s


def roll(folder: Path, *, streams: int, plain: int, drain_s: float, words: int) -> Rolling:
    """Restart each of three nodes once under `streams`, of which `plain` are no SDK's."""
    text = "".join(f" word{i:04d}" for i in range(words))
    env = {
        "CONTEXT_LENGTH": str(CONTEXT_TOKENS),
        "DRAIN_TIMEOUT": f"{drain_s:g}s",
        "NUM_PARALLEL": str(max(1, streams // 2)),  # two nodes carry all of them
    }
    with Nodes(folder, env={f"OLLAMA_DISTRIBUTED_{name}": value for name, value in env.items()}) as nodes:
        first = nodes.serve(NAMES[0])
        with first.admin() as client:
            token = until(lambda: client.cluster.create_token(uses=2), SOON_S, "a token").token
            for name in NAMES[1:]:
                nodes.start(name, ("join", token), ())
            gguf = scripted_model(text, chat_template=CHATML_TEMPLATE, context_tokens=CONTEXT_TOKENS)
            for name in NAMES:
                add_model(nodes[name].url, MODEL, gguf)
            until(lambda: client.cluster.status().status == "ok", SOON_S, "a cluster that is well")
        urls = {name: nodes[name].url for name in NAMES}
        rolling = Rolling(list(urls.values()), text)
        with rolling.running(streams - plain, plain):
            until(lambda: rolling.sdk.complete + rolling.plain.complete >= streams, 120.0, "a first round")
            for name in (*NAMES[1:], NAMES[0]):
                _restart(nodes, name, urls, rolling)
            done = rolling.sdk.complete + rolling.plain.complete
            until(
                lambda: rolling.sdk.complete + rolling.plain.complete >= done + streams, 120.0, "a last round"
            )
        for name in NAMES:
            log = nodes[name].log_file.read_text()
            events = ("lost", "went_on", "reattached")
            counts = {event: log.count(f'"streams.{event}"') for event in events}
            print(f"{name}: {counts}")
    return rolling


def _restart(nodes: Nodes, name: str, urls: dict[str, str], rolling: Rolling) -> None:
    rolling.in_turn = [url for other, url in urls.items() if other != name]
    until(lambda: not rolling.opening[urls[name]], SOON_S, "all that it was given is begun")
    began_s = time.monotonic()
    nodes[name].tell_to_stop()
    status = nodes[name].process.wait(STOP_S)
    stopped_s = time.monotonic()
    nodes.serve(name, "--listen", urls[name].removeprefix("http://"))
    with nodes[name].admin() as client:
        until(lambda: client.cluster.status().status == "ok", SOON_S, f"{name} is back")
    rolling.in_turn = list(urls.values())
    print(
        f"{name}: stopped with {status} after {stopped_s - began_s:.1f} s, "
        f"well again after {time.monotonic() - began_s:.1f} s"
    )


def report(rolling: Rolling) -> bool:
    """Print it; whether nothing was lost."""
    for what, tally in (("SDK", rolling.sdk), ("plain", rolling.plain)):
        print(
            f"{what}: {tally.complete} whole, {len(tally.failed)} failed or broken, "
            f"longest silence {tally.gap_s:.2f} s"
        )
        for text in tally.failed[:10]:
            print(f"  {text}")
    return not (rolling.sdk.failed or rolling.plain.failed)


def main() -> None:
    parser = argparse.ArgumentParser(description="A rolling restart of three nodes under streams.")
    parser.add_argument("--streams", type=int, default=50, help="at once")
    parser.add_argument("--plain", type=int, default=25, help="of these, by clients without our SDK")
    parser.add_argument("--drain", type=float, default=30.0, help="drain_timeout of the nodes, s")
    parser.add_argument("--words", type=int, default=300, help="of an answer")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rolling") as folder:
        rolling = roll(
            Path(folder), streams=args.streams, plain=args.plain, drain_s=args.drain, words=args.words
        )
    raise SystemExit(0 if report(rolling) else 1)


if __name__ == "__main__":
    main()
