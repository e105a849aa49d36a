"""When a node leaves its machine to the owner."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.adapters.hardware.owner import OthersCpu, OwnerProbe, desktop_idle_s, terminal_idle_s
from ollama_distributed.base.clock import SystemClock
from ollama_distributed.node.polite.plan import (
    GONE_S,
    HOLDS_S,
    Policy,
    Polite,
    Signs,
    parse_hours,
    spell_hours,
)
from ollama_distributed.node.polite.settings import policy_of
from ollama_distributed.node.settings import Settings

NIGHT = parse_hours("22:00-07:00")


@pytest.mark.parametrize(
    ("clock", "works"),
    [("21:59", False), ("22:00", True), ("23:59", True), ("06:59", True), ("07:00", False)],
)
def test_a_night_goes_over_midnight(clock: str, works: bool) -> None:
    hours, minutes = map(int, clock.split(":"))
    reason = Polite().look(Signs(minute=60 * hours + minutes), Policy(hours=NIGHT), 0.0)
    assert reason == ("" if works else "outside its hours (22:00-07:00)")


@pytest.mark.parametrize("text", ["7-9", "25:00-26:00", "07:00-07:00", "07:60-08:00", "22:00", "a-b"])
def test_what_are_no_hours_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="span of hours"):
        parse_hours(text)


def test_hours_as_they_are_written() -> None:
    assert parse_hours(" ") == ()
    assert spell_hours(parse_hours("22:00-7:00, 12:30 - 24:00")) == "22:00-07:00, 12:30-24:00"


def test_the_owner_is_made_room_for_at_once_and_waited_for() -> None:
    polite, policy = Polite(), Policy(owner_idle_s=600.0)
    assert polite.look(Signs(minute=0, owner_idle_s=700.0), policy, 0.0) == ""
    assert polite.look(Signs(minute=0, owner_idle_s=1.0), policy, 5.0) == "its owner is at work"
    assert polite.look(Signs(minute=0, owner_idle_s=599.0), policy, 600.0) == "its owner is at work"
    assert polite.look(Signs(minute=0, owner_idle_s=601.0), policy, 605.0) == ""


def test_a_plug_that_is_pulled_for_a_moment_moves_nothing() -> None:
    polite, policy = Polite(), Policy(battery=True)

    def look(now: float, on_battery: bool) -> str:
        return polite.look(Signs(minute=0, on_battery=on_battery), policy, now)

    assert not look(0.0, True)
    assert not look(5.0, False)
    assert not look(10.0, True)
    assert look(20.0, True) == "it runs on battery"
    assert look(30.0, False)
    assert look(60.0, True), "it was too short"
    assert look(70.0, False)
    assert not look(130.0, False)


def test_other_programs_have_a_band_between_too_much_and_little_enough() -> None:
    polite, policy = Polite(), Policy(cpu=0.6)

    def look(now: float, others: float) -> bool:
        return bool(polite.look(Signs(minute=0, others_cpu=others), policy, now))

    assert not look(0.0, 0.7)
    assert look(30.0, 0.7)
    assert look(200.0, 0.5), "less than too much, and not little enough"
    assert look(201.0, 0.3)
    assert not look(201.0 + GONE_S["cpu"], 0.3)


def test_what_cannot_be_seen_is_no_cause() -> None:
    policy = Policy(owner_idle_s=60.0, battery=True, cpu=0.1)
    polite = Polite()
    assert not any(polite.look(Signs(minute=0), policy, 100.0 * turn) for turn in range(9))


def test_all_causes_are_told_and_one_that_is_taken_off_the_policy_ends() -> None:
    polite, signs = Polite(), Signs(minute=720, owner_idle_s=0.0)
    both = Policy(hours=NIGHT, owner_idle_s=60.0)
    assert polite.look(signs, both, 0.0) == "outside its hours (22:00-07:00); its owner is at work"
    assert polite.look(signs, Policy(owner_idle_s=60.0), 5.0) == "its owner is at work"
    assert polite.look(signs, Policy(), 10.0) == ""


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1)), min_size=1, max_size=60), st.floats(0.05, 1))
def test_it_never_turns_sooner_than_its_causes_allow(seen: list[tuple[bool, float]], cpu: float) -> None:
    polite, policy, step_s = Polite(), Policy(battery=True, cpu=cpu), 5.0
    turned, rests = 0.0, False
    for turn, (battery, others) in enumerate(seen):
        now = turn * step_s
        reason = bool(polite.look(Signs(minute=0, on_battery=battery, others_cpu=others), policy, now))
        if reason != rests:
            least = min((HOLDS_S if reason else GONE_S)[cause] for cause in ("battery", "cpu"))
            assert now - turned >= least
            turned, rests = now, reason


def test_settings_say_the_policy() -> None:
    settings = Settings(
        polite_hours="22:00-07:00", polite_owner="10m", polite_battery="yes", polite_cpu="0.5"
    )
    assert policy_of(settings) == Policy(hours=NIGHT, owner_idle_s=600.0, battery=True, cpu=0.5)
    assert not policy_of(Settings())


def test_a_terminal_tells_when_it_was_typed_into_last(tmp_path: Path) -> None:
    parent, child = os.openpty()
    (tmp_path / "pts").mkdir()
    try:
        (tmp_path / "pts/7").symlink_to(os.ttyname(child))
        os.write(parent, b"a key\n")
        os.read(child, 10)
        idle_s = terminal_idle_s(time.time(), tmp_path)
        assert idle_s is not None
        assert idle_s < 3600.0, "the kernel tells it in steps of some seconds"
    finally:
        os.close(parent)
        os.close(child)
    assert terminal_idle_s(0.0, tmp_path / "pts/none") is None


def test_a_file_is_no_terminal(tmp_path: Path) -> None:
    (tmp_path / "tty7").touch()
    assert terminal_idle_s(time.time(), tmp_path) is None


DESKTOP = {"Type": "wayland", "Class": "user", "Active": "yes", "LockedHint": "no"}


@pytest.mark.parametrize(
    ("session", "idle_s"),
    [
        ({**DESKTOP, "IdleHint": "no", "IdleSinceHint": "0"}, 0.0),
        ({**DESKTOP, "IdleHint": "yes", "IdleSinceHint": "40000000"}, 60.0),
        ({**DESKTOP, "IdleHint": "no", "IdleSinceHint": "90000000", "LockedHint": "yes"}, 10.0),
        ({**DESKTOP, "IdleHint": "no", "Class": "greeter"}, None),
        ({**DESKTOP, "IdleHint": "no", "Type": "tty"}, None),
    ],
)
def test_a_desktop_tells_logind_whether_somebody_is_there(
    session: dict[str, str], idle_s: float | None
) -> None:
    def loginctl(*arguments: str) -> str:
        if arguments[0] == "list-sessions":
            return "  c1 1000 ann seat0 tty2\n\n"
        assert arguments[1] == "c1"
        return "\n".join(f"{name}={value}" for name, value in session.items())

    assert desktop_idle_s(loginctl, 100.0) == idle_s


def test_this_machine_can_be_looked_at() -> None:
    probe = OwnerProbe(SystemClock())
    assert probe.on_battery() in (None, True, False)
    idle_s = probe.owner_idle_s()
    assert idle_s is None or idle_s >= 0.0
    assert 0.0 <= OthersCpu(SystemClock()).read() <= 1.0
