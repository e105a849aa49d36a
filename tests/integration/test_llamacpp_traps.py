"""The ten traps of DESIGN.md, "Inference engine": each seen once, none may come back."""

from __future__ import annotations

import asyncio
import itertools
import json
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import psutil
import pytest
from tests.integration.llamacpp_programs import PROGRAMS, program_named
from tests.limits import SOON_S
from tests.models import SMOLLM2, Models, model_spec

from ollama_distributed.adapters.engines.fetch import fetch
from ollama_distributed.adapters.engines.llamacpp import runner_port
from ollama_distributed.adapters.engines.llamacpp.engine import LlamaCppEngine
from ollama_distributed.adapters.engines.llamacpp.launch import MAX_BATCH, MAX_CPU_BATCH, runner_params
from ollama_distributed.adapters.engines.llamacpp.runner_port import LlamaCppRunner
from ollama_distributed.adapters.engines.llamacpp.vocabulary import read_fragments
from ollama_distributed.base.errors import ContextExceeded, LoadFailed, RunnerDied
from ollama_distributed.base.inference import Message, NamedTool, Sampling, Tool, ToolChoice
from ollama_distributed.base.tokens import Done, Progress, Tokens
from ollama_distributed.models.scripted import TOOLS_TEMPLATE
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.serving.ports import ChatRequest, CompletionRequest, LoadPlan
from ollama_distributed.testing.recording import Recording

pytestmark = [pytest.mark.integration, pytest.mark.anyio]

needs_smollm2 = pytest.mark.skipif(not SMOLLM2.exists(), reason="the real model is not here (make models)")

Loader = Callable[..., Awaitable[LlamaCppRunner]]


@pytest.fixture(params=PROGRAMS)
async def load(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Loader]:
    """A builder: model (and plan's fields) -> runner; all are ended afterwards."""
    engine = LlamaCppEngine(await program_named(request.param), runtime_dir=tmp_path / "run")

    async def start(model: ModelSpec | Path, **plan: int) -> LlamaCppRunner:
        spec = model if isinstance(model, ModelSpec) else model_spec(model)
        return await engine.load(spec, LoadPlan(**{"slots": 1, "context_tokens": 2048, "threads": 1, **plan}))

    yield start
    await engine.close()


def smollm2() -> ModelSpec:
    return model_spec(SMOLLM2)


def say(prompt: str, *, shift: bool = True, **sampling: float) -> CompletionRequest:
    fields = {"temperature": 0.0, **sampling}
    return CompletionRequest(prompt=prompt, sampling=Sampling(**fields), shift=shift)  # type: ignore[arg-type]


async def answer(runner: LlamaCppRunner, request: CompletionRequest) -> Recording:
    recording = Recording()
    runner.generate(request, recording)
    await recording.done()
    return recording


LONG_PROMPT = "The quick brown fox jumps over the lazy dog and runs away. " * 220
"""2,900 tokens of SmolLM2: over five seconds on two cores."""


async def test_trap_1_a_runner_uses_the_threads_of_its_plan(load: Loader, models: Models) -> None:
    """Two runners at two threads on two cores fall to a sixth of their speed."""
    runner = await load(models.endless(), threads=1, context_tokens=65_536)
    recording = Recording()
    generation = runner.generate(say("go"), recording)
    await recording.pieces(1)
    process = psutil.Process(runner.process.pid)
    before = {thread.id: thread.user_time for thread in process.threads()}
    async with asyncio.timeout(SOON_S):
        while max(spent := _spent(process, before)) < 0.5:
            await asyncio.sleep(0.05)
    generation.cancel()
    # One thread computes; the one that writes the stream adds a little.
    assert sum(spent) < 1.5 * max(spent)


def _spent(process: psutil.Process, before: dict[int, float]) -> list[float]:
    """CPU seconds of each thread since then."""
    return [thread.user_time - before.get(thread.id, 0.0) for thread in process.threads()]


@needs_smollm2
async def test_trap_2_a_cancel_is_seen_while_the_prompt_is_read(load: Loader) -> None:
    runner = await load(smollm2(), context_tokens=4096)
    process = psutil.Process(runner.process.pid)
    began_s = process.cpu_times().user
    reading = Recording()
    reader = runner.generate(say(LONG_PROMPT), reading)
    await progress(reading, 3)
    read_s = process.cpu_times().user - began_s  # of three steps, or more where we hear of them late
    reader.cancel()
    await answer(runner, say("Hi", num_predict=1))
    # A cancel that is not seen costs the rest of the prompt: twenty steps more, not two.
    assert process.cpu_times().user - began_s - read_s < 3 * read_s


