"""Capabilities, conversations and cuts."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.base.errors import Invalid, Unsupported
from ollama_distributed.base.identity import Identity
from ollama_distributed.base.ids import RequestId
from ollama_distributed.base.inference import (
    ChatPrompt,
    InferenceRequest,
    JsonObject,
    LoadOptions,
    Message,
    Sampling,
    TextPrompt,
    Tool,
)
from ollama_distributed.models.spec import ModelSpec, StoredMessage
from ollama_distributed.serving import prompts
from ollama_distributed.serving.embeddings import finished_vector, keep_ends
from ollama_distributed.serving.options import (
    DEFAULTS,
    Rules,
    model_sampling,
    overlay,
    serves,
    shape_of,
)
from ollama_distributed.serving.reasoning import Reasoning
from ollama_distributed.serving.residents import load_key
from ollama_distributed.serving.turns import with_one_system
from ollama_distributed.testing.echo import echo_model

USER = Message(role="user", content="hi")
SYSTEM = Message(role="system", content="be brief")


def model(**fields: object) -> ModelSpec:
    return msgspec.structs.replace(echo_model("m"), **fields)


def trained_for(context_tokens: int, **fields: object) -> ModelSpec:
    architecture = msgspec.structs.replace(echo_model().architecture, context_tokens=context_tokens)
    return model(architecture=architecture, **fields)


def asks(prompt: object, **fields: object) -> InferenceRequest:
    return InferenceRequest(
        request_id=RequestId("r"),
        identity=Identity("local"),
        model="M",
        prompt=prompt,
        **fields,  # type: ignore[arg-type]
    )


chat = ChatPrompt(messages=(USER,))
text = TextPrompt(text="hi")


@pytest.mark.parametrize(
    ("capabilities", "request_", "message"),
    [
        ({"completion"}, asks(chat, think=True), '"M" does not support thinking'),
        ({"completion"}, asks(text, think="high"), '"M" does not support thinking'),
        ({"embedding"}, asks(chat), '"M" does not support chat'),
        ({"embedding"}, asks(text), '"M" does not support generate'),
        (
            {"completion"},
            asks(TextPrompt(text="a", suffix="b")),
            "registry.ollama.ai/library/m:latest does not support insert",
        ),
        (
            {"completion"},
            asks(ChatPrompt(messages=(USER,), tools=(Tool(name="f"),))),
            "registry.ollama.ai/library/m:latest does not support tools",
        ),
        (
            {"completion"},
            asks(ChatPrompt(messages=(Message(role="user", images=(b"png",)),))),
            "registry.ollama.ai/library/m:latest does not support vision",
        ),
    ],
)
def test_what_a_model_cannot_is_refused_in_the_words_of_ollama(
    capabilities: set[str], request_: InferenceRequest, message: str
) -> None:
    with pytest.raises(Unsupported) as caught:
        prompts.check(model(capabilities=frozenset(capabilities)), request_)
    assert caught.value.message == message


def test_a_wish_to_think_is_no_demand() -> None:
    wish = asks(chat, think=True, think_if_able=True)
    spec = model(capabilities=frozenset({"completion"}))
    prompts.check(spec, wish)
    assert prompts.thinking_of(spec, wish) is None


def test_tools_that_must_not_be_called_need_no_capability() -> None:
    prompt = ChatPrompt(messages=(USER,), tools=(Tool(name="f"),), tool_choice="none")
    prompts.check(model(capabilities=frozenset({"completion"})), asks(prompt))


def test_think_false_is_no_question_of_capability() -> None:
    prompts.check(model(capabilities=frozenset({"completion"})), asks(chat, think=False))


def test_raw_stands_alone() -> None:
    with pytest.raises(Invalid, match="raw mode does not support template, system, or context"):
        prompts.check(model(), asks(TextPrompt(text="a", raw=True, system="b")))


@pytest.mark.parametrize(
    ("think", "format_", "expected"),
    [
        (None, None, True),
        (False, None, False),
        ("low", None, "low"),
        (None, JsonObject(), True),
        (True, JsonObject(), True),
    ],
)
def test_a_model_that_thinks_does_so_unless_asked_not_to(
    think: object, format_: object, expected: object
) -> None:
    spec = model(capabilities=frozenset({"completion", "thinking"}))
    assert prompts.thinking_of(spec, asks(chat, think=think, format=format_)) == expected
    assert prompts.thinking_of(model(), asks(chat, format=format_)) is None


def test_the_conversation_begins_with_the_modelfile() -> None:
    spec = model(system="sys", messages=(StoredMessage("user", "u0"), StoredMessage("assistant", "a0")))

    def said(prompt: ChatPrompt | TextPrompt) -> list[str]:
        return [f"{m.role[0]}:{m.content}" for m in prompts.conversation(spec, prompt)]

    assert said(chat) == ["s:sys", "u:u0", "a:a0", "u:hi"]
    # The client's system message, if it comes first, replaces the Modelfile's.
    assert said(ChatPrompt(messages=(SYSTEM, USER))) == ["u:u0", "a:a0", "s:be brief", "u:hi"]
    assert said(text) == ["s:sys", "u:u0", "a:a0", "u:hi"]
    assert said(TextPrompt(text="hi", system="mine", context=(1,))) == ["s:mine", "u:hi"]


@given(st.lists(st.sampled_from([SYSTEM, USER]), min_size=1, max_size=8), st.data())
def test_dropping_the_oldest_keeps_system_and_the_rest_in_order(
    messages: list[Message], data: st.DataObject
) -> None:
    dropped = data.draw(st.integers(0, len(messages) - 1))
    left = prompts.without_oldest(messages, dropped)
    assert left[-1] == messages[-1]
    assert sum(m.role == "system" for m in left) == sum(m.role == "system" for m in messages)
    assert len(left) >= len(messages) - dropped


@given(st.integers(0, 400), st.integers(4, 100), st.integers(-1, 120))
def test_cut_fits_and_keeps_both_ends(length: int, context: int, num_keep: int) -> None:
    ids = tuple(range(length))
    left = prompts.cut(ids, context, num_keep)
    assert len(left) < context
    if length < context:
        assert left == ids
    else:
        keep = min(length if num_keep < 0 else num_keep, context - 1)
        assert left[:keep] == ids[:keep]
        rest = left[keep:]
        assert rest == ids[length - len(rest) :]


def test_an_answer_always_has_an_end() -> None:
    assert prompts.bounded(DEFAULTS, 100, 0).num_predict == 1000
    assert prompts.bounded(Sampling(num_predict=50), 100, 20).num_predict == 30
    assert prompts.bounded(Sampling(num_predict=10), 100, 20).num_predict == 0


@pytest.mark.parametrize("template", ["{{ .Prompt }}", "{{.Prompt}}", "{{ .Prompt }}\n"])
def test_a_template_of_the_prompt_alone_needs_no_other_load(template: str) -> None:
    spec = model(template_problem="unknown")
    assert prompts.with_template(spec, TextPrompt(text="a", template=template)) == spec


def test_a_known_template_of_the_request_is_another_load() -> None:
    chatml = (
        "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}"
        "{{ if .Prompt }}<|im_start|>user\n{{ .Prompt }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
    )
    spec = model(template_problem="unknown", remote=None)
    changed = prompts.with_template(spec, TextPrompt(text="a", template=chatml))
    assert "im_start" in changed.chat_template
    assert load_key(model(remote=None)) != load_key(model(remote=None, chat_template=changed.chat_template))


def test_templates_that_nobody_knows_are_refused() -> None:
    with pytest.raises(Unsupported, match="TEMPLATE is not one that this server knows"):
        prompts.with_template(model(remote=None), TextPrompt(text="a", template="[X]{{ .Prompt }}"))
    with pytest.raises(Unsupported, match="runs on another server"):
        prompts.with_template(model(), TextPrompt(text="a", template="[X]{{ .Prompt }}"))
    with pytest.raises(Unsupported, match="unknown"):
        prompts.with_template(model(template_problem="unknown"), chat)


# ── options ─────────────────────────────────────────────────────────────────────────

samplings = st.builds(
    Sampling,
    temperature=st.none() | st.floats(0, 2),
    top_k=st.none() | st.integers(0, 100),
    seed=st.none() | st.integers(-1, 9),
    stop=st.none() | st.just(("x",)),
)


@given(samplings, samplings)
def test_request_over_model_over_defaults(row: Sampling, asked: Sampling) -> None:
    parameters = {k: v for k, v in msgspec.structs.asdict(row).items() if v is not None}
    merged = overlay(model_sampling({**parameters, "num_ctx": 8192, "unknown": "x"}), asked)
    for name in Sampling.__struct_fields__:
        wanted = getattr(asked, name)
        if wanted is None:
            wanted = parameters.get(name)
        if wanted is None:
            wanted = getattr(DEFAULTS, name)
        assert getattr(merged, name) == wanted
        assert wanted is not None


def test_a_list_of_stops_of_a_modelfile() -> None:
    assert model_sampling({"stop": ["a", "b"]}).stop == ("a", "b")
    with pytest.raises(Invalid, match="wrong type"):
        model_sampling({"temperature": "hot"})


@pytest.mark.parametrize(
    ("row", "asked", "trained", "tokens"),
    [
        (None, None, 0, 4096),
        (None, None, 2048, 2048),
        (8192, None, 0, 8192),
        (8192, 1024, 0, 1024),
        (8192, 0, 0, 8192),  # 0 is as none
        (None, 0, 0, 4096),
        (None, 99999, 2048, 2048),
        (None, 1, 0, 4),
    ],
)
def test_context_from_request_modelfile_settings_and_training(
    row: int | None, asked: int | None, trained: int, tokens: int
) -> None:
    spec = trained_for(trained, parameters={} if row is None else {"num_ctx": row})
    assert shape_of(spec, LoadOptions(num_ctx=asked), Rules()).context_tokens == tokens


def test_images_need_room() -> None:
    spec = trained_for(0, capabilities=frozenset({"completion", "vision"}))
    assert shape_of(spec, LoadOptions(num_ctx=512), Rules()).context_tokens == 2048


def test_an_embedding_model_reads_its_input_in_one_step() -> None:
    spec = trained_for(512, capabilities=frozenset({"embedding"}), pooling="mean")
    shape = shape_of(spec, LoadOptions(num_batch=16), Rules())
    assert (shape.context_tokens, shape.batch) == (512, 512)
    assert shape_of(trained_for(0), LoadOptions(), Rules()).batch == 256


def test_who_shares_a_runner() -> None:
    spec = trained_for(0)

    def shape(**asked: object) -> object:
        return shape_of(spec, LoadOptions(**asked), Rules())  # type: ignore[arg-type]

    plain = shape()
    assert serves(plain, shape(num_ctx=4096))  # type: ignore[arg-type]
    assert not serves(plain, shape(num_ctx=8192))  # type: ignore[arg-type]
    assert not serves(plain, shape(num_thread=1))  # type: ignore[arg-type]
    assert serves(shape(num_gpu=3, use_mmap=False), plain)  # type: ignore[arg-type]
    assert not serves(plain, shape(num_gpu=3))  # type: ignore[arg-type]


# ── vectors ─────────────────────────────────────────────────────────────────────────


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=8), st.integers(1, 9))
def test_vectors_have_length_one_after_the_cut(vector: list[float], dimensions: int) -> None:
    got = finished_vector(vector, normalize=True, dimensions=dimensions)
    assert len(got) == min(len(vector), dimensions)
    length = sum(x * x for x in got) ** 0.5
    assert length == pytest.approx(1.0) or not any(abs(x) > 1e-150 for x in vector[:dimensions])
    assert finished_vector(vector, normalize=False, dimensions=None) == tuple(vector)


@given(st.lists(st.integers(3, 9), min_size=1, max_size=20), st.integers(3, 30))
def test_a_cut_text_keeps_what_the_tokenizer_put_around(body: list[int], limit: int) -> None:
    got = keep_ends([1, *body, 2], body, limit)
    assert (got[0], got[-1]) == (1, 2)
    assert len(got) == min(limit, len(body) + 2)
    assert list(got[1:-1]) == body[: len(got) - 2]


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_a_limit_without_room_for_the_text_is_refused(limit: int) -> None:
    with pytest.raises(Invalid, match="exceeds maximum context length"):
        keep_ends([1, 5, 5, 2], [5, 5], limit)


# ── reasoning before a grammar ──────────────────────────────────────────────────────


@given(
    st.text("ab ", max_size=6),
    st.text("ab <\n", max_size=10),
    st.text("ab", max_size=4),
    st.lists(st.integers(0, 60), max_size=10),
    st.booleans(),
)
def test_the_end_of_the_thoughts_is_found_however_they_are_cut(
    blank: str, thoughts: str, after: str, at: list[int], inside: bool
) -> None:
    blank = " " * len(blank)
    head = ("" if inside else f"{blank}<think>") + f"{thoughts}</think>"
    whole = head + after
    edges = sorted({0, len(whole), *(place % (len(whole) + 1) for place in at)})
    watch, passed = Reasoning(("<think>", "</think>"), inside=inside), 0
    for a, b in itertools.pairwise(edges):
        before = len(watch.text)
        verdict, mine = watch.feed(whole[a:b])
        assert verdict != "answers"
        passed = before + mine if verdict in ("reasons", "closed") else passed
        if verdict == "closed":
            break
    assert watch.text == head
    assert passed == len(head)


def test_an_answer_without_thoughts_is_seen_at_once() -> None:
    watch = Reasoning(("<think>", "</think>"), inside=False)
    assert watch.feed(" <t")[0] == "unclear"
    assert watch.feed("he")[0] == "answers"


# ── strict templates ────────────────────────────────────────────────────────────────


def test_a_strict_template_gets_one_system_message() -> None:
    """As Codex begins (instructions and a developer's message), and as Claude Code goes on."""
    picture = msgspec.structs.replace(USER, images=(b"x",))
    late, answer = Message(role="system", content="it is late"), Message(role="assistant", content="hello")
    asked = ChatPrompt(messages=(SYSTEM, late, picture, late, answer, late))
    assert prompts.conversation(model(), asked) == asked.messages
    assert prompts.conversation(model(template_refuses=True), asked) == (
        Message(role="system", content="be brief\n\nit is late"),
        msgspec.structs.replace(picture, content="hi\n\nit is late"),
        answer,
        Message(role="user", content="it is late"),
    )
    in_turn = ChatPrompt(messages=(SYSTEM, USER, answer, late, late, picture))
    assert prompts.conversation(model(template_refuses=True), in_turn) == (
        *(SYSTEM, USER, answer),
        msgspec.structs.replace(picture, content="it is late\n\nit is late\n\nhi"),
    ), "no two of the user's in a row"
    plain = ChatPrompt(messages=(SYSTEM, USER, answer, USER))
    assert prompts.conversation(model(template_refuses=True), plain) == plain.messages


@given(
    st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), st.text("ab", max_size=3)))
)
def test_no_word_of_a_conversation_is_lost_on_a_strict_template(rows: list[tuple[str, str]]) -> None:
    messages = tuple(Message(role=role, content=text) for role, text in rows)  # type: ignore[arg-type]  # sampled
    found = with_one_system(messages)
    assert all(message.role != "system" for message in found[1:])
    assert "".join(m.content for m in found).replace("\n\n", "") == "".join(t for _, t in rows).replace(
        "\n\n", ""
    )
    assert with_one_system(found) == found
