"""OpenAI's Agents SDK, over Responses and over chat completions."""

from typing import Literal

import agents
import openai
from pydantic import BaseModel
from trying import (
    ABSENT,
    ANSWER,
    CALL,
    CONCLUSION,
    ECHO,
    KEY,
    KEYED_URL,
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

agents.set_tracing_disabled(True)


class City(BaseModel):
    city: Literal["Paris", "Rome"]
    is_capital: bool


@agents.function_tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return WEATHER if city else ""


def models_of(name: str, url: str = URL, key: str = "ollama"):
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    return [
        agents.OpenAIResponsesModel(model=name, openai_client=client),
        agents.OpenAIChatCompletionsModel(model=name, openai_client=client),
    ]


def agent(model, **more):
    return agents.Agent(name="one", instructions="Answer.", model=model, **more)


@feature("chat")
async def chat() -> None:
    for one in models_of(SAYS):
        same((await agents.Runner.run(agent(one), "Say it.")).final_output, ANSWER)


@feature("stream")
async def stream() -> None:
    for one in models_of(SAYS):
        said = agents.Runner.run_streamed(agent(one), "Say it.")
        text = ""
        async for event in said.stream_events():
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                text += event.data.delta
        same(text, ANSWER)
        same(said.final_output, ANSWER)


@feature("tools")
async def tools() -> None:
    for one in models_of(ECHO):
        worker = agent(one, tools=[get_weather])
        same((await agents.Runner.run(worker, CALL)).final_output, WEATHER)
        said = agents.Runner.run_streamed(worker, CALL)
        async for _ in said.stream_events():
            pass
        same(said.final_output, WEATHER)


@feature("agent")
async def handoff() -> None:
    for one in models_of(ECHO):
        other = agents.Agent(
            name="Other", handoff_description="knows more", instructions="Answer.", model=one
        )
        first = agent(one, handoffs=[other])
        said = await agents.Runner.run(first, "call transfer_to_other {}")
        same(said.last_agent.name, "Other")


@feature("structured")
async def structured() -> None:
    for one in models_of(TALKS):
        assert isinstance(
            (await agents.Runner.run(agent(one, output_type=City), "Capital of France")).final_output, City
        )


@feature("thinking")
async def thinking() -> None:
    for one in models_of(THINKS):
        settings = agents.ModelSettings(reasoning=openai.types.Reasoning(effort="low"))
        said = await agents.Runner.run(agent(one, model_settings=settings), "Say it.")
        same(said.final_output.strip(), CONCLUSION)


@feature("usage")
async def usage() -> None:
    for one in models_of(SAYS):
        said = await agents.Runner.run(agent(one), "Say it.")
        told = said.context_wrapper.usage
        assert told.input_tokens > 3
        assert told.output_tokens > 5


@feature("errors")
async def errors() -> None:
    for one in models_of(ABSENT):
        with refused("NotFoundError"):
            await agents.Runner.run(agent(one), "x")
    for one in models_of(SAYS, KEYED_URL, WRONG_KEY):
        with refused("AuthenticationError"):
            await agents.Runner.run(agent(one), "x")


@feature("key")
async def key() -> None:
    for one in models_of(SAYS, KEYED_URL, KEY):
        same((await agents.Runner.run(agent(one), "Say it.")).final_output, ANSWER)


run("openai-agents")