@needs_smollm2
async def test_trap_3_a_long_prompt_does_not_stall_the_other_streams(load: Loader) -> None:
    runner = await load(smollm2(), slots=2, context_tokens=4096)
    other, reading = Recording(), Recording()
    running = runner.generate(say("Count: one, two,", num_predict=2000), other)
    await other.pieces(3)
    reader = runner.generate(say(LONG_PROMPT), reading)
    await progress(reading, 1)
    said = pieces(other)
    await other.pieces(said + 5)
    # It spoke while the prompt was read: a token of it comes between any two steps.
    assert not pieces(reading)
    reader.cancel()
    running.cancel()
    read = [e.processed for e in reading.events if isinstance(e, Progress)]
    assert max(later - earlier for earlier, later in itertools.pairwise(read)) <= MAX_CPU_BATCH


def pieces(recording: Recording) -> int:
    return sum(isinstance(event, Tokens) for event in recording.events)


async def progress(recording: Recording, steps: int) -> None:
    """Until so many steps of the prompt were read."""
    async with asyncio.timeout(SOON_S):
        while len([e for e in recording.events if isinstance(e, Progress) and e.processed]) < steps:
            assert not pieces(recording), "read too fast to test"
            await asyncio.sleep(0.005)


@pytest.mark.parametrize(("gpu", "most"), [(True, MAX_BATCH), (False, MAX_CPU_BATCH)])
def test_traps_2_and_3_the_step_is_small_whatever_the_plan_says(models: Models, gpu: bool, most: int) -> None:
    plan = LoadPlan(slots=1, context_tokens=8192, threads=1, batch=2048)
    params = runner_params(model_spec(models.scripted()), plan, socket="/s.sock", api_key="k", gpu=gpu)
    assert params.batch == params.ubatch == most


async def test_trap_4_no_request_fails_200_in_a_row_and_16_at_once(load: Loader, models: Models) -> None:
    runner = await load(models.scripted("one two three"), slots=4)
    for _ in range(200):
        assert (await answer(runner, say("go\n"))).text == "one two three"
    many = [Recording() for _ in range(16)]
    for recording in many:
        runner.generate(say("go\n"), recording)
    for recording in many:
        await recording.done()
        assert recording.text == "one two three"


async def test_trap_5_an_aborting_load_is_an_error_with_its_reason(load: Loader, models: Models) -> None:
    before = psutil.Process().children(recursive=True)
    with pytest.raises(LoadFailed) as aborted:
        await load(models.corrupt("absurd-layers"))
    assert "GGML_ASSERT" in aborted.value.message
    assert "SIGABRT" in aborted.value.message
    with pytest.raises(LoadFailed, match="magic"):
        await load(models.corrupt("not-gguf"))
    with pytest.raises(LoadFailed, match="not within the file bounds"):
        await load(models.corrupt("data-cut"))
    # No debugger was started on the corpse: it would be a child of ours that lives on.
    assert set(psutil.Process().children(recursive=True)) <= set(before)
    assert (await answer(await load(models.scripted("fine")), say("go\n"))).text == "fine"


async def test_trap_6_a_prompt_over_the_context_is_refused_with_the_numbers(
    load: Loader, models: Models
) -> None:
    runner = await load(models.scripted("fine"), context_tokens=256)
    recording = Recording()
    runner.generate(say("x" * 1000), recording)
    error = (await recording.failed()).error
    assert isinstance(error, ContextExceeded)
    assert (error.prompt_tokens, error.context_tokens) == (1001, 256)


async def test_trap_6_a_full_context_ends_with_length_or_slides(load: Loader, models: Models) -> None:
    runner = await load(models.endless(), context_tokens=256)
    full = await answer(runner, say("go\n", shift=False))
    done = full.events[-1]
    assert isinstance(done, Done)
    assert done.reason == "length"
    assert done.prompt_tokens + done.completion_tokens in range(254, 257)
    slid = await answer(runner, say("go\n", num_predict=600))
    done = slid.events[-1]
    assert isinstance(done, Done)
    assert done.completion_tokens == 600


async def test_trap_6_one_full_slot_leaves_the_others_alone(load: Loader, models: Models) -> None:
    """With a unified KV cache its exhaustion kills all streams."""
    runner = await load(models.endless(), slots=3, context_tokens=256)
    recordings = [Recording() for _ in range(3)]
    for recording in recordings:
        runner.generate(say("go\n", shift=False), recording)
    for recording in recordings:
        assert (await recording.done()).reason == "length"


