"""What a JSON schema promises, kept by llama.cpp in both its forms, whatever the model wants."""

from __future__ import annotations

import enum
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest
from pydantic import BaseModel, ConfigDict, Field
from tests.integration.llamacpp_programs import PROGRAMS, program_named
from tests.models import SMOLLM2, Models, model_spec

from ollama_distributed.adapters.engines.llamacpp import protocol
from ollama_distributed.adapters.engines.llamacpp.engine import LlamaCppEngine
from ollama_distributed.adapters.engines.llamacpp.runner_port import LlamaCppRunner
from ollama_distributed.adapters.engines.llamacpp.schema import check_schema
from ollama_distributed.base.errors import Invalid
from ollama_distributed.base.inference import Format, JsonObject, JsonSchema, Sampling
from ollama_distributed.serving.ports import CompletionRequest, LoadPlan
from ollama_distributed.testing.recording import Recording

pytestmark = [pytest.mark.integration, pytest.mark.anyio]

PLAN = LoadPlan(slots=2, context_tokens=4096, threads=1)


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Point(BaseModel):
    x: float
    y: float


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)
    email: str | None = None
    colour: Colour = Colour.RED


class Node(BaseModel):
    value: int
    children: list[Node] = Field(max_length=1)


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(gt=0, lt=10)


class Dog(BaseModel):
    kind: Literal["dog"]
    good: bool


class Owner(BaseModel):
    pet: Cat | Dog = Field(discriminator="kind")
    places: list[Point] = Field(min_length=1, max_length=2)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")
    steps: list[Literal["a", "b"]] = Field(max_length=3)
    final: bool


