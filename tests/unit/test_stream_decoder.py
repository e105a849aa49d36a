"""The decoder: any cutting of the same tokens gives the same text, and no stop gets out."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.base.inference import Delta, TokenLogprob
from ollama_distributed.base.tokens import Tokens
from ollama_distributed.streams.decoder import Decoder, DecoderRules, overlap

TAGS = ("<think>", "</think>")


@dataclass
class Heard:
    text: str = ""
    thinking: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def add(self, delta: Delta | None) -> None:
        if delta is not None:
            self.text += delta.text
            self.thinking += delta.thinking
            self.logprobs += delta.logprobs


def hear(rules: DecoderRules, events: list[Tokens], *, migrate: bool = False) -> tuple[Heard, Decoder]:
    heard, decoder = Heard(), Decoder(rules)
    for event in events:
        heard.add(decoder.feed(event))
        if migrate:
            decoder = Decoder(rules, decoder.snapshot())
    heard.add(decoder.finish())
    return heard, decoder


def tokens(*texts: str) -> list[Tokens]:
    return [Tokens((number,), text) for number, text in enumerate(texts)]


def naive(text: str, rules: DecoderRules) -> tuple[str, str, str | None]:
    """(answer, thinking, stop), written for clearness: the whole text at once."""
    stopped = None
    for end in range(len(text) + 1):
        hits = [stop for stop in rules.stop if stop and text[:end].endswith(stop)]
        if hits:
            stopped = max(hits, key=len)
            text = text[: end - len(stopped)]
            break
    if rules.thinking_tags is None:
        return text, "", stopped
    opening, closing = rules.thinking_tags
    body = text
    if not rules.starts_in_thinking:
        if not text.lstrip().startswith(opening):
            return text, "", stopped
        body = text.lstrip().removeprefix(opening)
    thinking, _, answer = body.lstrip().partition(closing)
    return answer.lstrip(), thinking, stopped


# Few letters, so that stops, tags and their beginnings meet often.
texts = st.text(alphabet="ab< \n", max_size=24)
pieces = st.lists(st.one_of(texts, st.sampled_from([*TAGS, "<thi", "</th", "é€😀"])), max_size=12)
rules_of = st.builds(
    DecoderRules,
    stop=st.lists(st.text(alphabet="ab<", max_size=4), max_size=3).map(tuple),
    thinking_tags=st.sampled_from([None, TAGS]),
    starts_in_thinking=st.booleans(),
)


def cut(text: str, at: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in at)})
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@given(pieces, rules_of, st.lists(st.integers(0, 200), max_size=20), st.booleans())
def test_any_cutting_gives_the_naive_text(
    parts: list[str], rules: DecoderRules, at: list[int], migrate: bool
) -> None:
    text = "".join(parts)
    heard, decoder = hear(rules, tokens(*cut(text, at)), migrate=migrate)
    assert (heard.text, heard.thinking, decoder.stopped) == naive(text, rules)


@given(pieces, rules_of)
def test_no_stop_gets_out(parts: list[str], rules: DecoderRules) -> None:
    heard, _ = hear(changed(rules, thinking_tags=None), tokens(*parts))
    for stop in rules.stop:
        assert not stop or stop not in heard.text


@given(st.text(max_size=12), st.lists(st.integers(0, 60), max_size=12), rules_of)
def test_bytes_give_the_text_of_characters(text: str, at: list[int], rules: DecoderRules) -> None:
    data = text.encode("utf-8", "replace")
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in at)})
    events = [Tokens((1,), "", raw=data[a:b]) for a, b in itertools.pairwise(edges)]
    heard, decoder = hear(rules, events, migrate=True)
    assert (heard.text, heard.thinking, decoder.stopped) == naive(data.decode(), rules)


@given(pieces, rules_of)
def test_each_token_counts_and_logprobs_stay_with_their_text(parts: list[str], rules: DecoderRules) -> None:
    events = [
        Tokens((number,), text, (TokenLogprob(str(number), -0.5, text.encode()),))
        for number, text in enumerate(parts)
    ]
    heard, decoder = Heard(), Decoder(rules)
    fed = 0
    for event in events:
        heard.add(decoder.feed(event))
        fed += 1
        if decoder.stopped is not None:
            break
        # Logprobs never run ahead of what was fed, and come in order.
        assert len(heard.logprobs) <= fed
    heard.add(decoder.finish())
    assert decoder.completion_tokens == fed
    assert decoder.reasoning_tokens <= fed
    assert [lp.token for lp in heard.logprobs] == [str(number) for number in range(len(heard.logprobs))]
    if decoder.stopped is None:
        assert len(heard.logprobs) == fed


def changed(rules: DecoderRules, **changes: object) -> DecoderRules:
    return DecoderRules(**{name: changes.get(name, getattr(rules, name)) for name in rules.__struct_fields__})


@pytest.mark.parametrize(
    ("events", "text", "stopped"),
    [
        (("Hello", " wor", "ld"), "Hello world", None),
        (("Hello <|", "im_", "end|>", "lost"), "Hello ", "<|im_end|>"),
        (("Hello <|", "im_", "start"), "Hello <|im_start", None),
        (("x<|im_end|>y",), "x", "<|im_end|>"),
        (("a\n", "\nb"), "a", "\n\n"),
    ],
)
def test_stop_sequences(events: tuple[str, ...], text: str, stopped: str | None) -> None:
    heard, decoder = hear(DecoderRules(stop=("<|im_end|>", "\n\n")), tokens(*events))
    assert (heard.text, decoder.stopped) == (text, stopped)


def test_the_stop_that_is_complete_first_wins_and_the_longer_of_two() -> None:
    assert hear(DecoderRules(stop=("bcd", "c")), tokens("a", "bcd"))[1].stopped == "c"
    assert hear(DecoderRules(stop=("c", "bc")), tokens("ab", "c"))[1].stopped == "bc"


def test_text_is_not_withheld_without_need() -> None:
    decoder = Decoder(DecoderRules(stop=("STOP",)))
    assert decoder.feed(Tokens((1,), "abc S")) == Delta(text="abc ")
    assert decoder.feed(Tokens((2,), "u")) == Delta(text="Su")


def test_reasoning_is_taken_apart_and_its_white_space_goes() -> None:
    rules = DecoderRules(thinking_tags=TAGS)
    heard, decoder = hear(rules, tokens("\n<th", "ink>\n\n", "I see", " </th", "ink>", "\n\n", "Yes", " "))
    assert (heard.thinking, heard.text) == ("I see ", "Yes ")
    assert decoder.completion_tokens == 8
    assert decoder.reasoning_tokens == 6


def test_an_answer_without_reasoning_counts_none() -> None:
    heard, decoder = hear(DecoderRules(thinking_tags=TAGS), tokens(" ", "<th", "e end"))
    assert (heard.text, decoder.reasoning_tokens, decoder.completion_tokens) == (" <the end", 0, 3)


def test_reasoning_that_never_ends_is_reasoning() -> None:
    rules = DecoderRules(thinking_tags=TAGS, starts_in_thinking=True)
    assert hear(rules, tokens("so", " </th"))[0] == Heard(thinking="so </th")


def test_a_token_of_the_stop_has_no_logprob_out() -> None:
    def token(text: str) -> Tokens:
        return Tokens((1,), text, (TokenLogprob(text, -1.0, text.encode()),))

    heard, decoder = hear(DecoderRules(stop=("END",)), [token("a"), token("bE"), token("N"), token("D")])
    assert (heard.text, decoder.stopped) == ("ab", "END")
    assert [lp.token for lp in heard.logprobs] == ["a", "bE"]


@given(st.text("ab", max_size=6), st.text("ab", min_size=1, max_size=6))
def test_overlap_is_the_longest(text: str, sequence: str) -> None:
    lengths = [n for n in range(len(sequence)) if text.endswith(sequence[:n])]
    assert overlap(text, sequence) == max(lengths)
