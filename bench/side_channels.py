"""What times and counts tell somebody who may not know: `make accept-side-channels`.

1. A key's look-up (S-12): 20,000 timings a class (a known id with a wrong secret, an unknown id, a wrong
   check), in one random order, without the garbage collector. Each text is sent once, as somebody who
   guesses would; a timing is the best of three texts of its class, which leaves out most of the
   scheduler. Mann-Whitney between each two classes must not tell them apart (p > 0.01) in most of five
   runs; a look-up that is known to leak must be told apart, or the measurement would see nothing. The
   look-up of a good key takes at most 2 us.
2. Prompts of another team (S-16): a node with a real model, two slots and three teams. In each trial one
   team asks a prompt or another of the same length, by a coin; then a spy of another team asks that
   prompt and guesses the coin by the time to its first token, or by `cached_tokens`. The lower 95 %
   bound of the guesses' AUC (DeLong) is at most 0.55 either way round, and `cached_tokens` is 0 in every
   trial. In the same run some spies are of the same team: there the AUC must be near 1, or the
   measurement would see nothing.

Exits 1 where one of these does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import msgspec
import uvloop

from bench.nodes import MODEL, Node, make_store, node
from bench.ranks import auc, mann_whitney
from ollama_distributed.access.keys import make_key
from ollama_distributed.access.service import Authenticator, Caller
from ollama_distributed.base.errors import Unauthenticated
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import KeyId, random_id
from ollama_distributed.client.sync import SyncClient

LOOKUP_S = 2e-6
P_LEAST = 0.01
SAMPLES = 20_000
RUNS = 5
BEST_OF = 3

PROBES = 1_000
CONTROLS = 200
WORDS = 24
"""Of a prompt: some 50 tokens, a fifth of a second to read for one thread."""
AUC_MOST = 0.55
AUC_CONTROL = 0.9
SAID = 50
"""Probes after each of which it is said how far it is."""

failures: list[str] = []


def check(held: bool, text: str) -> None:
    if not held:
        failures.append(text)
        print("FAILED:", text)


# ── a key's look-up ─────────────────────────────────────────────────────────────────

CLASSES = ("known id", "unknown id", "wrong check")


def lookups() -> None:
    keys = [make_key("user", now=0.0) for _ in range(1_000)]
    knows = Authenticator([record for _, record in keys], require_key=True, wall=time.time)
    cost(knows, [Caller(text, at_this_machine=False) for text, _ in keys])
    ids = [record.id for _, record in keys]
    with quiet():
        runs = [told_apart(knows.identify, ids) for _ in range(RUNS)]
        leaky = told_apart(Leaky(knows, ids).identify, ids)
    for pair in itertools.combinations(CLASSES, 2):
        found = sorted(run[pair] for run in runs)
        print(f"{pair[0]} or {pair[1]}: p = {', '.join(f'{p:.3f}' for p in found)}")
        check(statistics.median(found) > P_LEAST, f"{pair[0]} and {pair[1]} can be told apart by their time")
    p = leaky["known id", "unknown id"]
    print(f"the same with a look-up by id that leaves off where there is none: p = {p:.1g}")
    check(p < P_LEAST, "the measurement does not see a look-up that leaks")


def cost(knows: Authenticator, good: Sequence[Caller]) -> None:
    rounds = []
    for _ in range(30):
        began = time.perf_counter()
        for caller in good:
            knows.identify(caller)
        rounds.append((time.perf_counter() - began) / len(good))
    best = min(rounds)
    print(
        f"look-up of a good key among 1,000: {best * 1e6:.2f} us at best, "
        f"{statistics.median(rounds) * 1e6:.2f} median"
    )
    check(best <= LOOKUP_S, f"a look-up takes {best * 1e6:.2f} us, more than {LOOKUP_S * 1e6:.0f}")


class Leaky:
    """Looks for the id first, as one would without a thought."""

    def __init__(self, knows: Authenticator, ids: Sequence[KeyId]) -> None:
        self._knows = knows
        self._ids = set(ids)

    def identify(self, caller: Caller) -> Identity:
        if caller.credential[4:12] not in self._ids:
            len(caller.credential)  # some 20 ns, as one step more or less takes
        return self._knows.identify(caller)


def told_apart(identify: Callable[[Caller], Identity], ids: Sequence[KeyId]) -> dict[tuple[str, str], float]:
    """p of each two classes."""
    order = list(range(len(CLASSES))) * SAMPLES
    random.shuffle(order)
    timings: tuple[list[int], ...] = tuple([] for _ in CLASSES)
    clock = time.perf_counter_ns
    for start in range(0, len(order), SAMPLES // 20):  # texts are made in batches: all at once are 100 MB
        part = order[start : start + SAMPLES // 20]
        asked = [[wrong_key(kind, ids) for _ in range(BEST_OF)] for kind in part]
        for kind, callers in zip(part, asked, strict=True):
            best = 1 << 62
            for caller in callers:
                began = clock()
                try:
                    identify(caller)
                except Unauthenticated:
                    best = min(best, clock() - began)
            timings[kind].append(best)
    medians = (f"{name} {statistics.median(some):.0f}" for name, some in zip(CLASSES, timings, strict=True))
    print(f"  medians in ns: {', '.join(medians)}")
    named = dict(zip(CLASSES, timings, strict=True))
    return {(a, b): mann_whitney(named[a], named[b]) for a, b in itertools.combinations(CLASSES, 2)}


def wrong_key(kind: int, ids: Sequence[KeyId]) -> Caller:
    """All are made in the same way, so that they lie in memory alike."""
    key_id = random.choice((ids, [KeyId(random_id(8))])[kind == 1])
    text, _ = make_key("user", now=0.0, key_id=KeyId("".join(key_id)))
    last = (text[-1], "1" if text[-1] == "0" else "0")[kind == 2]
    return Caller(text[:-1] + last, at_this_machine=False)


@contextmanager
def quiet() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# ── another team's prompt ───────────────────────────────────────────────────────────


class Probe(msgspec.Struct, frozen=True):
    same_team: bool
    asked_before: bool
    first_s: float
    cached_tokens: int


def prompt(chance: random.Random, number: int) -> str:
    """Begins as no other of the last hundreds does, so that nothing is found of a team's own past."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    first = letters[number % 26] + letters[number // 26 % 26]
    return " ".join([first, *("".join(chance.choices(letters, k=2)) for _ in range(WORDS - 1))])


