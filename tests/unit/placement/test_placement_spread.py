"""Replicas are kept apart as one after the other would be, by the domain that is least crowded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.placement.spread import Domain, Spread, apart

domains = st.tuples(st.sampled_from("xyz"), st.sampled_from("abcd"))


def naive(by_domain: dict[Domain, list[int]], count: int, spread: Spread) -> list[int]:
    left = {domain: list(found) for domain, found in by_domain.items()}
    chosen: list[int] = []
    while len(chosen) < count and any(left.values()):
        best = min((spread.crowding(domain), domain) for domain, found in left.items() if found)[1]
        spread.add(best)
        chosen.append(left[best].pop(0))
    return chosen


@given(st.lists(domains, max_size=30), st.lists(domains, max_size=8), st.integers(0, 40))
def test_as_if_chosen_one_by_one(where: list[Domain], beside: list[Domain], count: int) -> None:
    by_domain: dict[Domain, list[int]] = {}
    for number, domain in enumerate(where):
        by_domain.setdefault(domain, []).append(number)
    spreads = Spread(), Spread()
    for spread in spreads:
        for domain in beside:
            spread.add(domain)
    assert apart(by_domain, count, spreads[0]) == naive(by_domain, count, spreads[1])


def test_without_failure_domains_they_are_taken_in_order() -> None:
    assert apart({(): [3, 1, 2]}, 2, Spread()) == [3, 1]
    assert apart({}, 2, Spread()) == []
