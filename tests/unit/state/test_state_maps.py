"""The sorted map, against a dict that is copied."""

from __future__ import annotations

from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.state import maps
from ollama_distributed.state.maps import MAX_CHUNK, SortedMap

keys = st.text("abc", min_size=1, max_size=3)
steps = st.lists(st.tuples(keys, st.none() | st.integers(0, 3)), max_size=60)


def made(contents: dict[str, int]) -> SortedMap[str, int]:
    result: SortedMap[str, int] = SortedMap()
    for key, value in contents.items():
        result = result.with_(key, value)
    return result


@given(steps)
def test_does_what_a_dict_does_and_leaves_every_earlier_map_as_it_was(
    steps: list[tuple[str, int | None]],
) -> None:
    naive: dict[str, int] = {}
    real: SortedMap[str, int] = SortedMap()
    snapshots = [(dict(naive), real)]
    for key, value in steps:
        if value is None:
            naive.pop(key, None)
            real = real.without(key)
        else:
            naive[key] = value
            real = real.with_(key, value)
        snapshots.append((dict(naive), real))
    for expected, snapshot in snapshots:
        assert list(snapshot) == sorted(expected)
        assert dict(snapshot) == expected
        assert len(snapshot) == len(expected)


@pytest.mark.parametrize("most", [4, MAX_CHUNK], ids=["of many chunks", "of one"])
@given(first=steps, second=steps)
def test_differences_name_what_changed(
    first: list[tuple[str, int | None]], second: list[tuple[str, int | None]], most: int
) -> None:
    def walk(start: SortedMap[str, int], steps: list[tuple[str, int | None]]) -> SortedMap[str, int]:
        for key, value in steps:
            start = start.without(key) if value is None else start.with_(key, value)
        return start

    with mock.patch.object(maps, "MAX_CHUNK", most):
        older = walk(SortedMap(), first)
        newer = walk(older, second)
    every = sorted({*older, *newer})
    assert newer.differences(older) == [key for key in every if older.get(key) != newer.get(key)]
    assert older.differences(newer) == newer.differences(older)


def test_many_keys_split_into_chunks_and_shrink_again() -> None:
    names = [f"n{i * 7919 % 10_007:05d}" for i in range(3_000)]
    full = made({name: i for i, name in enumerate(names)})
    assert list(full) == sorted(names)
    assert all(full[name] == i for i, name in enumerate(names))
    assert max(len(keys) for keys, _ in full._chunks) <= MAX_CHUNK
    small = full
    for name in names[:-10]:
        small = small.without(name)
    assert list(small) == sorted(names[-10:])
    assert len(small._chunks) <= 3, "deletions leave no trail of tiny chunks"


def test_an_update_shares_all_but_one_chunk() -> None:
    before = made({f"{i:05d}": i for i in range(5_000)})
    after = before.with_("02500", -1)
    shared = {id(chunk) for chunk in before._chunks} & {id(chunk) for chunk in after._chunks}
    assert len(shared) == len(before._chunks) - 1
    assert after.differences(before) == ["02500"]


def test_the_same_value_is_the_same_map() -> None:
    one = made({"a": 1})
    assert one.with_("a", 1) is one
    assert one.without("b") is one
    assert "b" not in one
    assert 7 not in one
    with pytest.raises(KeyError):
        one["b"]


@given(st.dictionaries(st.text(max_size=3), st.integers()))
def test_items_and_values_are_those_of_a_sorted_dict(entries: dict[str, int]) -> None:
    result = made(entries)
    assert list(result.items()) == sorted(entries.items())
    assert list(result.values()) == [value for _, value in sorted(entries.items())]
    assert (len(result.items()), len(result.values())) == (len(entries), len(entries))
