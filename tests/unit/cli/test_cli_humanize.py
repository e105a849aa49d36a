"""Sizes, times and shares, in Ollama's words."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from ollama_distributed.cli import humanize

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("bytes_", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 KB"),
        (1500, "1.5 KB"),
        (98_000_000, "98 MB"),
        (1_100_000_000, "1.1 GB"),
        (12_600_000_000, "12 GB"),
        (2 * 10**12, "2 TB"),
    ],
)
def test_size(bytes_: int, text: str) -> None:
    assert humanize.size(bytes_) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "Less than a second"),
        (1, "1 second"),
        (59, "59 seconds"),
        (60, "About a minute"),
        (600, "10 minutes"),
        (3600, "About an hour"),
        (47 * 3600, "47 hours"),
        (3 * 86400, "3 days"),
        (21 * 86400, "3 weeks"),
        (100 * 86400, "3 months"),
        (3 * 365 * 86400, "3 years"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert humanize.duration(seconds) == text


def test_times() -> None:
    assert humanize.ago(None, NOW) == "Never"
    assert humanize.ago(datetime.fromtimestamp(0, UTC), NOW) == "-"
    assert humanize.ago(NOW - timedelta(days=3), NOW) == "3 days ago"
    assert humanize.until(NOW + timedelta(minutes=4, seconds=1), NOW) == "4 minutes from now"
    assert humanize.until(NOW - timedelta(seconds=1), NOW) == "Stopping..."
    assert humanize.until(NOW.replace(year=2318), NOW) == "Forever"


@pytest.mark.parametrize(
    ("size", "vram", "text"),
    [(10, 0, "100% CPU"), (10, 10, "100% GPU"), (10, 4, "60%/40% CPU/GPU"), (0, 5, "Unknown")],
)
def test_processor(size: int, vram: int, text: str) -> None:
    assert humanize.processor(size, vram) == text


@pytest.mark.parametrize(
    ("ns", "text"),
    [(0, "0ns"), (1500, "1.5µs"), (12_340_000, "12.34ms"), (1_500_000_000, "1.5s"), (61 * 10**9, "1m1s")],
)
def test_precise(ns: int, text: str) -> None:
    assert humanize.precise(ns) == text


def test_count() -> None:
    assert humanize.count(134_515_008) == "134.5M"
    assert humanize.count(7_000_000_000) == "7.0B"