async def test_trap_6_an_embedding_input_may_fill_the_models_whole_context(
    load: Loader, models: Models
) -> None:
    runner = await load(model_spec(models.minilm(), pooling="mean"), context_tokens=512)
    vectors, tokens = await runner.embed(["word " * 500])
    assert tokens > MAX_BATCH
    assert len(vectors[0]) == 384
    with pytest.raises(ContextExceeded) as refused:
        await runner.embed(["fine", "word " * 600])
    assert refused.value.prompt_tokens > refused.value.context_tokens > 0
    assert len((await runner.embed(["fine"]))[0]) == 1


async def test_trap_7_the_dangerous_defaults_are_off(load: Loader, models: Models) -> None:
    runner = await load(models.scripted("fine"))
    address = runner.process.address
    headers = {"origin": "http://evil.example"}
    for path, body in (("/completion", b'{"prompt":"x"}'), ("/tokenize", b'{"content":"x"}')):
        refused = await fetch(address, "POST", path, headers=headers, body=body, deadline_s=SOON_S)
        assert refused.status == 401, path
        assert refused.headers.get("access-control-allow-origin", "") not in ("*", "http://evil.example")
    key = {"authorization": f"Bearer {runner._params.api_key}"}
    assert (await fetch(address, "GET", "/", headers=key, deadline_s=SOON_S)).status == 404
    assert (await fetch(address, "GET", "/slots", headers=key, deadline_s=SOON_S)).status == 501
    saved = b'{"filename":"x"}'
    for method, path, body in (
        ("POST", "/slots/0?action=save", saved),
        ("POST", "/props", b'{"x":1}'),
    ):
        refused = await fetch(address, method, path, headers=key, body=body, deadline_s=SOON_S)
        assert refused.status >= 400, path
    assert runner._params.cache_ram_mib <= 512


@needs_smollm2
async def test_trap_7_health_does_not_wait_behind_the_batch(load: Loader) -> None:
    runner = await load(smollm2(), context_tokens=4096)
    recording = Recording()
    generation = runner.generate(say(LONG_PROMPT), recording)
    await progress(recording, 1)
    while not await runner.healthy():  # it has a second, which a slow machine may take for itself
        assert not pieces(recording)
    metrics = await runner.metrics()
    assert not pieces(recording)  # the prompt is still read
    assert metrics.slots_busy == 1
    generation.cancel()


WEATHER = Tool(
    name="weather",
    parameters={
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/city"}, "today": {"type": "boolean"}},
        "required": ["city"],
        "additionalProperties": False,
        "$defs": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    },
)
STOP = Tool(name="stop", parameters={"type": "object", "properties": {}, "additionalProperties": False})


@pytest.mark.parametrize(
    ("choice", "parallel"), [("required", True), ("required", False), (NamedTool("weather"), True)]
)
async def test_trap_8_a_required_tool_is_called(
    load: Loader, models: Models, choice: ToolChoice, parallel: bool
) -> None:
    """By a model of random weights, which would never do it by itself."""
    runner = await load(models.random())
    for seed in range(5):
        recording = Recording()
        messages = (Message(role="user", content="Write a poem. Do not use any tool."),)
        request = ChatRequest(
            messages=messages,
            tools=(WEATHER, STOP),
            tool_choice=choice,
            parallel_tool_calls=parallel,
            sampling=Sampling(temperature=1.0, seed=seed, num_predict=1500),
        )
        runner.chat(request, recording)
        assert (await recording.done()).reason == "tool_calls"
        assert len(recording.tool_calls) == 1 or (parallel and choice == "required")
        for call in recording.tool_calls:
            assert call.id
            assert call.name in (("weather",) if isinstance(choice, NamedTool) else ("weather", "stop"))
            if call.name == "weather":
                assert json.loads(call.arguments)["city"] in ("Paris", "Rome")


