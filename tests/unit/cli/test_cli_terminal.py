"""Nothing that a terminal would obey gets through; words are not cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.cli.terminal import Wrapper, clean, clean_line, columns


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("plain\n\ttext", "plain\n\ttext"),
        ("\x1b[31mred", "\u241b[31mred"),
        ("\x1b]52;c;aGk=\x07", "\u241b]52;c;aGk=\u2407"),
        ("a\r\nb\rc", "a\nb\u240dc"),
        ("\x9b2J", "\\u009b2J"),
        ("safe\u202eelif", "safe\\u202eelif"),
        ("\x7f\x00", "\u2421\u2400"),
        ("naïve 漢字 🙂", "naïve 漢字 🙂"),
    ],
)
def test_control_characters_are_shown(raw: str, shown: str) -> None:
    assert clean(raw) == shown


@given(st.text())
def test_no_text_can_command_the_terminal(text: str) -> None:
    for character in clean(text):
        code = ord(character)
        assert character in "\n\t" or not (code < 0x20 or 0x7F <= code < 0xA0)
    clean(text).encode()  # also a lone surrogate can be written
    assert not set(clean_line(text)) & set("\n\t")


@given(st.text(alphabet=" ab\n漢", max_size=120), st.integers(4, 20), st.data())
def test_wrapping_changes_only_spaces(text: str, width: int, data: st.DataObject) -> None:
    wrapper = Wrapper(width)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    printed = ""
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        printed += wrapper.feed(text[start:end])
    printed += wrapper.finish()
    assert printed.split() == text.split()


@given(st.lists(st.text(alphabet="ab漢", min_size=1, max_size=3), min_size=1), st.integers(8, 20))
def test_no_line_is_wider_than_the_terminal(words: list[str], width: int) -> None:
    wrapper = Wrapper(width)
    printed = wrapper.feed(" ".join(words)) + wrapper.finish()
    assert all(columns(line) <= width for line in printed.split("\n"))


def test_no_width_is_no_wrapping() -> None:
    wrapper = Wrapper(0)
    assert wrapper.feed("a " * 100) == "a " * 100
    assert wrapper.finish() == ""
