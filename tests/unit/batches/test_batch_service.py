"""Batches from their file to their results, on a real disk, with a scripted node behind them."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.limits import SOON_S

from ollama_distributed.adapters.batches.disk import BatchDisk
from ollama_distributed.base.batches import FINAL, Batch, BatchAsk, FileObject
from ollama_distributed.base.errors import BodyTooLarge, Conflict, DiskFull, NotFound
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import KeyId, NodeId
from ollama_distributed.batches import flights
from ollama_distributed.batches.files import Files
from ollama_distributed.batches.plan import Owner, Seats, owner_of
from ollama_distributed.batches.ports import Answer
from ollama_distributed.batches.records import Asked, CreateAsked, Limits, ListAsked, ReadAsked
from ollama_distributed.batches.service import Batches

CHAT = "/v1/chat/completions"
IDENTITY = Identity("user", KeyId("k1"))
OWNER = owner_of(IDENTITY)


class Clock:
    def __init__(self) -> None:
        self.wall = 1_700_000_000.0
        self.now = 0.0

    def time(self) -> float:
        return self.wall

    def monotonic(self) -> float:
        return self.now


class Node:
    """What the lines are asked of, and how busy it is."""

    def __init__(self, root: Path, *, node: str = "n1", kept_s: int = 3600, **limits: int) -> None:
        self.root = root
        self.clock = Clock()
        self.asked: Counter[str] = Counter()
        self.looks: Counter[str] = Counter()
        """At how busy it is, and at who an owner is."""
        self.running = 0
        self.most = 0
        self.seats = Seats(slots=4)
        self.owner: Identity | None = IDENTITY
        self.answers: Callable[[dict[str, Any], int], Answer] = lambda _body, _n: Answer(200, b"{}")
        self.gate = asyncio.Event()
        self.gate.set()
        self.holds_after = 10**9
        """Lines; from then on none is answered."""
        self.limits = Limits(**{"file_bytes": 10**6, "total_bytes": 2 * 10**6, "kept_s": kept_s, **limits})
        self.disk = BatchDisk(root)
        self.files = Files(
            NodeId(node),
            "one",
            self.disk,
            self.limits,
            self.clock,
            used_by=lambda file_id: self.batches.uses(file_id),
        )
        self.batches = Batches(
            NodeId(node),
            "one",
            self.disk,
            self.files,
            ask=self.ask,
            room=self.room,
            known=self.known,
            limits=self.limits,
            clock=self.clock,
            chance=random.Random(1),
        )

    def room(self, _model: str) -> Seats:
        self.looks["room"] += 1
        return self.seats

    def known(self, _owner: Owner) -> Identity | None:
        self.looks["owner"] += 1
        return self.owner

    async def ask(self, endpoint: str, body: bytes, identity: Identity, request_id: str, /) -> Answer:
        assert endpoint == CHAT
        assert identity == IDENTITY
        assert request_id.startswith("batch_req_")
        said = json.loads(body)
        self.asked[said["id"]] += 1
        if self.asked.total() > self.holds_after:
            self.gate.clear()
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.gate.wait()
            await asyncio.sleep(0)
            return self.answers(said, self.asked[said["id"]])
        finally:
            self.running -= 1

    async def send(self, *lines: bytes, owner: Owner = OWNER) -> FileObject:
        async def chunks() -> AsyncIterator[bytes]:
            for line in lines:
                yield line + b"\n"

        return await self.files.receive(owner, "in.jsonl", chunks())

    async def submit(self, count: int, **ask: Any) -> Batch:
        file = await self.send(*(row(number) for number in range(count)))
        return await self.batches.create(
            CreateAsked(identity=IDENTITY, ask=BatchAsk(input_file_id=file.id, endpoint=CHAT, **ask))
        )

    def batch(self, batch_id: str) -> Batch:
        return self.batches.get(Asked(identity=IDENTITY, id=batch_id))

    async def ended(self, batch_id: str) -> Batch:
        await until(lambda: self.batch(batch_id).status in FINAL)
        return self.batch(batch_id)

    async def results(self, file_id: str | None) -> list[dict[str, Any]]:
        assert file_id is not None
        data = await self.files.read(ReadAsked(identity=IDENTITY, id=file_id, offset=0, length=10**6))
        return [json.loads(line) for line in data.splitlines()]


def row(number: int, **changes: Any) -> bytes:
    body = {"model": "m", "id": f"r{number}"}
    return json.dumps(
        {"custom_id": f"r{number}", "method": "POST", "url": CHAT, "body": body, **changes}
    ).encode()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not condition():
            await asyncio.sleep(0.002)


@asynccontextmanager
async def working(node: Node) -> AsyncIterator[Node]:
    await node.files.start()
    await node.batches.start()
    task = asyncio.create_task(node.batches.run())
    try:
        yield node
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_batch_from_its_file_to_its_results(tmp_path: Path) -> None:
    async with working(Node(tmp_path)) as node:
        node.answers = lambda body, _n: (
            Answer(400, b'{"error":{}}') if body["id"] == "r3" else Answer(200, json.dumps(body).encode())
        )
        batch = await node.submit(40, metadata={"a": "b"})
        assert (batch.status, batch.metadata, batch.node) == ("validating", {"a": "b"}, "one")
        ended = await node.ended(batch.id)
        assert ended.status == "completed"
        counts = ended.request_counts
        assert (counts.total, counts.completed, counts.failed) == (40, 39, 1)
        assert None not in (ended.in_progress_at, ended.finalizing_at, ended.completed_at)
        output = await node.results(ended.output_file_id)
        assert {one["custom_id"] for one in output} == {f"r{number}" for number in range(40) if number != 3}
        assert set(output[0]) == {"id", "custom_id", "response", "error"}
        assert output[0]["response"]["body"]["id"] == output[0]["custom_id"]
        assert output[0]["response"]["status_code"] == 200
        (wrong,) = await node.results(ended.error_file_id)
        assert (wrong["custom_id"], wrong["response"]["status_code"]) == ("r3", 400)
        assert node.most <= 3, "of four slots one stays free"
        listed = node.files.list(ListAsked(identity=IDENTITY, limit=10, purpose="batch_output"))
        assert {file.id for file in listed} == {ended.output_file_id, ended.error_file_id}


async def test_another_key_sees_nothing(tmp_path: Path) -> None:
    other = Identity("user", KeyId("k2"))
    async with working(Node(tmp_path)) as node:
        batch = await node.submit(1)
        await node.ended(batch.id)
        for look in (
            lambda: node.batches.get(Asked(identity=other, id=batch.id)),
            lambda: node.files.get(Asked(identity=other, id=batch.input_file_id)),
        ):
            with pytest.raises(NotFound):
                look()
        with pytest.raises(NotFound):
            await node.files.read(ReadAsked(identity=other, id=batch.input_file_id, offset=0, length=9))
        with pytest.raises(NotFound):
            await node.files.delete(Asked(identity=other, id=batch.input_file_id))
        with pytest.raises(NotFound):
            await node.batches.cancel(Asked(identity=other, id=batch.id))
        ask = BatchAsk(input_file_id=batch.input_file_id, endpoint=CHAT)
        with pytest.raises(NotFound):
            await node.batches.create(CreateAsked(identity=other, ask=ask))
        assert node.batches.list(ListAsked(identity=other, limit=9)) == []
        assert node.files.list(ListAsked(identity=other, limit=9)) == []


async def test_lines_that_are_done_are_not_done_again(tmp_path: Path) -> None:
    first = Node(tmp_path)
    async with working(first):
        first.holds_after = 10
        batch = await first.submit(30)
        await until(lambda: first.batch(batch.id).request_counts.completed >= 8)
    done = set((await first.disk.done(batch.id)).completed)
    assert 8 <= len(done) < 30
    with (tmp_path / "work" / batch.id / "output.jsonl").open("ab") as file:
        file.write(b'{"id":"half a li')  # as a killed node leaves it
    second = Node(tmp_path)
    async with working(second):
        ended = await second.ended(batch.id)
        assert not done & second.asked.keys()
        assert set(second.asked) | done == {f"r{number}" for number in range(30)}
        assert ended.request_counts.completed == 30
        output = await second.results(ended.output_file_id)
        assert sorted(one["custom_id"] for one in output) == sorted(f"r{number}" for number in range(30))
    third = Node(tmp_path)
    async with working(third):
        assert third.batch(batch.id) == ended
        assert len(await third.results(ended.output_file_id)) == 30
        assert not third.asked


async def test_a_batch_waits_for_idle_slots(tmp_path: Path) -> None:
    async with working(Node(tmp_path)) as node:
        node.seats = Seats(slots=2, busy=2, queued=1)
        batch = await node.submit(3)
        await until(lambda: node.looks["room"] > 1)
        assert node.batch(batch.id).status == "in_progress"
        assert not node.asked
        node.seats = Seats(slots=2)
        assert (await node.ended(batch.id)).request_counts.completed == 3
        assert node.most == 1


async def test_lines_for_many_models_do_not_all_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flights, "MOST_RUNNING", 5)
    async with working(Node(tmp_path)) as node:
        node.seats = Seats()
        node.gate.clear()
        lines = (row(n, body={"model": f"m{n}", "id": f"r{n}"}) for n in range(30))
        ask = BatchAsk(input_file_id=(await node.send(*lines)).id, endpoint=CHAT)
        batch = await node.batches.create(CreateAsked(identity=IDENTITY, ask=ask))
        await until(lambda: node.running == 5)
        node.gate.set()
        assert (await node.ended(batch.id)).request_counts.completed == 30
        assert node.most == 5


async def test_models_that_no_line_names_any_more_are_forgotten() -> None:
    clock = Clock()
    berths = flights.Berths(lambda _: Seats(), clock)
    for model in ("made up", "runs", "new"):
        clock.now += 100.0
        await berths.take(model)
    berths.leave("made up")
    berths.leave("new")
    berths.forget(150.0)
    assert len(berths) == 2
    clock.now += 200.0
    berths.forget(150.0)
    berths.leave("runs")
    assert len(berths) == 1


async def test_a_disk_that_refuses_to_tidy_up_ends_no_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = asyncio.Event()

    async def refuse(_: float) -> None:
        tried.set()
        raise DiskFull("no room")

    node = Node(tmp_path)
    monkeypatch.setattr(node.files, "sweep", refuse)
    async with working(node):
        await tried.wait()
        assert (await node.ended((await node.submit(3)).id)).request_counts.completed == 3


async def test_what_was_refused_for_now_is_asked_again(tmp_path: Path) -> None:
    async with working(Node(tmp_path)) as node:
        node.answers = lambda _body, n: Answer(429, b"{}", 0.01) if n == 1 else Answer(200, b"{}")
        ended = await node.ended((await node.submit(2)).id)
        assert ended.request_counts.completed == 2
        assert set(node.asked.values()) == {2}


async def test_it_is_cancelled_with_what_is_there(tmp_path: Path) -> None:
    async with working(Node(tmp_path)) as node:
        node.holds_after = 8
        batch = await node.submit(20)
        await until(lambda: node.batch(batch.id).request_counts.completed >= 5)
        await until(lambda: node.running > 0)
        assert (await node.batches.cancel(Asked(identity=IDENTITY, id=batch.id))).status == "cancelling"
        with pytest.raises(Conflict):
            await node.files.delete(Asked(identity=IDENTITY, id=batch.input_file_id))
        ended = await node.ended(batch.id)
        assert (ended.status, node.running) == ("cancelled", 0)
        assert len(await node.results(ended.output_file_id)) == ended.request_counts.completed >= 5
        await node.files.delete(Asked(identity=IDENTITY, id=batch.input_file_id))


async def test_its_window_closes(tmp_path: Path) -> None:
    node = Node(tmp_path)
    async with working(node):
        node.holds_after = 6
        batch = await node.submit(12, completion_window="30m")
        await until(lambda: node.batch(batch.id).request_counts.completed >= 4)
    late = Node(tmp_path)
    late.clock.wall += 3600
    async with working(late):
        ended = await late.ended(batch.id)
        assert ended.status == "expired"
        counts = ended.request_counts
        assert counts.completed + counts.failed == 12
        assert counts.completed >= 4
        errors = await late.results(ended.error_file_id)
        assert {one["error"]["code"] for one in errors} == {"batch_expired"}
        assert errors[0]["response"] is None
        assert not late.asked


async def test_a_key_that_is_revoked_ends_its_batches(tmp_path: Path) -> None:
    async with working(Node(tmp_path)) as node:
        node.owner = None
        batch = await node.submit(3)
        await until(lambda: node.looks["owner"] > 0)
        assert node.batch(batch.id).status == "in_progress", "it may come with the cluster's state"
        node.clock.now += 100
        ended = await node.ended(batch.id)
        assert ended.status == "failed"
        assert ended.errors is not None
        assert ended.errors.data[0].code == "key_not_valid"
        assert not node.asked


async def test_a_bad_file_fails_as_a_whole(tmp_path: Path) -> None:
    async with working(Node(tmp_path)) as node:
        file = await node.send(row(1), b"no", row(1))
        ask = BatchAsk(input_file_id=file.id, endpoint=CHAT)
        ended = await node.ended((await node.batches.create(CreateAsked(identity=IDENTITY, ask=ask))).id)
        assert ended.status == "failed"
        assert ended.failed_at is not None
        assert ended.errors is not None
        assert [fault.line for fault in ended.errors.data] == [2, 3]
        assert not node.asked


async def test_files_are_bounded(tmp_path: Path) -> None:
    node = Node(tmp_path, file_bytes=1000, total_bytes=1500)
    async with working(node):
        with pytest.raises(BodyTooLarge):
            await node.send(b"x" * 1000)
        kept = await node.send(b"x" * 998)
        with pytest.raises(DiskFull):
            await node.send(b"x" * 900)
        assert sorted(path.suffix for path in (tmp_path / "files").iterdir()) == [".data", ".json"]
        await node.files.delete(Asked(identity=IDENTITY, id=kept.id))
        assert (await node.send(b"x" * 900)).bytes == 901
        (tmp_path / "files" / "file-n1-half.data").write_bytes(b"as a killed node leaves it")
    again = Node(tmp_path)
    await again.files.start()
    assert len(again.files.list(ListAsked(identity=IDENTITY, limit=9))) == 1
    assert len(list((tmp_path / "files").iterdir())) == 2


async def test_old_results_go(tmp_path: Path) -> None:
    node = Node(tmp_path)
    async with working(node):
        batch = await node.ended((await node.submit(1)).id)
    late = Node(tmp_path)
    late.clock.wall += 7200
    async with working(late):
        await until(lambda: not late.batches.list(ListAsked(identity=IDENTITY, limit=9)))
        await until(lambda: len(late.files.list(ListAsked(identity=IDENTITY, limit=9))) == 1)
        assert late.files.get(Asked(identity=IDENTITY, id=batch.input_file_id))
        assert not (tmp_path / "work" / batch.id).exists()