MARKED_TEMPLATE = """\
{%- for tool in tools or [] %}{{- tool | tojson }}{%- endfor %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{%- if message.content %}{{- '<|reply|>' + message.content + '<|/reply|>' }}{%- endif %}
{%- for call in message.tool_calls or [] %}
{{- '<|call|>{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}
{{- '}<|/call|>' }}
{%- endfor %}
{%- else %}{{- message.content }}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
"""Of a model that marks what it says, as Command R7B and gpt-oss do."""


@pytest.mark.parametrize("choice", ["auto", "required"])
async def test_a_model_that_leaves_its_format_is_heard(
    load: Loader, models: Models, choice: ToolChoice
) -> None:
    """llama-server would make it an error 500."""
    runner = await load(models.scripted("Hello there, friend.", template=MARKED_TEMPLATE))
    recording = Recording()
    messages = (Message(role="user", content="hi"),)
    # It never learnt to call: what the grammar leaves it is chance, and two seeds of a hundred do not
    # come to an end within 200 tokens.
    sampling = Sampling(num_predict=1500, seed=0)
    runner.chat(
        ChatRequest(messages=messages, tools=(STOP,), tool_choice=choice, sampling=sampling), recording
    )
    done = await recording.done()
    if choice == "auto":
        assert (recording.text, done.reason) == ("Hello there, friend.", "stop")
    else:
        assert {call.name for call in recording.tool_calls} == {"stop"}


async def test_trap_8_no_tools_are_offered_when_none_is_chosen(load: Loader, models: Models) -> None:
    runner = await load(models.tools())
    recording = Recording()
    messages = (Message(role="user", content="hi"),)
    runner.chat(ChatRequest(messages=messages, tools=(STOP,), tool_choice="none"), recording)
    assert (await recording.done()).reason == "stop"
    assert not recording.tool_calls


@needs_smollm2
def test_trap_9_reading_a_real_vocabulary_is_quick() -> None:
    """`gguf.GGUFReader` takes 2.6-10 s on a real file: hundreds of times a plain loop over the
    50,000 tokens. Coverage slows the reader down, and not the loop."""
    started = time.process_time()
    read_fragments(str(SMOLLM2))
    reading_s = time.process_time() - started
    file = bytes(50_000)
    started = time.process_time()
    for at in range(50_000 - 8):
        struct.unpack_from("<Q", file, at)
    assert reading_s < 100 * (time.process_time() - started)


async def test_trap_10_what_waits_behind_the_slots_is_seen(load: Loader, models: Models) -> None:
    """The caller keeps calls within the slots; the runner's figures show when it does not."""
    runner = await load(models.endless(), slots=2, context_tokens=8192)
    recordings = [Recording() for _ in range(3)]
    generations = [runner.generate(say("go"), recording) for recording in recordings[:2]]
    for recording in recordings[:2]:
        await recording.pieces(1)
    generations.append(runner.generate(say("go"), recordings[2]))
    async with asyncio.timeout(SOON_S):
        while (metrics := await runner.metrics()).queued != 1:
            await asyncio.sleep(0.01)
    assert metrics.slots_busy == 2
    assert not recordings[2].events
    for generation in generations:
        generation.cancel()
    assert (await runner.metrics()).slots_busy == 0


# ── templates that do not end (security table S-04) ─────────────────────────────────

ENDLESS = (
    "{%- if messages[-1]['content'] == 'never' -%}{%- for i in range(100000) -%}"
    "{%- for j in range(100000) -%}{%- set x = i -%}{%- endfor -%}{%- endfor -%}{%- endif -%}"
)


async def test_s04_a_template_that_does_not_end_costs_its_runner(
    load: Loader, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CVE-2026-115911: an unbounded render in the only worker stopped every tenant."""
    runner = await load(models.scripted("fine", template=ENDLESS + TOOLS_TEMPLATE))
    assert "fine?" in await runner.apply_template([Message(role="user", content="fine?")])
    monkeypatch.setattr(runner_port, "TEMPLATE_S", 0.5)
    with pytest.raises(RunnerDied, match="template was not rendered"):
        await runner.apply_template([Message(role="user", content="never")])
    await runner.unload()
    assert not psutil.pid_exists(runner.process.pid)


async def test_s04_nor_does_one_inside_a_chat(
    load: Loader, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CVE-2026-115918: a second route forgot the gate."""
    runner = await load(models.scripted("fine", template=ENDLESS + TOOLS_TEMPLATE))
    tools = (Tool(name="f", description="d"),)
    said = Recording()
    runner.chat(ChatRequest(messages=(Message(role="user", content="fine?"),), tools=tools), said)
    await said.done()
    monkeypatch.setattr(runner_port, "TEMPLATE_S", 0.5)
    never = ChatRequest(messages=(Message(role="user", content="never"),), tools=tools)
    lost = Recording()
    runner.chat(never, lost)
    error = (await lost.failed()).error
    assert isinstance(error, RunnerDied)
    assert "template was not rendered" in error.message
