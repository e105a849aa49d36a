"""What runs at each node while something breaks: prompts, config writers, watchers, and an eye
on who says that it leads. All of it is recorded and judged in the end.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Coroutine, Iterable, Iterator

import httpx
import msgspec

from ollama_distributed.testing.linearizability import History
from tests.chaos.world import ANSWERS, HOLDERS, WELL_S, World, until
from tests.limits import STRICT

ASK_S = 30.0
"""An answer that takes longer counts as failed."""
ASK_PAUSE_S, WRITE_PAUSE_S, LOOK_PAUSE_S = (0.4, 0.2, 0.3) if STRICT else (1.0, 0.4, 0.5)
"""On a machine of pace 1; a slower one gets less to do, and one that others use too."""
AGAIN_S = 0.2
REFUSAL_S = 3.5
"""Two seconds after which a write must be answered, and the rest for a busy test machine."""
WATCH_S, LOOK_S = 3.0, 10.0
"""Without a word for so long: again."""
KEY = "config"


class Harm(msgspec.Struct, frozen=True):
    """What a scenario did, and so which failures it may cause."""

    gone: frozenset[str] = frozenset()
    """Nodes whose own API cannot answer."""
    cut: frozenset[tuple[str, str]] = frozenset()
    """Pairs of nodes that do not reach each other, in either order."""

    def reaches(self, gateway: str, holder: str) -> bool:
        pairs = {(gateway, holder), (holder, gateway)}
        return holder not in self.gone and self.cut.isdisjoint(pairs)


class Asked(msgspec.Struct):
    gateway: str
    model: str
    began_at: float
    ended_at: float = 0.0
    spoke: bool = False
    failure: str = ""

    @property
    def took_s(self) -> float:
        return self.ended_at - self.began_at

    def may_fail(self, harm: Harm) -> bool:
        """No node that holds the model can be reached, or the answer had begun at one that was hit."""
        if self.gateway in harm.gone:
            return True
        if self.gateway in HOLDERS[self.model]:
            return False  # answered here
        reachable = [harm.reaches(self.gateway, holder) for holder in HOLDERS[self.model]]
        return not any(reachable) or (self.spoke and not all(reachable))


class Load:
    """`async with`; every kind of work has succeeded once when it is entered."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.history = History()
        self.asked: list[Asked] = []
        self.acknowledged: list[tuple[float, float]] = []
        """When a write was called, and when it was acknowledged; monotonic."""
        self.slow: list[str] = []
        """Writes whose answer took too long."""
        self.wrong: list[str] = []
        """What no failure may cause."""
        self.harm = Harm()
        self.harmed_at = self.over_at = 0.0
        self._chance = random.Random(seed)
        self._numbers = itertools.count(1_000 + seed % 1_000 * 1_000)
        self._versions: dict[int, object] = {}
        self._led: dict[int, set[str]] = {}
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        self._watched: dict[str, int] = {}

    async def __aenter__(self) -> Load:
        config = await self.world.call("n1", "GET", "/api/v1/config")
        if config["version"]:
            before = self.history.call("before", KEY, "write", value=_value(config))
            before.done(config["version"])
        for name in self.world.names:
            for model in ANSWERS:
                self._go(self._ask(name, model))
            self._go(self._write(name))
            self._go(self._watch(name))
            self._go(self._look(name))
        names = set(self.world.names)

        async def begun() -> bool:
            answered = {(one.gateway, one.model) for one in self.asked if not one.failure}
            every = len(answered) == len(names) * len(ANSWERS) and self._watched.keys() == names
            return every and len(self.acknowledged) >= len(names)

        try:
            await until(begun, WELL_S, "the load is under way")
        except BaseException:
            await self.stop()
            raise
        self.asked.clear()  # models were loaded
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    def _go(self, work: Coroutine[None, None, None]) -> None:
        self._tasks.append(asyncio.create_task(work))

    async def stop(self) -> None:
        """Idempotent."""
        self._stopping = True
        _, late = await asyncio.wait(self._tasks, timeout=ASK_S + 5)
        for task in late:
            task.cancel()
        await asyncio.wait(self._tasks)
        self.wrong += [f"{task} never ended" for task in late]
        for task in self._tasks:
            if not task.cancelled():
                task.result()

    # ── work ────────────────────────────────────────────────────────────────────────

    async def _ask(self, name: str, model: str) -> None:
        body = {"model": model, "prompt": "Hi", "keep_alive": -1}
        async with self.world.machine(name).async_http(ASK_S) as http:
            while not self._stopping:
                asked = Asked(name, model, time.monotonic())
                try:
                    async with asyncio.timeout(ASK_S):
                        await self._answer(http, asked, body)
                except (httpx.HTTPError, TimeoutError) as failure:
                    asked.failure = repr(failure)
                asked.ended_at = time.monotonic()
                self.asked.append(asked)
                await self._pause(ASK_PAUSE_S)

    async def _pause(self, usual_s: float) -> None:
        await asyncio.sleep(usual_s * self.world.pace * self._chance.uniform(0.5, 1.5))

    async def _answer(self, http: httpx.AsyncClient, asked: Asked, body: dict[str, object]) -> None:
        pieces: list[str] = []
        async with http.stream("POST", "/api/generate", json=body) as answer:
            if answer.status_code != 200:
                asked.failure = f"{answer.status_code}: {(await answer.aread()).decode()}"
                return
            async for line in answer.aiter_lines():
                piece = json.loads(line)
                if "error" in piece:
                    asked.failure = f"after {len(pieces)} pieces: {piece['error']}"
                    return
                pieces.append(piece["response"])
                asked.spoke = True
        said = "".join(pieces)
        if said != ANSWERS[asked.model]:
            asked.failure = f"not the answer: {said!r}"
            self.wrong.append(f"{asked.gateway} answered {said!r} for {asked.model}")

    async def _write(self, name: str) -> None:
        headers = {"Authorization": f"Bearer {self.world.key(name)}"}
        async with self.world.machine(name).async_http(10.0, headers) as http:
            while not self._stopping:
                await self._pause(WRITE_PAUSE_S)
                try:
                    await self._write_once(name, http)
                except httpx.HTTPError:
                    continue  # as recorded: unknown, or never sent

    async def _write_once(self, name: str, http: httpx.AsyncClient) -> None:
        config = (await http.get("/api/v1/config")).raise_for_status().json()
        self._saw(name, config)
        number = next(self._numbers)
        ask = {"values": {"max_queue": number}, "version": config["version"]}
        call = self.history.call(name, KEY, "write", value=b"%d" % number, expected=config["version"])
        began_at = time.monotonic()
        answer = await http.put("/api/v1/config", json=ask)
        took_s = time.monotonic() - began_at
        if took_s > self.world.limit_s(REFUSAL_S) and name not in self.harm.gone:
            self.slow.append(f"{name}: {answer.status_code} after {took_s:.1f} s")
        match answer.status_code:
            case 200:
                made = answer.json()
                self._saw(name, made)
                self.acknowledged.append((began_at, time.monotonic()))
                call.done(made["version"])
            case 409:
                call.conflict()
            case 503:
                call.refused()
            case 504:
                pass  # unknown
            case other:
                self.wrong.append(f"{name}: a write was answered {other}: {answer.text}")

    async def _watch(self, name: str) -> None:
        """Each connection sees versions in order, each once."""
        while not self._stopping:
            try:
                async with (
                    self.world.machine(name).async_http(WATCH_S) as http,
                    http.stream("GET", "/api/v1/config/watch") as events,
                ):
                    await self._follow(name, events)
            except httpx.HTTPError:
                await asyncio.sleep(AGAIN_S)

    async def _follow(self, name: str, events: httpx.Response) -> None:
        last = -1
        async for line in events.aiter_lines():
            if self._stopping:
                return
            if not line.startswith("data:"):
                continue
            config = json.loads(line.removeprefix("data:"))
            if "error" in config:
                return  # its node stops, or cannot read on
            self._saw(name, config)
            if config["version"] <= last:
                self.wrong.append(f"{name}'s watch: {config['version']} after {last}")
            last = self._watched[name] = config["version"]

    async def _look(self, name: str) -> None:
        """Who says of itself that it leads, in which epoch."""
        async with self.world.machine(name).async_http(LOOK_S) as http:
            while not self._stopping:
                await self._pause(LOOK_PAUSE_S)
                try:
                    said = (await http.get("/api/v1/cluster/leader")).raise_for_status().json()
                except httpx.HTTPError:
                    continue
                if said["leader"] is not None:
                    self._led.setdefault(said["epoch"], set()).add(said["leader"])

    def _saw(self, name: str, config: dict[str, object]) -> None:
        """One version has one content, wherever it is seen."""
        version, value = int(str(config["version"])), _value(config)
        before = self._versions.setdefault(version, value)
        if before != value:
            self.wrong.append(f"{name} has {value!r} as version {version}; elsewhere it was {before!r}")

    # ── what came of it ─────────────────────────────────────────────────────────────

    def harm_begins(self, *, gone: Iterable[str] = (), cut: Iterable[tuple[str, str]] = ()) -> None:
        self.harm = Harm(frozenset(gone), frozenset(cut))
        self.harmed_at = time.monotonic()
        self.over_at = float("inf")

    def harm_is_over(self) -> None:
        self.over_at = time.monotonic()

    async def more_writes(self, count: int, what: str = "writes are back") -> float:
        """Wait for so many acknowledged writes that are called from now on; the seconds that took."""
        now = time.monotonic()

        async def met() -> bool:
            return sum(called_at >= now for called_at, _ in self.acknowledged) >= count

        return await until(met, WELL_S, what)

    def failures(self) -> list[str]:
        """Prompts that failed and had no reason to."""
        return [
            f"{one.began_at - self.harmed_at:+.1f} s, took {one.took_s:.1f} s: {one.gateway} for "
            f"{one.model}: {one.failure}"
            for one in self._failed()
            if not (self._in_harm(one) and one.may_fail(self.harm))
        ]

    def excused(self) -> int:
        return len(list(self._failed())) - len(self.failures())

    def _failed(self) -> Iterator[Asked]:
        return (one for one in self.asked if one.failure)

    def _in_harm(self, one: Asked) -> bool:
        return one.ended_at >= self.harmed_at and one.began_at <= self.over_at

    def longest_answer_s(self) -> float:
        return max((one.took_s for one in self.asked if not one.failure), default=0.0)

    def write_outage_s(self) -> float:
        """The longest time without an acknowledged write, from the harm on."""
        times = [self.harmed_at, *(at for _, at in self.acknowledged if at >= self.harmed_at)]
        return max((after - before for before, after in itertools.pairwise(times)), default=0.0)

    async def judge(self) -> None:
        """After the load has ended: one config everywhere, one history, one leader an epoch."""

        async def same() -> bool:
            found = [await self.world.call(name, "GET", "/api/v1/config") for name in self.world.names]
            return all(config == found[0] for config in found)

        await until(same, WELL_S, "the same config everywhere")
        config = await self.world.call("n1", "GET", "/api/v1/config")
        last = self.history.call("last", KEY, "read")
        last.done(config["version"], _value(config))
        several = {epoch: led for epoch, led in self._led.items() if len(led) > 1}
        assert several == {}, f"epochs with several leaders: {several}"
        assert not self.wrong, "\n".join(self.wrong)
        assert self.slow == []
        self.history.check()
        assert self.failures() == []


def _value(config: dict[str, object]) -> bytes:
    values = config["values"]
    assert isinstance(values, dict)
    return str(values.get("max_queue", "")).encode()
