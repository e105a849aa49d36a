"""Counts who used what: rows per hour, key, team, model and node; folded into days when old. Pure.

A book is one node's. Its rows only grow, and each says in which batch of the ledger it changed
last: another node keeps a copy by taking the rows that changed since the batch that it has.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase

import msgspec

from ollama_distributed.base.errors import Invalid, InvalidName
from ollama_distributed.base.inference import Usage
from ollama_distributed.base.usage import GROUPS, By, Row, RowKey, Sums, UsageRow
from ollama_distributed.models.names import ModelName

HOUR_S, DAY_S = 3600, 86400
JOULES_PER_WH = 3600.0
MILLION = 1_000_000
MAX_GROUPS = 100_000
"""Rows of one answer; more is a question for a file, not for a page."""


class Price(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of one million tokens."""

    input: float = 0.0
    output: float = 0.0
    cached: float | None = None
    """Of prompt tokens that the prefix cache held; None: as `input`."""

    def cost(self, usage: Usage) -> float:
        cached = self.input if self.cached is None else self.cached
        fresh = usage.prompt_tokens - usage.cached_tokens
        total = fresh * self.input + usage.cached_tokens * cached + usage.completion_tokens * self.output
        return total / MILLION


FREE = Price()


def price_of(prices: Mapping[str, Price], model: str) -> Price:
    """Of the first pattern that fits the name as people see it (`llama3*`); free if none does."""
    return next((price for glob, price in prices.items() if fnmatchcase(model, glob)), FREE)


def model_label(name: str) -> str:
    """One spelling of a model's name."""
    try:
        return ModelName.parse(name).display
    except InvalidName:
        return ""


def add_request(sums: Sums, price: Price, outcome: str, usage: Usage | None) -> None:
    """One more that ended: `ok`, `error` or `cancelled`."""
    sums.requests += 1
    if outcome == "error":
        sums.errors += 1
    elif outcome == "cancelled":
        sums.cancelled += 1
    if usage is None:
        return
    sums.prompt_tokens += usage.prompt_tokens
    sums.cached_tokens += usage.cached_tokens
    sums.completion_tokens += usage.completion_tokens
    sums.wait_s += usage.wait_s
    sums.load_s += usage.load_s
    sums.prompt_s += usage.prompt_s
    sums.completion_s += usage.completion_s
    if price is not FREE:
        sums.cost += price.cost(usage)


