"""What is remembered of prompts: properties of the index, and of the keys that it is fed with."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import NodeId, RequestId
from ollama_distributed.base.inference import (
    ChatPrompt,
    InferenceRequest,
    Message,
    TextPrompt,
    TokensPrompt,
    Tool,
)
from ollama_distributed.base.policies import Policy
from ollama_distributed.base.tokens import Done, Progress
from ollama_distributed.routing.blocks import BLOCK_BYTES, MOST_BYTES, Chain, chain_of
from ollama_distributed.routing.caches import Caches, Trip
from ollama_distributed.routing.prefix import MOST_REPLICAS, PrefixIndex

NODES = [NodeId(f"n{i}") for i in range(6)]
chains = st.lists(st.integers(0, 12), min_size=1, max_size=8, unique=True).map(tuple)
reads = st.lists(st.tuples(st.sampled_from(NODES), chains), max_size=30)


@given(reads, chains)
def test_nothing_is_remembered_that_was_not_read(
    steps: list[tuple[NodeId, tuple[int, ...]]], asked: tuple[int, ...]
) -> None:
    index, seen = PrefixIndex(), dict[NodeId, set[int]]()
    for node, keys in steps:
        index.read(node, keys)
        seen.setdefault(node, set()).update(keys)
    for node, blocks in index.cached(asked).items():
        assert asked[blocks - 1] in seen[node]


@given(reads, chains)
def test_who_read_it_last_holds_all_of_it(
    steps: list[tuple[NodeId, tuple[int, ...]]], asked: tuple[int, ...]
) -> None:
    index = PrefixIndex()
    for node, keys in [*steps, (NODES[0], asked)]:
        index.read(node, keys)
    assert index.cached(asked)[NODES[0]] == len(asked)
    index.forget(NODES[0])
    assert NODES[0] not in index.cached(asked)


@given(reads, st.integers(1, 10))
def test_memory_is_bounded(steps: list[tuple[NodeId, tuple[int, ...]]], most: int) -> None:
    index = PrefixIndex(most)
    for node, keys in steps:
        index.read(node, keys)
    assert len(index) <= most


def test_a_choice_looks_at_each_block_at_most_once() -> None:
    """Counted work, however many replicas have read it."""
    index, keys = PrefixIndex(), tuple(range(128))
    for i in range(1000):
        index.read(NodeId(f"r{i}"), keys[: i % 128 + 1])
    before = index.looks
    assert len(index.cached(keys)) >= MOST_REPLICAS
    assert index.looks - before <= len(keys)
    before = index.looks
    index.cached(tuple(range(1000, 1031)))
    assert index.looks - before == 31


def test_of_a_prompt_its_end_goes_first() -> None:
    index = PrefixIndex(4)
    index.read(NODES[0], (1, 2, 3))
    index.read(NODES[1], (7, 8))
    assert index.cached((1, 2, 3)) == {NODES[0]: 2}


def test_what_was_not_there_takes_all_that_is_older_with_it() -> None:
    index = PrefixIndex()
    for chain in ((1,), (2,), (3,)):
        index.read(NODES[0], chain)
    index.lost(NODES[0], index.turn_of(NODES[0], 2))
    assert [bool(index.cached(chain)) for chain in ((1,), (2,), (3,))] == [False, False, True]


def test_a_model_that_was_loaded_anew_holds_nothing() -> None:
    index = PrefixIndex()
    index.live(NODES[0], ("boot", 1))
    index.read(NODES[0], (1, 2))
    index.live(NODES[0], ("boot", 1))
    assert index.cached((1, 2)) == {NODES[0]: 2}
    for life in (("boot", 2), None):
        index.read(NODES[0], (1, 2))
        index.live(NODES[0], life)
        assert index.cached((1, 2)) == {}


# ── keys ────────────────────────────────────────────────────────────────────────────


def chat(
    *texts: str, team: str = "default", tools: tuple[Tool, ...] = (), group: str = ""
) -> InferenceRequest:
    roles = ("system", "user", "assistant")
    messages = tuple(
        Message(role=roles[0] if i == 0 else roles[2 - i % 2], content=text)  # type: ignore[arg-type]
        for i, text in enumerate(texts)
    )
    return InferenceRequest(
        request_id=RequestId("r"),
        identity=Identity("admin", team=team, policy=Policy(name="p", cache_group=group)),
        model="m",
        prompt=ChatPrompt(messages=messages, tools=tools),
    )


def keys(request: InferenceRequest, model: str = "m", digest: str = "d", salt: int = 1) -> tuple[int, ...]:
    return chain_of(request, model, digest, salt).keys


def common(one: tuple[int, ...], two: tuple[int, ...]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two))
    )


LONG = "".join(random.Random(1).choice("abcdefgh ") for _ in range(6000))


@settings(max_examples=30)
@given(st.text(max_size=30), st.text(max_size=30))
def test_equal_beginnings_have_equal_keys_and_no_others(one: str, two: str) -> None:
    a, b = keys(chat(LONG, one)), keys(chat(LONG, two))
    assert common(a, b) >= 5
    assert common(a, keys(chat("x" + LONG, one))) == 0


def test_a_conversation_that_goes_on_keeps_its_keys() -> None:
    short, longer = keys(chat(LONG, "hello")), keys(chat(LONG, "hello", LONG, "and then?"))
    assert longer[: len(short)] == short
    assert len(longer) > len(short)


def test_nothing_is_learned_over_teams_models_templates_and_gateways() -> None:
    mine = keys(chat(LONG, "x"))
    others = [
        keys(chat(LONG, "x", team="other")),
        keys(chat(LONG, "x"), model="n"),
        keys(chat(LONG, "x"), digest="e"),
        keys(chat(LONG, "x"), salt=2),
        keys(chat(LONG, "x", tools=(Tool(name="t"),))),
        keys(chat(LONG, "x", group="shop")),
        keys(chat(LONG, "x", team="\x1fshop")),
    ]
    assert all(common(mine, other) == 0 for other in others)


def test_teams_whose_policies_name_one_group_share_what_is_learned() -> None:
    one, two = (keys(chat(LONG, "x", team=team, group="shop")) for team in ("red", "blue"))
    assert one == two
    assert common(one, keys(chat(LONG, "x", team="red", group="other"))) == 0
    assert common(one, keys(chat(LONG, "x", team="shop"))) == 0, "a team is no group"


def test_every_kind_of_prompt_has_keys_and_a_bound() -> None:
    def text(**fields: object) -> InferenceRequest:
        prompt = TextPrompt(text=LONG, **fields)  # type: ignore[arg-type]
        return InferenceRequest(
            request_id=RequestId("r"), identity=Identity("admin"), model="m", prompt=prompt
        )

    raw, templated = keys(text(raw=True)), keys(text())
    assert len(raw) == len(LONG) // BLOCK_BYTES
    assert common(raw, templated) == 0
    assert common(keys(text(system=LONG)), keys(chat(LONG, LONG))) >= 5, "two spellings of one prompt"
    ids = TokensPrompt(ids=tuple(range(100_000)))
    request = InferenceRequest(request_id=RequestId("r"), identity=Identity("admin"), model="m", prompt=ids)
    assert 0 < len(keys(request)) <= MOST_BYTES // BLOCK_BYTES
    huge = chain_of(chat("ü" * 4_000_000, "\ud800"), "m", "d", 1)
    assert len(huge.keys) == MOST_BYTES // BLOCK_BYTES
    assert huge.size_bytes >= 4_000_000


# ── what comes back ─────────────────────────────────────────────────────────────────


def trip(caches: Caches, expected: dict[NodeId, int] | None = None) -> Trip:
    return Trip(caches, "m", Chain((1, 2, 3, 4), 4096), expected)


def done(cached: int) -> Done:
    return Done(reason="stop", prompt_tokens=1000, cached_tokens=cached, completion_tokens=1)


def test_an_answer_teaches_who_holds_its_prompt() -> None:
    caches, a = Caches(), NODES[0]
    one = trip(caches)
    one.to(a, again=False)
    assert caches.sent(a, "m") == 1
    assert caches.prompt("m", Chain((1, 2), 2048)).cached == {}, "it has only been sent there"
    one.spoke()
    one.done(done(0))
    one.over()
    one.over()
    assert caches.sent(a, "m") == 0
    assert caches.prompt("m", Chain((1, 2), 2048)).cached[a] > 0


def test_a_replica_that_lost_its_cache_is_believed_no_more() -> None:
    caches, a = Caches(), NODES[0]
    index = caches.index("m")
    index.read(a, (7, 8))
    index.read(a, (1, 2, 3, 4))
    for cached, holds in ((900, True), (0, False)):
        expected = dict(caches.prompt("m", Chain((1, 2, 3, 4), 4096)).cached)
        one = trip(caches, expected)
        one.to(a, again=False)
        one.reads(Progress(1000, cached, cached))
        assert (a in index.cached((7, 8))) == holds
        one.spoke()
        one.done(done(cached))
        one.over()
    assert index.cached((1, 2, 3, 4)) == {a: 4}, "it has read it again"


def test_an_engine_that_never_tells_is_not_held_to_it_nor_one_that_is_busy() -> None:
    caches, a = Caches(), NODES[0]
    index = caches.index("m")
    index.read(a, (7, 8))
    index.read(a, (1, 2, 3, 4))
    one = trip(caches, {a: 1000})
    one.to(a, again=False)
    one.done(done(0))
    assert a in index.cached((7, 8)), "it has not said that it caches at all"
    two, three = trip(caches, {a: 1000}), trip(caches, {a: 1000})
    two.to(a, again=False)
    two.done(done(500))
    three.to(a, again=False)
    three.reads(Progress(1000, 0, 0))
    assert a in index.cached((7, 8)), "another request may have held the slot"
