"""Tables: what fits, what is left out first, what a pipe gets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.cli import humanize
from ollama_distributed.cli.tables import BOLD, GREEN, RED, YELLOW, Cell, Column, Look, facts, share, table
from ollama_distributed.cli.terminal import columns

RICH = Look(colour=True, bars=True, width=80)


def column(title, *texts, rank=0, style=""):
    return Column(title, [Cell(text, style) for text in texts], rank)


def test_columns_are_aligned_and_nothing_trails():
    text = table([column("A", "1", "长"), column("BB", "x", "")], Look())
    assert text == "A   BB\n1   x\n长\n"


def test_what_does_not_fit_goes_by_rank():
    wanted = [column("KEEP", "x" * 10), column("SOON", "y" * 10, rank=9), column("LATER", "z" * 10, rank=1)]
    assert table(wanted, Look(width=40)).split("\n")[0].split() == ["KEEP", "SOON", "LATER"]
    assert table(wanted, Look(width=30)).split("\n")[0].split() == ["KEEP", "LATER"]
    assert table(wanted, Look(width=5)).split("\n")[0].split() == ["KEEP"]
    assert table(wanted, Look(width=None)).split("\n")[0].split() == ["KEEP", "SOON", "LATER"]


@given(
    st.lists(st.tuples(st.text(max_size=8), st.integers(1, 5)), min_size=1, max_size=6), st.integers(20, 60)
)
def test_a_table_fits_its_terminal_or_has_only_what_must_stay(cells, width):
    wanted = [column("NAME", "n"), *(column("T", text, rank=rank) for text, rank in cells)]
    lines = table(wanted, Look(width=width)).splitlines()
    assert all(columns(line) <= width for line in lines)
    assert lines[0].startswith("NAME")


def test_colour_does_not_move_columns():
    plain = table([column("A", "1", "22", style=BOLD), column("B", "x", "y")], Look(bars=True, width=80))
    painted = table([column("A", "1", "22", style=BOLD), column("B", "x", "y")], RICH)
    assert "\x1b[1m22\x1b[0m" in painted
    for code in ("\x1b[1m", "\x1b[2m", "\x1b[0m"):
        painted = painted.replace(code, "")
    assert painted == plain


def test_escape_sequences_of_others_are_shown_not_obeyed():
    assert "\x1b" not in table([column("A", "\x1b[2Jgone")], Look())
    assert "\x1b[2J" not in facts([("Name", Cell("\x1b[2Jgone"))], RICH)


@pytest.mark.parametrize(
    ("value", "look", "cell"),
    [
        (0.5, RICH, Cell("████░░░░  50%", GREEN)),
        (0.75, RICH, Cell("██████░░  75%", YELLOW)),
        (1.7, RICH, Cell("████████ 100%", RED)),
        (0.5, Look(), Cell(" 50%", GREEN)),
        (None, RICH, Cell("-", "2")),
    ],
)
def test_bars(value, look, cell):
    assert share(value, look) == cell


def test_a_long_fact_goes_on_below_itself_and_no_word_is_cut():
    text = facts([("Asked for", Cell("0 times a model that was here"))], Look(width=34))
    assert text == "Asked for  0 times a model that\n           was here\n"
    long_word = "x" * 60
    assert long_word in facts([("Id", Cell(long_word))], Look(width=34))


def test_facts_leave_out_what_is_not_known():
    assert (
        facts([("Name", Cell("a")), ("Empty", Cell("")), ("Id", Cell("b"))], Look()) == "Name  a\nId    b\n"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0s"), (0.9, "0s"), (119, "119s"), (120, "2m"), (7199, "119m"), (7200, "2h"), (172_800, "2d")],
)
def test_ages(seconds, text):
    assert humanize.age(seconds) == text


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), ("1.5h", 5400), ("1d", 86400)]
)
def test_lengths_of_time(text, seconds):
    assert humanize.length_s(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-5m", "0", "nan", "inf", "5 parsecs", "1w"])
def test_what_is_no_length_of_time(text):
    with pytest.raises(ValueError, match="length of time"):
        humanize.length_s(text)