def energy_row(at: float, node: str) -> RowKey:
    """Where a node's own energy is counted; answers show it with those who had the work done."""
    return RowKey(int(at) // HOUR_S * HOUR_S, "", "", "", node)


_NOTHING = Sums()
"""Never added to."""


class Book:
    """Rows, and the batch in which each changed last."""

    def __init__(self) -> None:
        self._rows: dict[RowKey, tuple[Sums, int]] = {}
        self._months: dict[tuple[float, str, str], Sums] = {}
        """(first second of a month, key, team) -> what was entered of it."""
        self.batch = 0
        """The last that was entered."""

    def __len__(self) -> int:
        return len(self._rows)

    def enter(self, batch: int, rows: Iterable[Row]) -> None:
        """Add what one batch counted."""
        for row in rows:
            held = self._rows.get(row.key)
            sums = held[0] if held is not None else Sums()
            sums.add(row.sums)
            self._rows[row.key] = (sums, batch)
            first, _ = month_of(row.key.start)
            for key, team in ((row.key.key, ""), ("", row.key.team)):
                self._months.setdefault((first, key, team), Sums()).add(row.sums)
        self.batch = max(self.batch, batch)

    def month(self, at: float, *, key: str = "", team: str = "") -> Sums:
        """What one key or one team had in the month of `at`: kept at hand, not summed up."""
        return self._months.get((month_of(at)[0], key, team), _NOTHING)

    def since(self, batch: int) -> tuple[Row, ...]:
        """Rows that changed after `batch`, as they are now."""
        return tuple(Row(key, sums) for key, (sums, changed) in self._rows.items() if changed > batch)

    def replace(self, batch: int, rows: Iterable[Row]) -> None:
        """Take another book's `since`: rows as they are there."""
        for row in rows:
            self._rows[row.key] = (row.sums, batch)
            if row.key.days:  # its hours are in it
                self._drop_hours(row.key)
        self.batch = max(self.batch, batch)

    def fold(self, hours_until: float, days_until: float) -> None:
        """Make rows of whole days out of hours before `hours_until`, and forget days that ended before
        `days_until`."""
        whole_days = hours_until // DAY_S * DAY_S
        for key in [key for key in self._rows if not key.days and key.start < whole_days]:
            sums, changed = self._rows.pop(key)
            day = day_of(key)
            held = self._rows.get(day)
            if held is not None:
                sums.add(held[0])
                changed = max(changed, held[1])
            self._rows[day] = (sums, changed)
        for key in [key for key in self._rows if key.start + DAY_S <= days_until]:
            del self._rows[key]
        for month in [month for month in self._months if month[0] < hours_until - 32 * DAY_S]:
            del self._months[month]

    def items(self) -> Sequence[tuple[RowKey, tuple[Sums, int]]]:
        """All rows, and when they changed, apart from what comes later."""
        return list(self._rows.items())

    def rows(self) -> Iterable[Row]:
        return (Row(key, sums) for key, (sums, _) in self._rows.items())

    def _drop_hours(self, day: RowKey) -> None:
        for start in range(day.start, day.start + DAY_S, HOUR_S):
            self._rows.pop(RowKey(start, day.key, day.team, day.model, day.node), None)


def day_of(key: RowKey) -> RowKey:
    return RowKey(key.start // DAY_S * DAY_S, key.key, key.team, key.model, key.node, days=True)


@functools.lru_cache(maxsize=1024)
def month_of(at: float) -> tuple[float, float]:
    """The calendar month that `at` is in, UTC: its first second, and that of the next."""
    first = datetime.fromtimestamp(at, UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    following = first.replace(year=first.year + first.month // 12, month=first.month % 12 + 1)
    return first.timestamp(), following.timestamp()


# ── answers ─────────────────────────────────────────────────────────────────────────


class Group(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Rows put together: the value of each of the wanted dimensions, in their order."""

    names: tuple[str, ...]
    sums: Sums


def check_by(text: str) -> tuple[By, ...]:
    """`key,model` as dimensions.

    Raises:
        Invalid: one is not known, or comes twice.
    """
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    wrong = [part for part in found if part not in GROUPS]
    if wrong or len(set(found)) != len(found):
        raise Invalid(f"by takes each of {', '.join(GROUPS)} once, with commas between", param="by")
    return tuple(by for part in found for by in GROUPS if by == part)


def check_day(text: str, param: str) -> float:
    """A day (`2026-11-23`, UTC) as its first second.

    Raises:
        Invalid: it is none.
    """
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).timestamp()
    except ValueError:
        raise Invalid(f"{param} is a day such as 2026-11-23", param=param) from None


def day_text(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d")


def hour_text(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:00Z")


def grouped(
    rows: Iterable[Row], by: Sequence[By], start: float, end: float, *, key: str = "", team: str = ""
) -> tuple[Group, ...]:
    """Rows from `start` until before `end`, put together by `by`. `key`, `team`: only theirs.

    What nodes drew is shared among the rows of the same node and time by the engines' seconds.

    Raises:
        Invalid: more groups than an answer may have.
    """
    rows = [row for row in rows if start <= row.key.start < end]
    engine_s: dict[tuple[int, str], float] = {}
    joules: dict[tuple[int, str], float] = {}
    for row in rows:
        where = (row.key.start, row.key.node)
        engine_s[where] = engine_s.get(where, 0.0) + row.sums.prompt_s + row.sums.completion_s
        joules[where] = joules.get(where, 0.0) + row.sums.joules
    found: dict[tuple[str, ...], Sums] = {}
    for row in rows:
        if (key and row.key.key != key) or (team and row.key.team != team) or not row.sums.requests:
            continue
        where = (row.key.start, row.key.node)
        names = tuple(_name(row.key, one) for one in by)
        sums = found.get(names)
        if sums is None:
            if len(found) >= MAX_GROUPS:
                raise Invalid(f"that is more than {MAX_GROUPS} rows; ask for fewer days or groups")
            sums = found[names] = Sums()
        sums.add(row.sums)
        sums.joules -= row.sums.joules
        if engine_s[where]:
            share = (row.sums.prompt_s + row.sums.completion_s) / engine_s[where]
            sums.joules += joules[where] * share
    return tuple(Group(names, sums) for names, sums in found.items())


def _name(key: RowKey, by: By) -> str:
    match by:
        case "day":
            return day_text(key.start)
        case "hour":
            return hour_text(key.start) if not key.days else day_text(key.start)
        case _:
            name: str = getattr(key, by)
            return name


def merged(many: Iterable[Iterable[Group]]) -> tuple[Group, ...]:
    """Groups of several books, put together and sorted."""
    found: dict[tuple[str, ...], Sums] = {}
    for groups in many:
        for group in groups:
            found.setdefault(group.names, Sums()).add(group.sums)
    return tuple(Group(names, sums) for names, sums in sorted(found.items()))


def shown(group: Group, by: Sequence[By], kwh_price: float) -> UsageRow:
    sums, wh = group.sums, group.sums.joules / JOULES_PER_WH
    return UsageRow(
        **dict(zip(by, group.names, strict=True)),
        requests=sums.requests,
        errors=sums.errors,
        cancelled=sums.cancelled,
        prompt_tokens=sums.prompt_tokens,
        cached_tokens=sums.cached_tokens,
        completion_tokens=sums.completion_tokens,
        wait_s=round(sums.wait_s, 3),
        load_s=round(sums.load_s, 3),
        prompt_s=round(sums.prompt_s, 3),
        completion_s=round(sums.completion_s, 3),
        cost=round(sums.cost, 9),
        energy_wh=round(wh, 6),
        energy_cost=round(wh / 1000 * kwh_price, 9),
    )