async def ask(http: httpx.AsyncClient, key: str, text: str) -> tuple[float, int]:
    """Seconds to the first token, and `cached_tokens`."""
    body = {
        "model": MODEL,
        "prompt": text,
        "raw": True,
        "max_tokens": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"authorization": f"Bearer {key}"}
    began, first_s, usage = time.perf_counter(), 0.0, {}
    async with http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        if response.status_code != 200:
            raise RuntimeError((await response.aread()).decode())
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                first_s = first_s or time.perf_counter() - began
                usage = msgspec.json.decode(line[6:]).get("usage") or usage
    return first_s, usage["prompt_tokens_details"]["cached_tokens"]


async def spy(there: Node, probes: int, controls: int) -> list[Probe]:
    def made() -> dict[str, str]:
        with SyncClient(f"http://{there.host}:{there.port}", there.key) as client:
            return {team: client.keys.create(team=team).key for team in ("red", "blue", "green")}

    keys, chance, numbers = await asyncio.to_thread(made), random.Random(), itertools.count()
    kinds = [False] * probes + [True] * controls
    chance.shuffle(kinds)
    found: list[Probe] = []
    began = time.monotonic()
    async with httpx.AsyncClient(base_url=f"http://{there.host}:{there.port}", timeout=60) as http:
        for team in keys.values():
            await ask(http, team, prompt(chance, next(numbers)))  # the model is loaded, each team has a past
        for same_team in kinds:
            secret, other = prompt(chance, next(numbers)), prompt(chance, next(numbers))
            asked_before = chance.random() < 0.5
            victim, attacker = chance.sample(sorted(keys), 2)
            await ask(http, keys[victim], secret if asked_before else other)
            first_s, cached = await ask(http, keys[victim if same_team else attacker], secret)
            found.append(Probe(same_team, asked_before, first_s, cached))
            if len(found) % SAID == 0:
                print(f"  {len(found)} probes in {time.monotonic() - began:.0f} s", flush=True)
    return found


def judge(found: Sequence[Probe], *, same_team: bool) -> None:
    some = [one for one in found if one.same_team == same_team]
    figures: dict[str, Callable[[Probe], float]] = {
        "time to first token": lambda one: -one.first_s,
        "cached_tokens": lambda one: one.cached_tokens,
    }
    print(f"{len(some)} probes of {'the same team' if same_team else 'another team'}:")
    for name, figure in figures.items():
        yes = [figure(one) for one in some if one.asked_before]
        no = [figure(one) for one in some if not one.asked_before]
        there, back = auc(yes, no), auc(no, yes)
        print(f"  by {name}: AUC {there.value:.3f}, 95 % from {there.low:.3f} to {there.high:.3f}")
        if same_team:
            check(
                there.low >= AUC_CONTROL,
                f"{name}: the measurement does not see what a team's own cache tells",
            )
        else:
            check(max(there.low, back.low) <= AUC_MOST, f"{name} tells what another team asked")
    if not same_team:
        most = max(one.cached_tokens for one in some)
        print(f"  cached_tokens: {most} at most")
        check(most == 0, f"{most} tokens of a prompt came from another team's")


async def prompts(probes: int, controls: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        await make_store(models)
        # Of two threads one that waits for the other falls to a tenth beside a busy neighbour.
        settings = {"NUM_PARALLEL": "2", "CONTEXT_LENGTH": "512", "THREADS": "1"}
        async with node(models, None, settings=settings) as there:
            found = await spy(there, probes, controls)
    judge(found, same_team=False)
    judge(found, same_team=True)


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--only", choices=("keys", "prompts"))
    words.add_argument("--probes", type=int, default=PROBES, help="of other teams")
    words.add_argument("--controls", type=int, default=CONTROLS, help="of the same team")
    asked = words.parse_args()
    if asked.only != "prompts":
        lookups()
    if asked.only != "keys":
        uvloop.run(prompts(asked.probes, asked.controls))
    print("FAILED" if failures else "all held")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
