"""Usage as a person reads it."""

from __future__ import annotations

from ollama_distributed.base.usage import Doubt, UsageAnswer, UsageRow
from ollama_distributed.cli.tables import Look
from ollama_distributed.cli.usage_view import bar, energy, money, usage_lines, usage_text
from ollama_distributed.client.usage import csv, get

ROWS = (
    UsageRow(
        key="k1", model="m", requests=10, prompt_tokens=9000, cached_tokens=4500, completion_s=5.0, cost=2.0
    ),
    UsageRow(key="k2", model="m", requests=1, errors=1, completion_tokens=90, energy_wh=1.5),
)
TOTAL = UsageRow(requests=11, errors=1, prompt_tokens=9000, completion_tokens=90, cost=2.0, energy_wh=1.5)
ANSWER = UsageAnswer(
    start="2026-11-01",
    end="2026-11-23",
    by=("key", "model"),
    rows=ROWS,
    total=TOTAL,
    currency="EUR",
    in_doubt=(Doubt(node="gpu1", at=1.0, until=2.0), Doubt(node="gpu1", at=90_000.0, until=90_001.0)),
    missing=("gpu2",),
)


def test_rows_bars_total_and_what_is_in_doubt() -> None:
    text = usage_text(ANSWER, Look(bars=True))
    head, first, second, total, *notes = text.splitlines()
    assert head.split()[:3] == ["KEY", "MODEL", "REQUESTS"]
    assert "COST EUR" in head
    assert "█" * 16 in first
    assert "9,000" in first
    assert "50%" in first
    assert "500 ms" in first
    assert "█" not in second
    assert total.split()[:2] == ["all", "11"]
    said = " ".join(notes)
    assert "gpu2" in said
    assert said.count("gpu1 ended without closing its ledger at 1970-01-02 01:00 (and 1 more):") == 1


def test_one_row_needs_no_total_and_free_things_no_column() -> None:
    row = UsageRow(day="2026-11-23", requests=1)
    text = usage_text(
        UsageAnswer(start="2026-11-23", end="2026-11-23", by=("day",), rows=(row,), total=row), Look()
    )
    assert len(text.splitlines()) == 3
    assert "COST" not in text
    assert "ENERGY" not in text


def test_nothing_was_used() -> None:
    answer = UsageAnswer(start="a", end="b", by=("day",), rows=(), total=UsageRow())
    assert "all" in usage_text(answer, Look(bars=True))


def test_lines_of_a_watch() -> None:
    assert usage_lines(ANSWER)["k1 m"] == ["requests=10", "in=9000", "out=0"]


def test_figures() -> None:
    assert bar(0, 10) == ""
    assert bar(10, 10) == "█" * 16
    assert len(bar(1e-9, 10)) == 1
    assert energy(2500.0) == "2.50 kWh"
    assert money(0.00012) == "0.0001"


def test_what_the_sdk_asks_for() -> None:
    assert get(by=["key", "day"], start="2026-11-01", key="k1").path == (
        "/api/v1/usage?by=key%2Cday&from=2026-11-01&key=k1&team=&format=json"
    )
    assert csv().decode(b"a,b\r\n") == "a,b\r\n"
