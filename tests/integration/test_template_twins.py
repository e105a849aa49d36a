"""Template twins through the real engine: what llama.cpp's Jinja makes of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ollama_distributed.adapters.blobs.store import BlobStore
from ollama_distributed.adapters.engines.llamacpp.discover import wheel
from ollama_distributed.adapters.engines.llamacpp.engine import LlamaCppEngine
from ollama_distributed.base.inference import Message, Tool, ToolCall
from ollama_distributed.catalog.service import Catalog
from ollama_distributed.catalog.wire import CreateRequest
from ollama_distributed.models.scripted import scripted_model
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.models.templates import PASSTHROUGH
from ollama_distributed.models.templates.formats import FORMATS, Format
from ollama_distributed.models.templates.known import normalised
from ollama_distributed.models.templates.tools import QWEN25
from ollama_distributed.serving.ports import LoadPlan, Runner

pytestmark = pytest.mark.integration
MODEL = scripted_model("hello", chat_template="")
PLAN = LoadPlan(slots=1, context_tokens=512, threads=1)
SYSTEM = Message(role="system", content="Be kind.")
FIRST = Message(role="user", content="Hi <|x|> {{ y }} 'z' \\n")
ANSWER = Message(role="assistant", content="Hello!")
SECOND = Message(role="user", content="Bye\nnow")


@pytest.fixture
async def catalog(tmp_path: Path) -> AsyncIterator[Catalog]:
    store = BlobStore(tmp_path / "models")
    made = Catalog(store)
    await made.start()
    digest = hashlib.sha256(MODEL).hexdigest()

    async def chunks() -> AsyncIterator[bytes]:
        yield MODEL

    await made.put_blob(f"sha256:{digest}", chunks())
    async for _ in made.create(CreateRequest(model="base", files={"m.gguf": f"sha256:{digest}"})):
        pass
    yield made
    store.close()


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[LlamaCppEngine]:
    made = LlamaCppEngine(await wheel(), runtime_dir=tmp_path / "run")
    yield made
    await made.close()


async def templated(catalog: Catalog, template: str) -> ModelSpec:
    async for _ in catalog.create(CreateRequest(model="x", from_="base", template=template)):
        pass
    return await catalog.resolve("x")


def one_turn(go_template: str, system: str, prompt: str) -> str:
    """What Go makes of a one-turn template: an independent reading, for this grammar only."""
    text = normalised(go_template).partition("{{ .Response }}")[0]
    for name, value in (("System", system), ("Prompt", prompt)):
        text = re.sub(
            r"\{\{ if \." + name + r" \}\}(.*?)\{\{ end \}\}" if name == "System" else r"(?!)",
            (lambda match: match[1]) if value else "",
            text,
            flags=re.DOTALL,
        )
    text = text.replace("{{ .System }}", system).replace("{{ .Prompt }}", prompt)
    return text.replace("{{ if .Prompt }}", "").replace("{{ end }}", "")


def conversation(known: Format, messages: list[Message]) -> str:
    """The format, written down turn by turn."""
    text, held = known.start, ""
    for message in messages:
        if message.role == "system" and known.system_place == "turn":
            text += known.system.before + message.content + known.system.after
        elif message.role == "system":
            held = message.content
        elif message.role == "assistant":
            text += known.assistant.before + message.content + known.assistant.after
        else:
            system = known.system.before + held + known.system.after if held else known.no_system
            inside = known.system_place == "inside"
            text += "" if inside or not held else system
            text += known.user.before + (system if inside else "") + message.content + known.user.after
            held = ""
    return text + known.opening


@pytest.mark.parametrize("known", FORMATS, ids=lambda known: known.name)
async def test_twins_render_their_format(catalog: Catalog, engine: LlamaCppEngine, known: Format) -> None:
    go_template = list(known.go_spellings())[1]
    spec = await templated(catalog, go_template)
    runner: Runner = await engine.load(spec, PLAN)
    for messages in ([FIRST], [SYSTEM, FIRST], [SYSTEM, FIRST, ANSWER, SECOND]):
        assert await runner.apply_template(messages) == conversation(known, messages)
    if not known.no_system:
        for system in ("", "Be kind."):
            said = [Message(role="system", content=system)] * bool(system) + [FIRST]
            rendered = await runner.apply_template(said)
            assert rendered.strip() == one_turn(go_template, system, FIRST.content).strip()


async def test_the_passthrough_adds_nothing(catalog: Catalog, engine: LlamaCppEngine) -> None:
    runner = await engine.load(await templated(catalog, PASSTHROUGH), PLAN)
    assert await runner.apply_template([FIRST, ANSWER]) == FIRST.content + ANSWER.content
    # Ollama drops a system text here; llama.cpp puts it before the first prompt, so it is not lost.
    assert await runner.apply_template([SYSTEM, FIRST]) == f"{SYSTEM.content}\n{FIRST.content}"
    base = await engine.load(await catalog.resolve("base"), PLAN)
    assert await base.apply_template([FIRST]) == FIRST.content, "llama.cpp's own default is ChatML"


async def test_a_template_of_ones_own(catalog: Catalog, engine: LlamaCppEngine) -> None:
    own = "{{ if .System }}S {{ .System }}\n{{ end }}U '{{ .Prompt }}' }} {# \\n\nA {{ .Response }}\n"
    runner = await engine.load(await templated(catalog, own), PLAN)

    def user(said: Message) -> str:
        return f"U '{said.content}' " + "}} {# \\n\nA "

    assert await runner.apply_template([FIRST]) == user(FIRST)
    assert await runner.apply_template([SYSTEM, FIRST, ANSWER, SECOND]) == (
        f"S Be kind.\n{user(FIRST)}Hello!\n{user(SECOND)}"
    )
    mute = await engine.load(await templated(catalog, "Template"), PLAN)
    assert "Template" in await mute.apply_template([FIRST])


async def test_qwen_with_tools(catalog: Catalog, engine: LlamaCppEngine) -> None:
    spec = ModelSpec(
        **{
            name: getattr(await catalog.resolve("base"), name)
            for name in ModelSpec.__struct_fields__
            if name != "chat_template"
        },
        chat_template=QWEN25,
    )
    runner = await engine.load(spec, PLAN)
    tool = Tool(name="weather", description="Says it.", parameters={"type": "object", "properties": {}})
    called = Message(
        role="assistant",
        tool_calls=(ToolCall(id="1", name="weather", arguments='{"city": "Rome"}'),),
    )
    answered = Message(role="tool", content="sunny", tool_name="weather", tool_call_id="1")
    text = await runner.apply_template([SYSTEM, FIRST, called, answered], [tool])
    assert text.startswith("<|im_start|>system\nBe kind.\n\n# Tools\n\nYou may call")
    assert '"name": "weather"' in text
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>\n' in text
    assert text.endswith(
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    plain = await runner.apply_template([FIRST])
    assert plain == f"<|im_start|>user\n{FIRST.content}<|im_end|>\n<|im_start|>assistant\n"
