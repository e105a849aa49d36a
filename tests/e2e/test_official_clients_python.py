"""The unmodified official Python clients of Ollama, OpenAI and Anthropic against a node."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import ollama
import openai
import pytest
from pydantic import BaseModel, ConfigDict

from tests.e2e.conftest import ANSWER, CONCLUSION, THOUGHT
from tests.limits import SOON_S
from tests.nodes import NodeProcess, until

pytestmark = pytest.mark.e2e

QUESTION: Any = [{"role": "user", "content": "Say it."}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "get_weather", "description": "The weather of a city", "parameters": PARAMETERS}
TOOLS: Any = [{"type": "function", "function": WEATHER}]


class Capital(BaseModel):
    """Bounded, so that the smallest model fills it in a few tokens."""

    model_config = ConfigDict(extra="forbid")
    city: Literal["Paris", "Rome"]
    is_capital: bool


# ── Ollama ──────────────────────────────────────────────────────────────────────────


@pytest.fixture
def ollama_client(node: NodeProcess) -> Iterator[ollama.Client]:
    client = ollama.Client(host=node.url)
    yield client
    client._client.close()  # the client has no public way to close its connections


def test_ollama_chat(ollama_client: ollama.Client) -> None:
    answer = ollama_client.chat("scripted", messages=QUESTION)
    assert answer.message.content == ANSWER
    assert answer.done_reason == "stop"
    assert answer.eval_count is not None
    assert answer.eval_count > 10


def test_ollama_chat_stream_arrives_in_pieces(ollama_client: ollama.Client) -> None:
    parts = list(ollama_client.chat("scripted", messages=QUESTION, stream=True))
    assert "".join(part.message.content or "" for part in parts) == ANSWER
    assert len(parts) > 5
    assert parts[-1].done
    assert not any(part.done for part in parts[:-1])


def test_ollama_generate_and_continue_from_context(ollama_client: ollama.Client) -> None:
    answer = ollama_client.generate("scripted", prompt="Say it.")
    assert answer.response == ANSWER
    assert answer.context
    again = ollama_client.generate("scripted", prompt="Again.", context=answer.context)
    assert again.response == ANSWER
    assert len(again.context or []) > len(answer.context)


def test_ollama_tools(ollama_client: ollama.Client) -> None:
    answer = ollama_client.chat("scripted-tools", messages=QUESTION, tools=TOOLS)
    (call,) = answer.message.tool_calls or []
    assert call.function.name == "get_weather"
    assert call.function.arguments == {"city": "Paris"}


def test_ollama_tools_stream(ollama_client: ollama.Client) -> None:
    parts = list(ollama_client.chat("scripted-tools", messages=QUESTION, tools=TOOLS, stream=True))
    calls = [call for part in parts for call in part.message.tool_calls or []]
    assert [call.function.arguments for call in calls] == [{"city": "Paris"}]


def test_ollama_thinking(ollama_client: ollama.Client) -> None:
    answer = ollama_client.chat("scripted-thinking", messages=QUESTION, think=True)
    assert answer.message.thinking is not None
    assert answer.message.thinking.strip() == THOUGHT
    assert answer.message.content == CONCLUSION


def test_ollama_thinking_where_there_is_none(ollama_client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="does not support thinking") as refused:
        ollama_client.chat("scripted", messages=QUESTION, think=True)
    assert refused.value.status_code == 400


def test_ollama_structured_output(ollama_client: ollama.Client) -> None:
    answer = ollama_client.chat(
        "smollm2:135m",
        messages=[{"role": "user", "content": "The capital of France, as JSON."}],
        format=Capital.model_json_schema(),
        options={"temperature": 0, "num_predict": 200},
    )
    Capital.model_validate_json(answer.message.content or "")


def test_ollama_embed(ollama_client: ollama.Client, embedder: str) -> None:
    vectors = ollama_client.embed(embedder, input=["a cat", "a kitten", "a tax form"]).embeddings
    assert [len(vector) for vector in vectors] == [384] * 3
    assert sum(x * x for x in vectors[0]) == pytest.approx(1, abs=1e-3)

    def cosine(a: int, b: int) -> float:
        return sum(x * y for x, y in zip(vectors[a], vectors[b], strict=True))

    assert cosine(0, 1) > cosine(0, 2) + 0.2
    assert len(ollama_client.embeddings(embedder, prompt="a cat").embedding) == 384


def test_ollama_list_show_ps(ollama_client: ollama.Client) -> None:
    listed = {model.model: model for model in ollama_client.list().models}
    assert {"scripted:latest", "smollm2:135m"} <= set(listed)
    shown = ollama_client.show("smollm2:135m")
    assert shown.details is not None
    assert shown.details.family == "llama"
    assert shown.details.parameter_size == "134.52M"
    assert shown.modelinfo is not None
    assert shown.modelinfo["llama.context_length"] == 8192
    ollama_client.generate("scripted", prompt="")
    running = {model.model: model for model in ollama_client.ps().models}
    assert running["scripted:latest"].context_length


def test_ollama_create_copy_delete(ollama_client: ollama.Client) -> None:
    ollama_client.create("made", from_="scripted", system="Be brief.", parameters={"temperature": 0.1})
    assert ollama_client.chat("made", messages=QUESTION).message.content == ANSWER
    assert "Be brief." in (ollama_client.show("made").modelfile or "")
    assert ollama_client.copy("made", "copied").status == "success"
    for name in ("made", "copied"):
        assert ollama_client.delete(name).status == "success"
    with pytest.raises(ollama.ResponseError, match="not found") as gone:
        ollama_client.chat("made", messages=QUESTION)
    assert gone.value.status_code == 404


async def test_ollama_async(node: NodeProcess) -> None:
    client = ollama.AsyncClient(host=node.url)
    parts = [part async for part in await client.chat("scripted", messages=QUESTION, stream=True)]
    assert "".join(part.message.content or "" for part in parts) == ANSWER
    await client._client.aclose()


# ── OpenAI ──────────────────────────────────────────────────────────────────────────


@pytest.fixture
def openai_client(node: NodeProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{node.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_openai_chat(openai_client: openai.OpenAI) -> None:
    answer = openai_client.chat.completions.create(
        model="scripted", messages=QUESTION, max_completion_tokens=200
    )
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_openai_batch(openai_client: openai.OpenAI) -> None:
    """Files, a batch over two models, errors line by line, results and deletion."""

    def line(name: str, model: str) -> str:
        body = {"model": model, "messages": QUESTION}
        asked = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
        return json.dumps(asked)

    rows = [line("first", "scripted"), line("none", "no-such-model"), line("last", "scripted")]
    file = openai_client.files.create(file=("in.jsonl", "\n".join(rows).encode()), purpose="batch")
    assert (file.filename, file.purpose, file.status) == ("in.jsonl", "batch", "processed")
    assert openai_client.files.retrieve(file.id) == file
    assert file.id in {one.id for one in openai_client.files.list(purpose="batch")}
    assert openai_client.files.content(file.id).text == "\n".join(rows)
    batch = openai_client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"run": "1"},
    )
    until(lambda: openai_client.batches.retrieve(batch.id).status == "completed", SOON_S, "the batch ends")
    done = openai_client.batches.retrieve(batch.id)
    assert done.metadata == {"run": "1"}
    assert done.request_counts is not None
    assert (done.request_counts.total, done.request_counts.completed) == (3, 2)
    assert done.output_file_id
    assert done.error_file_id
    results = [json.loads(one) for one in openai_client.files.content(done.output_file_id).text.splitlines()]
    assert {one["custom_id"] for one in results} == {"first", "last"}
    assert {one["response"]["body"]["choices"][0]["message"]["content"] for one in results} == {ANSWER}
    (wrong,) = [json.loads(one) for one in openai_client.files.content(done.error_file_id).text.splitlines()]
    assert wrong["response"]["status_code"] == 404
    assert wrong["response"]["body"]["error"]["code"] == "model_not_found"
    assert next(iter(openai_client.batches.list(limit=1))).id == batch.id
    with pytest.raises(openai.ConflictError):
        openai_client.batches.cancel(batch.id)
    assert openai_client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        openai_client.files.retrieve(file.id)
    with pytest.raises(openai.NotFoundError):
        openai_client.batches.retrieve("batch_elsewhere_1")
    with pytest.raises(openai.BadRequestError):
        openai_client.files.create(file=("in.jsonl", b"{}"), purpose="vision")


def test_openai_limits(openai_client: openai.OpenAI) -> None:
    answer = openai_client.chat.completions.create(
        model="scripted", messages=QUESTION, max_completion_tokens=3
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    stopped = openai_client.chat.completions.create(model="scripted", messages=QUESTION, stop=["jumps"])
    assert stopped.choices[0].message.content == ANSWER.split("jumps", maxsplit=1)[0]


def test_openai_chat_stream(openai_client: openai.OpenAI) -> None:
    chunks = list(
        openai_client.chat.completions.create(
            model="scripted", messages=QUESTION, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"


def test_openai_several_choices(openai_client: openai.OpenAI) -> None:
    answer = openai_client.chat.completions.create(model="scripted", messages=QUESTION, n=3)
    assert [choice.message.content for choice in answer.choices] == [ANSWER] * 3
    assert [choice.index for choice in answer.choices] == [0, 1, 2]


def test_openai_logprobs(openai_client: openai.OpenAI) -> None:
    answer = openai_client.chat.completions.create(
        model="scripted", messages=QUESTION, logprobs=True, top_logprobs=2, max_completion_tokens=4
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert len(logprobs.content or []) == 4
    assert all(len(token.top_logprobs) == 2 for token in logprobs.content or [])


def test_openai_tools(openai_client: openai.OpenAI) -> None:
    answer = openai_client.chat.completions.create(model="scripted-tools", messages=QUESTION, tools=TOOLS)
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls or []
    assert json.loads(call.function.arguments) == {"city": "Paris"}  # type: ignore[union-attr]
    result: Any = [
        *QUESTION,
        answer.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    assert openai_client.chat.completions.create(model="scripted-tools", messages=result, tools=TOOLS).choices


def test_openai_tools_stream(openai_client: openai.OpenAI) -> None:
    with openai_client.chat.completions.stream(
        model="scripted-tools", messages=QUESTION, tools=TOOLS
    ) as stream:
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls or []
    assert json.loads(call.function.arguments) == {"city": "Paris"}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_openai_tool_choice_is_enforced_on_a_model_that_would_not_call(
    openai_client: openai.OpenAI, choice: Any
) -> None:
    bounded = {"city": {"enum": ["Paris", "Rome"]}}
    tools: Any = [
        {"type": "function", "function": {**WEATHER, "parameters": {**PARAMETERS, "properties": bounded}}}
    ]
    answer = openai_client.chat.completions.create(
        model="scripted-no-call",
        messages=QUESTION,
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=False,
        seed=0,  # what the grammar leaves it is chance
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.function.name == "get_weather"  # type: ignore[union-attr]
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")  # type: ignore[union-attr]
    assert answer.choices[0].finish_reason == "tool_calls"


def test_openai_tool_choice_keeps_the_models_own_call(openai_client: openai.OpenAI) -> None:
    answer = openai_client.chat.completions.create(
        model="scripted-tools", messages=QUESTION, tools=TOOLS, tool_choice="required"
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert json.loads(call.function.arguments) == {"city": "Paris"}  # type: ignore[union-attr]
    assert answer.choices[0].finish_reason == "tool_calls"


def test_openai_tool_choice_none(openai_client: openai.OpenAI) -> None:
    answer = openai_client.chat.completions.create(
        model="scripted-tools", messages=QUESTION, tools=TOOLS, tool_choice="none"
    )
    assert not answer.choices[0].message.tool_calls


def test_openai_structured_output(openai_client: openai.OpenAI) -> None:
    parsed = openai_client.chat.completions.parse(
        model="smollm2:135m",
        messages=[{"role": "user", "content": "The capital of France, as JSON."}],
        response_format=Capital,
        temperature=0,
        max_completion_tokens=200,
    )
    assert isinstance(parsed.choices[0].message.parsed, Capital)


def test_openai_completions(openai_client: openai.OpenAI) -> None:
    answer = openai_client.completions.create(model="scripted", prompt="Say it.", max_tokens=200)
    assert answer.choices[0].text == ANSWER
    stream = openai_client.completions.create(model="scripted", prompt="Say it.", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == ANSWER


def test_openai_embeddings(openai_client: openai.OpenAI, embedder: str) -> None:
    # The client asks for base64 by default and decodes it itself.
    both = openai_client.embeddings.create(model=embedder, input=["a cat", "a dog"])
    plain = openai_client.embeddings.create(model=embedder, input="a cat", encoding_format="float")
    assert len(both.data) == 2
    assert both.data[0].embedding == pytest.approx(plain.data[0].embedding, abs=1e-3)


def test_openai_models(openai_client: openai.OpenAI) -> None:
    assert "scripted:latest" in {model.id for model in openai_client.models.list()}
    assert openai_client.models.retrieve("smollm2:135m").id == "smollm2:135m"
    with pytest.raises(openai.NotFoundError):
        openai_client.models.retrieve("absent")


def test_openai_responses(openai_client: openai.OpenAI) -> None:
    answer = openai_client.responses.create(model="scripted", input="Say it.", instructions="Be exact.")
    assert answer.output_text == ANSWER
    assert answer.status == "completed"
    with openai_client.responses.stream(model="scripted", input="Say it.") as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == ANSWER
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"


def test_openai_errors(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="absent"):
        openai_client.chat.completions.create(model="absent", messages=QUESTION)
    with pytest.raises(openai.BadRequestError):
        openai_client.chat.completions.create(model="scripted", messages=[])
    with pytest.raises(openai.BadRequestError, match="temperature"):
        openai_client.chat.completions.create(model="scripted", messages=QUESTION, temperature="hot")  # type: ignore[arg-type]


def test_openai_options_extension_sets_the_context(openai_client: openai.OpenAI) -> None:
    answer = openai_client.completions.create(
        model="scripted", prompt="word " * 400, max_tokens=4, extra_body={"options": {"num_ctx": 64}}
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens <= 64


# ── Anthropic ───────────────────────────────────────────────────────────────────────


@pytest.fixture
def anthropic_client(node: NodeProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=node.url, api_key="unused", max_retries=0) as client:
        yield client


def test_anthropic_messages(anthropic_client: anthropic.Anthropic) -> None:
    answer = anthropic_client.messages.create(
        model="scripted", max_tokens=200, messages=QUESTION, system="Be exact."
    )
    assert [block.type for block in answer.content] == ["text"]
    assert answer.content[0].text == ANSWER  # type: ignore[union-attr]
    assert answer.stop_reason == "end_turn"
    assert answer.usage.output_tokens > 10


def test_anthropic_stream(anthropic_client: anthropic.Anthropic) -> None:
    with anthropic_client.messages.stream(model="scripted", max_tokens=200, messages=QUESTION) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == ANSWER
    assert final.stop_reason == "end_turn"
    assert final.usage.input_tokens > 0


def test_anthropic_stops(anthropic_client: anthropic.Anthropic) -> None:
    short = anthropic_client.messages.create(model="scripted", max_tokens=2, messages=QUESTION)
    assert short.stop_reason == "max_tokens"
    stopped = anthropic_client.messages.create(
        model="scripted", max_tokens=200, messages=QUESTION, stop_sequences=["jumps"]
    )
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "jumps")


def test_anthropic_tools(anthropic_client: anthropic.Anthropic) -> None:
    tools: Any = [{"name": "get_weather", "description": "weather", "input_schema": PARAMETERS}]
    answer = anthropic_client.messages.create(
        model="scripted-tools", max_tokens=200, messages=QUESTION, tools=tools
    )
    assert answer.stop_reason == "tool_use"
    used = answer.content[-1]
    assert used.type == "tool_use"
    assert used.input == {"city": "Paris"}
    with anthropic_client.messages.stream(
        model="scripted-tools", max_tokens=200, messages=QUESTION, tools=tools
    ) as stream:
        assert stream.get_final_message().content[-1].input == {"city": "Paris"}  # type: ignore[union-attr]
    follow_up: Any = [
        *QUESTION,
        {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in answer.content]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": used.id, "content": "sunny"}]},
    ]
    assert anthropic_client.messages.create(
        model="scripted-tools", max_tokens=200, messages=follow_up, tools=tools
    ).content


def test_anthropic_thinking(anthropic_client: anthropic.Anthropic) -> None:
    answer = anthropic_client.messages.create(
        model="scripted-thinking",
        max_tokens=2000,
        messages=QUESTION,
        thinking={"type": "enabled", "budget_tokens": 1024},
    )
    assert [block.type for block in answer.content] == ["thinking", "text"]
    assert answer.content[1].text == CONCLUSION  # type: ignore[union-attr]


def test_anthropic_counts_tokens(anthropic_client: anthropic.Anthropic) -> None:
    short = anthropic_client.messages.count_tokens(model="scripted", messages=QUESTION)
    long = anthropic_client.messages.count_tokens(
        model="scripted", messages=[{"role": "user", "content": "Say it. " * 20}]
    )
    assert 0 < short.input_tokens < long.input_tokens
    answer = anthropic_client.messages.create(model="scripted", max_tokens=5, messages=QUESTION)
    assert answer.usage.input_tokens == short.input_tokens


def test_anthropic_errors(anthropic_client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="absent"):
        anthropic_client.messages.create(model="absent", max_tokens=5, messages=QUESTION)
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        anthropic_client.messages.create(model="scripted", max_tokens=0, messages=QUESTION)
