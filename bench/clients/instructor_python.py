"""Instructor: structured answers by tools, JSON and schemas."""

from typing import Literal

import instructor
import openai
from pydantic import BaseModel
from trying import ABSENT, ECHO, KEY, KEYED_URL, TALKS, URL, feature, refused, run


class City(BaseModel):
    city: Literal["Paris", "Rome"]
    is_capital: bool


QUESTION = [{"role": "user", "content": "The capital of France"}]


def made(mode, url: str = URL, key: str = "ollama"):
    return instructor.from_openai(openai.OpenAI(base_url=f"{url}/v1", api_key=key), mode=mode)


@feature("structured")
def structured() -> None:
    assert isinstance(
        made(instructor.Mode.JSON_SCHEMA).create(
            model=TALKS, messages=QUESTION, response_model=City, max_retries=1
        ),
        City,
    )
    # Echo fills the smallest object that fits a schema.
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        found = made(mode).create(model=ECHO, messages=QUESTION, response_model=City, max_retries=1)
        assert isinstance(found, City), mode


@feature("stream")
def stream() -> None:
    parts = list(
        made(instructor.Mode.JSON_SCHEMA).create_partial(model=TALKS, messages=QUESTION, response_model=City)
    )
    assert parts[-1].city is not None


@feature("async")
async def async_structured() -> None:
    mine = instructor.from_openai(
        openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="ollama"), mode=instructor.Mode.JSON_SCHEMA
    )
    assert isinstance(await mine.create(model=TALKS, messages=QUESTION, response_model=City), City)


@feature("provider")
def provider() -> None:
    mine = instructor.from_provider(f"ollama/{ECHO}", base_url=f"{URL}/v1", mode=instructor.Mode.JSON_SCHEMA)
    assert isinstance(mine.create(messages=QUESTION, response_model=City, max_retries=1), City)


@feature("usage")
def usage() -> None:
    _, raw = made(instructor.Mode.JSON_SCHEMA).create_with_completion(
        model=TALKS, messages=QUESTION, response_model=City
    )
    assert raw.usage.completion_tokens > 3


@feature("errors")
def errors() -> None:
    with refused("not found"):
        made(instructor.Mode.JSON_SCHEMA).create(
            model=ABSENT, messages=QUESTION, response_model=City, max_retries=1
        )


@feature("key")
def key() -> None:
    mine = made(instructor.Mode.JSON_SCHEMA, KEYED_URL, KEY)
    assert isinstance(mine.create(model=TALKS, messages=QUESTION, response_model=City), City)


run("instructor")
