"""Pydantic AI: agents with tools and typed results, by Ollama's, OpenAI's and Anthropic's providers."""

from typing import Literal

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.ollama import OllamaProvider
from pydantic_ai.providers.openai import OpenAIProvider
from trying import (
    ABSENT,
    ANSWER,
    CALL,
    CONCLUSION,
    ECHO,
    KEY,
    KEYED_URL,
    PICTURE,
    SAYS,
    TALKS,
    THINKS,
    URL,
    WEATHER,
    WRONG_KEY,
    feature,
    refused,
    run,
    same,
)


class City(BaseModel):
    city: Literal["Paris", "Rome"]
    is_capital: bool


def models_of(name: str, url: str = URL, key: str = "ollama"):
    return [
        OpenAIChatModel(name, provider=OllamaProvider(base_url=f"{url}/v1", api_key=key)),
        OpenAIChatModel(name, provider=OpenAIProvider(base_url=f"{url}/v1", api_key=key)),
        OpenAIResponsesModel(name, provider=OpenAIProvider(base_url=f"{url}/v1", api_key=key)),
        AnthropicModel(name, provider=AnthropicProvider(base_url=url, api_key=key)),
    ]


@feature("chat")
async def chat() -> None:
    for one in models_of(SAYS):
        same((await Agent(one).run("Say it.")).output, ANSWER)


@feature("stream")
async def stream() -> None:
    for one in models_of(SAYS):
        async with Agent(one).run_stream("Say it.") as said:
            same("".join([part async for part in said.stream_text(delta=True)]), ANSWER)


@feature("tools")
async def tools() -> None:
    for one in models_of(ECHO):
        agent = Agent(one, instructions="Answer.")

        @agent.tool_plain
        def get_weather(city: str) -> str:
            """The weather of a city."""
            return WEATHER if city else ""

        same((await agent.run(CALL)).output, WEATHER)


@feature("structured")
async def structured() -> None:
    for one in models_of(ECHO):
        assert isinstance((await Agent(one, output_type=City).run("The capital of France")).output, City)
    for one in models_of(TALKS)[:3]:
        made = await Agent(one, output_type=NativeOutput(City)).run("The capital of France")
        assert isinstance(made.output, City)


@feature("thinking")
async def thinking() -> None:
    for one in models_of(THINKS):
        said = await Agent(one).run("Say it.")
        same(said.output.strip(), CONCLUSION)


@feature("usage")
async def usage() -> None:
    for one in models_of(SAYS):
        told = (await Agent(one).run("Say it.")).usage
        told = told() if callable(told) else told
        assert told.input_tokens > 3
        assert told.output_tokens > 5


@feature("errors")
async def errors() -> None:
    for one in models_of(ABSENT):
        with refused("not found", "404"):
            await Agent(one).run("x")
    for one in models_of(SAYS, KEYED_URL, WRONG_KEY):
        with refused("401"):
            await Agent(one).run("x")


@feature("key")
async def key() -> None:
    for one in models_of(SAYS, KEYED_URL, KEY):
        same((await Agent(one).run("Say it.")).output, ANSWER)


@feature("vision")
async def vision() -> None:
    import base64

    from pydantic_ai import BinaryContent

    for one in models_of(SAYS):
        with refused("image", "vision"):
            await Agent(one).run(["What?", BinaryContent(base64.b64decode(PICTURE), media_type="image/png")])


run("pydantic-ai-slim")