def of(schema: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": schema}, "required": ["a"], "additionalProperties": False}


ZOD_DATE = r"^\d{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|02-(?:0[1-9]|1\d|2[0-8]))$"
ZOD = "https://json-schema.org/draft/2020-12/schema"
PAIR = {"x": {"type": "integer"}, "y": {"type": "integer"}}
SCHEMAS: dict[str, dict[str, Any]] = {
    "pydantic nested": Owner.model_json_schema(),
    "pydantic optional": Person.model_json_schema(),
    "pydantic recursive": Node.model_json_schema(),
    "pydantic forbid": Strict.model_json_schema(),
    "pydantic numbers": Point.model_json_schema(),
    "openai strict": {
        **of({"type": ["string", "null"], "enum": ["x", None]}),
        "$schema": "http://json-schema.org/draft-07/schema#",
    },
    "zod object": {**of({"type": "integer", "minimum": -(2**53) + 1, "maximum": 2**53 - 1}), "$schema": ZOD},
    "zod date": of({"type": "string", "format": "date", "pattern": ZOD_DATE}),
    "zod email": of({"type": "string", "format": "email", "maxLength": 30}),
    "zod union": of({"anyOf": [{"type": "string", "maxLength": 5}, {"type": "number"}]}),
    "zod tuple": of({"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}], "minItems": 2}),
    "number": of({"type": "number"}),
    "integer": of({"type": "integer"}),
    "root number": {"type": "number"},
    "root enum": {"enum": ["yes", "no"]},
    "positive": of({"type": "number", "exclusiveMinimum": 0}),
    "fraction": of({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}),
    "cents": of({"type": "number", "minimum": 0, "multipleOf": 0.01}),
    "unsigned": of({"type": "integer", "minimum": 0, "maximum": 2**64 - 1}),
    "far": of({"type": "integer", "minimum": 10**15, "maximum": 10**18}),
    "draft 4": {
        **of({"type": "number", "minimum": 0, "exclusiveMinimum": True, "maximum": 9}),
        "$schema": "http://json-schema.org/draft-04/schema#",
    },
    "const": of({"const": 5}),
    "mixed enum": of({"enum": [1, "a", None, 1.5, True]}),
    "date-time": of({"type": "string", "format": "date-time"}),
    "date": of({"type": "string", "format": "date"}),
    "uuid": of({"type": "string", "format": "uuid"}),
    "pattern": of({"type": "string", "pattern": r"^\d{3}-\d{4}$"}),
    "several patterns": of({"type": "string", "pattern": "^(a|b)$|^c$"}),
    "lengths": of({"type": "string", "minLength": 2, "maxLength": 4}),
    "array": of({"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3}),
    "one of": of({"oneOf": [{"const": "x"}, {"type": "boolean"}]}),
    "type list": of({"type": ["integer", "null"]}),
    "map": {"type": "object", "additionalProperties": {"type": "integer"}},
    "no type": {"properties": PAIR, "required": ["x"]},
    "definitions": {**of({"$ref": "#/definitions/n"}), "definitions": {"n": {"type": "integer"}}},
    "unknown keywords": {**of({"type": "boolean", "readOnly": True, "nullable": True}), "x-order": 1},
    "all of": {"allOf": [{"$ref": "#/$defs/p"}], "$defs": {"p": {"type": "object", "properties": PAIR}}},
    "optional only": {"type": "object", "properties": PAIR},
    "anything": of({}),
}
NOT_BY_ITS_OWN_CONVERTER = {
    "zod date",
    "zod email",
    "positive",
    "fraction",
    "cents",
    "far",
    "draft 4",
    "pydantic optional",
    "pattern",
    "several patterns",
}
"""What a binary without llguidance does not keep: bounds of fractions, some patterns."""
TALK = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
Loader = Callable[[Path], Awaitable[LlamaCppRunner]]


@pytest.fixture(params=PROGRAMS)
async def load(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Loader]:
    engine = LlamaCppEngine(await program_named(request.param), runtime_dir=tmp_path / "run")
    yield lambda path: engine.load(model_spec(path), PLAN)
    await engine.close()


async def ask(runner: LlamaCppRunner, form: Format, prompt: str = "go\n", **sampling: Any) -> tuple[str, str]:
    recording = Recording()
    settings = Sampling(**{"temperature": 0.0, "num_predict": 400, **sampling})
    runner.generate(CompletionRequest(prompt=prompt, format=form, sampling=settings), recording)
    return (await recording.done()).reason, recording.text


async def test_what_ended_by_itself_is_what_the_schema_says(load: Loader, models: Models) -> None:
    runner = await load(models.random())
    lax = NOT_BY_ITS_OWN_CONVERTER if runner.info.variant == "binary" else set()
    ended = dict.fromkeys(SCHEMAS, 0)
    for name, schema in SCHEMAS.items():
        for seed in range(4):
            reason, text = await ask(runner, JsonSchema(schema), temperature=1.0, seed=seed)
            if reason == "stop":
                ended[name] += 1
                jsonschema.validate(json.loads(text), {} if name in lax else schema)
            else:  # free text would not begin so
                assert text.lstrip()[:1] in '{["-0123456789', (name, text)
    free = {"all of", "anything", "map", "pydantic optional"} | lax  # of strings without an end
    assert [name for name, count in ended.items() if not count and name not in free] == []


async def test_a_large_schema_is_checked_beside_the_loop(
    load: Loader, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def check(schema: Mapping[str, Any]) -> None:
        seen.append(threading.current_thread() is threading.main_thread())
        check_schema(schema)

    monkeypatch.setattr(protocol, "check_schema", check)
    runner = await load(models.random())
    large = {"type": "object", "properties": {f"p{i}": {"const": i} for i in range(200)}}
    for schema in (of({"const": 5}), large):
        await ask(runner, JsonSchema(schema), num_predict=5)
    assert seen == [True, False]
    failed = Recording()
    runner.generate(CompletionRequest(prompt="go", format=JsonSchema({**large, "$ref": "#/nowhere"})), failed)
    assert isinstance((await failed.failed()).error, Invalid)


@pytest.mark.parametrize(
    "schema",
    [{"type": "number"}, {"type": "number", "minimum": 0}, {"type": "integer", "minimum": 1}, {}],
    ids=str,
)
async def test_a_number_ends(load: Loader, models: Models, schema: dict[str, Any]) -> None:
    """Against a model that wants nothing but digits."""
    runner = await load(models.scripted("1", endless=True))
    reason, text = await ask(runner, JsonSchema(of(schema) if schema else {"items": {}, "type": "array"}))
    if schema:
        assert reason == "stop"
        assert len(text) < 60


@pytest.mark.parametrize("form", [JsonObject(), JsonSchema(of({"const": 5}))], ids=["object", "const"])
async def test_white_space_ends(load: Loader, models: Models, form: Format) -> None:
    runner = await load(models.scripted("\n", endless=True))
    reason, text = await ask(runner, form, num_predict=100)
    assert "\n" * 30 not in text
    assert isinstance(form, JsonObject) or reason == "stop"


@pytest.mark.skipif(not SMOLLM2.exists(), reason="make models has not run")
async def test_a_real_model_finishes(load: Loader) -> None:
    runner = await load(SMOLLM2)
    country = {
        "name": {"type": "string"},
        "population": {"type": "number"},
        "languages": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
    }
    asked: dict[str, dict[str, Any]] = {
        "Tell me about Canada.": {"type": "object", "properties": country, "required": [*country]},
        "How many people live in Paris?": of({"type": "number"}),
        "Is the sky blue?": of({"type": "boolean"}),
        "Say something about Paris in one sentence.": of({"const": 5}),
        "What share of the earth is water?": of(
            {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
        ),
        "Tell me about Ada Lovelace, who is 36.": Person.model_json_schema(),
    }
    for question, schema in asked.items():
        reason, text = await ask(runner, JsonSchema(schema), TALK.format(question))
        assert reason == "stop", text
        if runner.info.variant == "wheel":  # the binary's own converter does not bound fractions
            jsonschema.validate(json.loads(text), schema)
