"""Usage of a node: on its disk within a second, at keepers, and told as one for the cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ollama_distributed.access.metering import BorrowAsk, Borrowed
from ollama_distributed.access.remaining import LeftAsk, LeftTold
from ollama_distributed.adapters.hardware.energy import EnergyMeter
from ollama_distributed.adapters.hardware.gpus import Nvml
from ollama_distributed.adapters.peers.usage import Counts, KeepAsk, Kept, UsageAsk
from ollama_distributed.base.errors import Unavailable
from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.inference import Usage
from ollama_distributed.base.usage import UsageAnswer
from ollama_distributed.gateway.routes.usage import csv_text
from ollama_distributed.gateway.summary import Summary
from ollama_distributed.node.settings import Settings
from ollama_distributed.node.usage.service import NodeUsage
from ollama_distributed.state import keys
from ollama_distributed.state.cluster import ClusterState, apply
from ollama_distributed.state.codec import encode
from ollama_distributed.state.records import Advert, Member
from ollama_distributed.testing.virtual_time import EPOCH

DAY = EPOCH // 86400 * 86400


class Clock:
    def __init__(self) -> None:
        self.now = EPOCH + 40 * 86400

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


class World:
    """Nodes in one process; `away` do not answer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = Clock()
        self.state = ClusterState()
        self.nodes: dict[NodeId, NodeUsage] = {}
        self.away: set[NodeId] = set()

    async def start(self, name: str, *, server: bool = True, **settings: Any) -> NodeUsage:
        node = NodeId(name)
        self.away.discard(node)
        advert = Advert(
            node=node, name=name, role="server" if server else "node", version="1", boot="b", started_at=0.0
        )
        for key, record in (
            (keys.advert(node), advert),
            (keys.member(node), Member(node=node, status="online", since=0.0)),
        ):
            self.state = apply(self.state, key, encode(record), self.state.revision + 1)
        usage = self.nodes[node] = NodeUsage(
            Settings(name=name, data_dir=self.folder / name, **settings),
            node,
            self,
            folder=self.folder / name / "usage",
            state=lambda: self.state,
            clock=self.clock,
            busy=lambda: True,
            energy=lambda: None,
            parameters=lambda _: {},
        )
        await usage.open()
        return usage

    def _of(self, node: NodeId) -> NodeUsage:
        if node in self.away:
            raise Unavailable("it does not answer")
        return self.nodes[node]

    async def borrow(self, node: NodeId, ask: BorrowAsk) -> Borrowed:
        return self._of(node).lend(NodeId("x"), ask)

    async def left(self, node: NodeId, ask: LeftAsk) -> LeftTold:
        return self._of(node).left(ask)

    async def keep(self, node: NodeId, ask: KeepAsk) -> Kept:
        return self._of(node).keep(ask)

    async def counts(self, node: NodeId, ask: UsageAsk) -> Counts:
        return await self._of(node).counts(ask)

    async def told(self, at: str, *by: str) -> UsageAnswer:
        return await self.nodes[NodeId(at)].usage(by, DAY, self.clock.now + 86400)  # type: ignore[arg-type]


@asynccontextmanager
async def world(folder: Path) -> AsyncIterator[World]:
    one = World(folder)
    yield one
    for node in one.nodes.values():
        await node.close()


def ended(key: str = "k1", *, prompt: int = 10, answer: int = 5, **more: Any) -> Summary:
    known: dict[str, Any] = {
        "request_id": "r",
        "method": "POST",
        "route": "/api/generate",
        "status": 200,
        "outcome": "ok",
        "took_s": 1.0,
        "model": "m",
        "role": "user",
        "key_id": key,
        "team": "red",
        "usage": Usage(prompt_tokens=prompt, completion_tokens=answer, prompt_s=0.1, completion_s=0.4),
    }
    return Summary(**(known | more))


def rows(answer: UsageAnswer, by: str) -> dict[str | None, int]:
    return {getattr(row, by): row.requests for row in answer.rows}


def run(main: Any) -> None:
    asyncio.run(main)


