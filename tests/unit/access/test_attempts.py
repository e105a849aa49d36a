"""Wrong passwords: later and later, and nobody is kept out for ever."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ollama_distributed.access.attempts import ADDRESS_MOST_S, FREE, NAME_MOST_S, Attempts

HOME, AWAY = "192.0.2.7", "198.51.100.9"


def test_people_mistype_for_nothing_and_then_wait_longer_and_longer() -> None:
    attempts, waits = Attempts(), []
    for at in range(FREE + 6):
        waits.append(attempts.wait_s("ann", HOME, 0.0))
        attempts.wrong("ann", HOME, 0.0)
        del at
    assert waits[:FREE] == [0.0] * FREE
    assert waits[FREE:] == [1.0, 2.0, 4.0, 8.0, 16.0, NAME_MOST_S]
    assert attempts.wait_s("ann", HOME, NAME_MOST_S) == 0.0
    attempts.right("ann", HOME)
    assert attempts.wait_s("ann", HOME, 0.0) == 0.0


def test_who_signed_in_here_is_not_kept_out_by_others() -> None:
    attempts = Attempts()
    attempts.right("admin", HOME)
    for _ in range(1_000):
        attempts.wrong("admin", AWAY, 0.0)
    assert attempts.wait_s("admin", AWAY, 0.0) == ADDRESS_MOST_S
    assert attempts.wait_s("admin", "203.0.113.5", 0.0) == NAME_MOST_S
    assert attempts.wait_s("admin", HOME, 0.0) == 0.0


def test_one_address_waits_whatever_names_it_tries() -> None:
    attempts = Attempts()
    for number in range(100):
        attempts.wrong(f"user{number}", "2001:db8::1", 0.0)
    assert attempts.wait_s("new", "2001:db8::ffff", 0.0) == ADDRESS_MOST_S  # the same /64
    assert attempts.wait_s("new", "2001:db8:1::1", 0.0) == 0.0


def test_one_account_at_an_address_pays_for_no_tries_at_others() -> None:
    attempts = Attempts()
    for number in range(100):
        attempts.wrong(f"user{number}", AWAY, 0.0)
    attempts.right("mine", AWAY)
    assert attempts.wait_s("user200", AWAY, 0.0) > 0.0


def test_a_code_that_was_right_after_all_does_not_count() -> None:
    attempts = Attempts()
    attempts.take_code_back(HOME)
    for _ in range(100):
        attempts.wrong_code(HOME, 0.0)
        attempts.take_code_back(HOME)
    assert attempts.wait_for_code_s(HOME, 0.0) == 0.0
    for _ in range(100):
        attempts.wrong_code(HOME, 0.0)
    assert attempts.wait_for_code_s(HOME, 0.0) == NAME_MOST_S
    assert attempts.wait_for_code_s(AWAY, 0.0) == attempts.wait_s("ann", HOME, 0.0) == 0.0


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([HOME, AWAY]), st.floats(0, 1e5)), max_size=40)
)
def test_no_wait_is_longer_than_said(tries: list[tuple[str, str, float]]) -> None:
    attempts = Attempts()
    for name, address, at in sorted(tries, key=lambda one: one[2]):
        assert 0.0 <= attempts.wait_s(name, address, at) <= ADDRESS_MOST_S
        attempts.wrong(name, address, at)
