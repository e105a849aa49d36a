"""Disks over REST and in the metrics, and how the command line shows them."""

from __future__ import annotations

import httpx
import pytest
from tests.gateway_bench import gateway

from ollama_distributed.base.disk import DiskAnswer, DiskFigures, EvictAnswer, ModelOnDisk, ScrubRow
from ollama_distributed.base.errors import Conflict, NotFound
from ollama_distributed.cli import disk_view
from ollama_distributed.cli.tables import Look
from ollama_distributed.gateway.metrics import GatewayMetrics
from ollama_distributed.testing.fake_cluster import FakeCluster
from ollama_distributed.testing.inference import ScriptedInference

GB = 10**9
NOW = 1_700_000_000.0
ANSWER = DiskAnswer(
    node="alpha-id",
    name="alpha",
    total_bytes=500 * GB,
    free_bytes=120 * GB,
    used_bytes=40 * GB,
    quota_bytes=50 * GB,
    low_water_bytes=2 * GB,
    coming_bytes=3 * GB,
    room_bytes=7 * GB,
    evictable_bytes=12 * GB,
    hits=17,
    misses=3,
    evictions=2,
    evicted_bytes=9 * GB,
    refused=1,
    scrubbed_bytes=80 * GB,
    corrupt=1,
    partial_bytes=4 * GB,
    models=(
        ModelOnDisk(
            model="old:latest",
            size_bytes=12 * GB,
            frees_bytes=12 * GB,
            last_used=NOW - 86_400 * 3,
            others=("b", "c", "d", "e"),
        ),
        ModelOnDisk(model="mine:latest", size_bytes=20 * GB, last_used=NOW - 300, kept="last"),
        ModelOnDisk(model="bad:latest", size_bytes=8 * GB, last_used=NOW, damaged="a file of it is missing"),
    ),
    scrub=ScrubRow(files=9, corrupt=1, began_at=NOW - 500, ended_at=NOW - 60),
)


class Disks:
    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []

    def figures(self) -> DiskFigures:
        return ANSWER

    async def disk(self, node: str) -> DiskAnswer:
        if node != "alpha":
            raise NotFound(f"there is no node {node!r}")
        return ANSWER

    async def evict(self, model: str, node: str, *, last_copy: bool) -> EvictAnswer:
        self.asked.append((model, node, str(last_copy)))
        if model == "mine" and not last_copy:
            raise Conflict("mine:latest stays: no other node holds it")
        return EvictAnswer(model=model, node="alpha-id", name="alpha", freed_bytes=GB)

    async def scrub(self, node: str) -> ScrubRow:
        self.asked.append(("scrub", node))
        return ScrubRow(running=True, asked=True)


@pytest.fixture
def disks() -> Disks:
    return Disks()


@pytest.fixture
def http(disks: Disks) -> httpx.AsyncClient:
    app = gateway(ScriptedInference([]), cluster=FakeCluster("alpha", "beta"), disks=disks)
    transport = httpx.ASGITransport(app=app, client=("127.0.0.1", 5))
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8080")


async def test_disk_and_evict(http: httpx.AsyncClient, disks: Disks) -> None:
    async with http:
        shown = (await http.get("/api/v1/nodes/alpha/disk")).json()
        assert shown["models"][1]["kept"] == "last"
        assert shown["quota_bytes"] == 50 * GB
        mistyped = await http.get("/api/v1/nodes/alpa/disk")
        assert mistyped.status_code == 404
        assert "did you mean alpha?" in mistyped.text
        assert (await http.post("/api/v1/models/old:latest/evict")).json()["freed_bytes"] == GB
        assert (await http.post("/api/v1/models/mine/evict", json={"node": "alpha"})).status_code == 409
        body = {"node": "alpha", "last_copy": True}
        assert (await http.post("/api/v1/models/mine/evict", json=body)).status_code == 200
        assert (await http.post("/api/v1/models/mine/evict", json={"nodes": "x"})).status_code == 400
        assert disks.asked == [
            ("old:latest", "", "False"),
            ("mine", "alpha", "False"),
            ("mine", "alpha", "True"),
        ]
        assert (await http.post("/api/v1/nodes/alpha/scrub")).status_code == 403, "it needs the admin's key"


async def test_metrics_tell_of_this_disk(http: httpx.AsyncClient) -> None:
    async with http:
        text = (await http.get("/metrics")).text
    assert "ollama_distributed_disk_hits_total 17" in text
    assert f"ollama_distributed_disk_used_bytes {40 * GB}" in text
    without = GatewayMetrics().render([], DiskFigures())
    assert "# TYPE ollama_distributed_disk_quota_bytes gauge\n# HELP" in without, "no quota, no value"


def test_the_disk_as_text() -> None:
    text = disk_view.disk_text(ANSWER, NOW, Look())
    assert "40 GB of 50 GB" in text
    assert "7 GB, 12 GB more when models go, besides 3 GB that are coming" in text
    assert "9 files 60s ago, 1 damaged" in text
    rows = [line.split() for line in text.splitlines() if ":latest" in line and not line.startswith("!")]
    assert rows[0] == ["old:latest", "12", "GB", "12", "GB", "3d", "ago", "may", "go", "b,", "c,", "d", "+1"]
    assert rows[1][-3:] == ["last", "copy", "-"]
    assert "! bad:latest: a file of it is missing" in text
    assert disk_view.disk_lines(ANSWER)["mine:latest"] == ["last copy", "-"]