def test_every_node_tells_of_all(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as all_:
            one, two, three = [await all_.start(name) for name in ("a", "b", "c")]
            one.count(ended())
            two.count(ended("k2"))
            two.count(ended("k2", node="a"))  # forwarded: that of the node that answered
            three.count(ended(outcome="error", status=502, usage=None))
            for at in ("a", "b", "c"):
                answer = await all_.told(at, "key")
                assert rows(answer, "key") == {"k1": 2, "k2": 2}
                assert (answer.total.errors, answer.total.prompt_tokens) == (1, 30)
                assert rows(await all_.told(at, "node"), "node") == {"a": 2, "b": 1, "c": 1}

    run(main())


def test_a_node_that_is_away_is_counted_from_its_copies(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as all_:
            one, _, mere = await all_.start("a"), await all_.start("b"), await all_.start("m", server=False)
            for _ in range(3):
                mere.count(ended())
                await mere.flush()
                await mere.copies.send()
            all_.away.add(NodeId("m"))
            answer = await all_.told("a", "key")
            assert rows(answer, "key") == {"k1": 3}
            assert answer.missing == ("m",)
            # A keeper that starts again has its copies, and takes what comes after them.
            await one.close()
            again = await all_.start("a")
            all_.away.add(NodeId("b"))
            assert rows(await all_.told("a", "key"), "key") == {"k1": 3}
            all_.away.clear()
            mere.count(ended())
            await mere.flush()
            await mere.copies.send()
            all_.away |= {NodeId("m"), NodeId("b")}
            assert rows(await all_.told("a", "key"), "key") == {"k1": 4}
            assert again.figures().copies >= 1
            all_.away.clear()

    run(main())


def test_what_was_flushed_outlives_a_crash_and_the_crash_is_told(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as all_:
            one = await all_.start("a")
            one.count(ended())
            await one.flush()
            one.count(ended())  # the last half second
            one._ledger._files.close()  # as after kill -9
            all_.clock.now += 60
            again = await all_.start("a")
            answer = await all_.told("a", "key")
            assert rows(answer, "key") == {"k1": 1}
            assert [(doubt.node, doubt.until) for doubt in answer.in_doubt] == [("a", all_.clock.now)]
            await again.close()
            await all_.start("a")
            assert len((await all_.told("a")).in_doubt) == 1, "an end in order adds none"

    run(main())


def test_a_full_disk_loses_nothing_that_comes_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with world(tmp_path) as all_:
            one = await all_.start("a")

            def full(*_: Any) -> None:
                raise OSError(28, "No space left on device")

            with monkeypatch.context() as patched:
                patched.setattr("os.fsync", full)
                one.count(ended())
                await one.flush()
                assert one.figures().failing
            assert rows(await all_.told("a", "key"), "key") == {"k1": 1}
            assert not one.figures().failing

    run(main())


def test_money_energy_and_csv(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as all_:
            prices = {"m*": {"input": 100_000.0, "output": 200_000.0}}
            one = await all_.start("a", prices=prices, power_watts=360.0, kwh_price=2.0, currency="EUR")
            one.count(ended("=cmd()"))
            all_.clock.now += 10
            await one.measure()
            (row,) = (await all_.told("a", "key")).rows
            assert row.cost == pytest.approx(2.0)
            assert row.energy_wh == pytest.approx(1.0)
            assert row.energy_cost == pytest.approx(0.002)
            text = csv_text(await all_.told("a", "key", "day"), ("key", "day"))
            head, line, *rest = text.splitlines()
            assert head.startswith("key,day,requests,errors")
            assert line.startswith("'=cmd(),"), "a spreadsheet must not run it"
            assert not rest

    run(main())


def test_names_that_clients_make_up_do_not_fill_the_ledger(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as all_:
            one = await all_.start("a")
            for number in range(50):
                one.count(ended(model=f"made-up-{number}", status=404, outcome="error", usage=None))
            assert one.figures().rows == 0
            await one.flush()
            assert one.figures().rows == 1
            assert rows(await all_.told("a", "model"), "model") == {"": 50}

    run(main())


def test_who_holds_shares(tmp_path: Path) -> None:
    """A node that went offline a moment ago may live and only be cut off: it keeps its share."""

    async def main() -> None:
        async with world(tmp_path) as all_:
            one = await all_.start("a")
            await all_.start("b")
            await all_.start("m", server=False)
            gateways = one.meter._gateways
            assert gateways.holders() == ("a", "b", "m")
            assert gateways.holders() is gateways.holders()
            gone = Member(node=NodeId("b"), status="offline", since=all_.clock.now)
            all_.state = apply(all_.state, keys.member("b"), encode(gone), all_.state.revision + 1)
            assert gateways.holders() == ("a", "b", "m")
            assert gateways.living((NodeId("b"), NodeId("m"))) == ["m"]
            all_.clock.now += 301
            assert gateways.holders() == ("a", "m")

    run(main())


def test_rapl_and_nvml_are_read_where_they_are(tmp_path: Path) -> None:
    zone = tmp_path / "intel-rapl:0"
    (tmp_path / "intel-rapl:0:0").mkdir()
    zone.mkdir()
    (zone / "max_energy_range_uj").write_text("1000000000")
    (zone / "energy_uj").write_text("999000000")
    meter = EnergyMeter(powercap=tmp_path)
    (zone / "energy_uj").write_text("4000000")  # it wrapped around
    assert meter.read() == pytest.approx(5.0)
    assert EnergyMeter(powercap=tmp_path / "none").read() is None

    class Library:
        NVMLError = RuntimeError
        told = 1000

        def nvmlDeviceGetCount(self) -> int:  # noqa: N802  NVML's names
            return 1

        def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
            return index

        def nvmlDeviceGetTotalEnergyConsumption(self, _: int) -> int:  # noqa: N802
            return self.told

    library = Library()
    gpus = EnergyMeter(Nvml(library), powercap=tmp_path / "none")
    assert gpus.read() is None, "only a difference is energy"
    library.told = 3500
    assert gpus.read() == pytest.approx(2.5)
