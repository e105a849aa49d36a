"""What was counted is added up exactly, folded without loss, and copied as it is."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.access.usage import (
    DAY_S,
    HOUR_S,
    Book,
    Price,
    add_request,
    check_by,
    check_day,
    energy_row,
    grouped,
    merged,
    model_label,
    month_of,
    price_of,
    shown,
)
from ollama_distributed.base.errors import Invalid
from ollama_distributed.base.inference import Usage
from ollama_distributed.base.usage import GROUPS, Row, RowKey, Sums


class Spent(msgspec.Struct, frozen=True, kw_only=True):
    """One request that ended."""

    at: float
    key: str
    team: str
    model: str
    node: str
    outcome: str
    usage: Usage | None = None

    def row(self) -> RowKey:
        return RowKey(int(self.at) // HOUR_S * HOUR_S, self.key, self.team, self.model, self.node)

    def sums(self) -> Sums:
        sums = Sums()
        add_request(sums, Price(), self.outcome, self.usage)
        return sums


NOON = 1_795_435_200.0
"""2026-11-23 12:00 UTC."""

spent = st.builds(
    Spent,
    at=st.integers(0, 40 * DAY_S).map(lambda before: NOON - before),
    key=st.sampled_from(["k1", "k2", "local"]),
    team=st.sampled_from(["red", "blue"]),
    model=st.sampled_from(["m:latest", "n:1b"]),
    node=st.sampled_from(["a", "b"]),
    outcome=st.sampled_from(["ok", "error", "cancelled"]),
    usage=st.none()
    | st.builds(
        Usage,
        prompt_tokens=st.integers(0, 1000),
        completion_tokens=st.integers(0, 1000),
        total_s=st.just(4.0),
        prompt_s=st.just(1.0),
        completion_s=st.just(2.0),
    ),
)
batches = st.lists(st.lists(spent, max_size=5), max_size=12)


def entered(many: list[list[Spent]], book: Book | None = None) -> Book:
    book = book or Book()
    for rows in many:
        book.enter(book.batch + 1, [Row(one.row(), one.sums()) for one in rows])
    return book


def counts(book: Book) -> tuple[int, int, int]:
    total = Sums()
    for row in book.rows():
        total.add(row.sums)
    return total.requests, total.prompt_tokens, total.completion_tokens


@given(batches)
def test_nothing_is_lost_or_counted_twice_however_it_is_grouped(many: list[list[Spent]]) -> None:
    flat = [one for rows in many for one in rows]
    book = entered(many)
    for by in ((), ("key",), ("model", "node"), GROUPS):
        groups = grouped(book.rows(), by, 0, 2 * NOON)
        assert sum(group.sums.requests for group in groups) == len(flat)
        tokens = sum(one.usage.prompt_tokens for one in flat if one.usage is not None)
        assert sum(group.sums.prompt_tokens for group in groups) == tokens


@given(batches, batches)
def test_a_copy_that_takes_what_changed_is_the_same_book(
    before: list[list[Spent]], after: list[list[Spent]]
) -> None:
    book, copy = entered(before), Book()

    def sent(since: int) -> None:
        rows = msgspec.msgpack.decode(msgspec.msgpack.encode(book.since(since)), type=tuple[Row, ...])
        copy.replace(book.batch, rows)

    sent(0)
    entered(after, book)
    book.fold(NOON - 2 * DAY_S, 0.0)
    sent(copy.batch)
    copy.fold(NOON - 2 * DAY_S, 0.0)
    assert {row.key: row.sums for row in copy.rows()} == {row.key: row.sums for row in book.rows()}


@given(batches)
def test_days_hold_what_their_hours_held(many: list[list[Spent]]) -> None:
    book = entered(many)
    before = counts(book)
    by_day = {group.names: group.sums.requests for group in grouped(book.rows(), ("day", "key"), 0, 2 * NOON)}
    book.fold(NOON - 3 * DAY_S, 0.0)
    assert counts(book) == before
    assert {
        group.names: group.sums.requests for group in grouped(book.rows(), ("day", "key"), 0, 2 * NOON)
    } == by_day
    assert not any(not row.key.days and row.key.start < NOON - 4 * DAY_S for row in book.rows())


def test_what_is_too_old_is_forgotten() -> None:
    book = entered([[one(NOON - 40 * DAY_S)], [one(NOON)]])
    book.fold(NOON - DAY_S, NOON - 32 * DAY_S)
    assert counts(book)[0] == 1


def one(at: float, **fields: object) -> Spent:
    known = {"at": at, "key": "k1", "team": "red", "model": "m:latest", "node": "a", "outcome": "ok"}
    return Spent(**(known | fields))  # type: ignore[arg-type]


def test_the_month_is_kept_at_hand_by_key_and_by_team() -> None:
    usage = Usage(prompt_tokens=5, completion_tokens=7)
    book = entered([[one(NOON, usage=usage), one(NOON, key="k2")], [one(NOON - 30 * DAY_S)]])
    assert book.month(NOON, key="k1").prompt_tokens == 5
    assert book.month(NOON, team="red").requests == 2
    assert book.month(NOON - 30 * DAY_S, key="k1").requests == 1
    assert month_of(NOON)[0] == check_day("2026-11-01", "from")
    assert month_of(check_day("2026-12-31", "from"))[1] == check_day("2027-01-01", "from")


def test_energy_goes_to_who_had_the_work_done() -> None:
    usage = Usage(prompt_tokens=1, prompt_s=1.0)
    rows = [
        *(
            Row(spent.row(), spent.sums())
            for spent in (one(NOON, usage=usage), one(NOON, key="k2", usage=usage))
        ),
        Row(energy_row(NOON, "a"), Sums(joules=7200.0)),
    ]
    groups = {group.names: shown(group, ("key",), 0.5) for group in grouped(rows, ("key",), 0, 2 * NOON)}
    assert groups[("k1",)].energy_wh == pytest.approx(1.0)
    assert groups[("k2",)].energy_cost == pytest.approx(0.0005)
    only = grouped(rows, (), 0, 2 * NOON, key="k1")
    assert [group.sums.joules for group in only] == [3600.0]
    assert list(groups) == [("k1",), ("k2",)], "a node's own row is no one's request"


def test_prices() -> None:
    prices = {"llama*": Price(input=1.0, output=2.0, cached=0.5), "*": Price(output=1.0)}
    usage = Usage(prompt_tokens=3_000_000, cached_tokens=1_000_000, completion_tokens=1_000_000)
    assert price_of(prices, "llama3:8b").cost(usage) == pytest.approx(4.5)
    assert price_of(prices, "gemma").cost(usage) == pytest.approx(1.0)
    assert price_of({}, "gemma").cost(usage) == 0.0


def test_one_spelling_of_a_model() -> None:
    assert model_label("M") == model_label("registry.ollama.ai/library/M:latest")
    assert model_label("../../etc") == ""


def test_what_cannot_be_asked() -> None:
    assert check_by("key, day") == ("key", "day")
    for text in ("keys", "key,key"):
        with pytest.raises(Invalid):
            check_by(text)
    for day in ("yesterday", "2026-13-01", "2026-1-1T00"):
        with pytest.raises(Invalid):
            check_day(day, "from")


def test_books_are_put_together() -> None:
    left, right = entered([[one(NOON)]]), entered([[one(NOON), one(NOON, key="k2")]])
    groups = merged(grouped(book.rows(), ("key",), 0, 2 * NOON) for book in (left, right))
    assert [(group.names, group.sums.requests) for group in groups] == [(("k1",), 2), (("k2",), 1)]


def test_old_bytes_of_a_row_are_read() -> None:
    """What ledgers of released versions hold."""
    old = b'[[1795435200,"k1","red","m:latest","a",false],{"requests":2,"prompt_tokens":9,"cost":0.5}]'
    row = msgspec.json.decode(old, type=Row)
    assert row.key == RowKey(int(NOON) // HOUR_S * HOUR_S, "k1", "red", "m:latest", "a")
    assert (row.sums.requests, row.sums.prompt_tokens, row.sums.cost) == (2, 9, 0.5)
    assert msgspec.json.encode(row) == old
