"""Haystack's Ollama integration, and its OpenAI generator."""

from haystack import Document
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import create_tool_from_function
from haystack.utils import Secret
from haystack_integrations.components.embedders.ollama import OllamaDocumentEmbedder, OllamaTextEmbedder
from haystack_integrations.components.generators.ollama import OllamaChatGenerator
from trying import (
    ABSENT,
    ANSWER,
    CALL,
    CITY_SCHEMA,
    CONCLUSION,
    ECHO,
    EMBEDS,
    KEY,
    KEYED_URL,
    SAYS,
    TALKS,
    THINKS,
    THOUGHT,
    URL,
    WEATHER,
    feature,
    refused,
    run,
    same,
)


def get_weather(city: str) -> str:
    """The weather of a city."""
    return WEATHER if city else ""


def generators(model: str, url: str = URL, key: str = "ollama", **more):
    made = [
        OpenAIChatGenerator(
            model=model, api_base_url=f"{url}/v1", api_key=Secret.from_token(key), max_retries=0, **more
        )
    ]
    if key == "ollama":
        made.append(OllamaChatGenerator(model=model, url=url, **more))
    return made


@feature("chat")
def chat() -> None:
    for one in generators(SAYS):
        same(one.run([ChatMessage.from_user("Say it.")])["replies"][0].text, ANSWER)


@feature("stream")
def stream() -> None:
    for one in generators(SAYS):
        parts: list[str] = []
        one.run(
            [ChatMessage.from_user("Say it.")],
            streaming_callback=lambda part, parts=parts: parts.append(part.content),
        )
        same("".join(parts), ANSWER)


@feature("tools")
def tools() -> None:
    made = create_tool_from_function(get_weather)
    for one in generators(ECHO, tools=[made]):
        talk = [ChatMessage.from_user(CALL)]
        (called,) = one.run(talk)["replies"]
        (call,) = called.tool_calls
        same(call.arguments, {"city": "Paris"})
        talk += [called, ChatMessage.from_tool(made.invoke(**call.arguments), origin=call)]
        same(one.run(talk)["replies"][0].text, WEATHER)


@feature("structured")
def structured() -> None:
    import json

    said = OllamaChatGenerator(model=TALKS, url=URL, response_format=CITY_SCHEMA).run(
        [ChatMessage.from_user("Capital?")]
    )
    same(sorted(json.loads(said["replies"][0].text)), ["city", "is_capital"])


@feature("thinking")
def thinking() -> None:
    (said,) = OllamaChatGenerator(model=THINKS, url=URL, think=True).run([ChatMessage.from_user("Say it.")])[
        "replies"
    ]
    same(said.text.strip(), CONCLUSION)
    same(said.reasoning.reasoning_text.strip(), THOUGHT)


@feature("embed")
def embed() -> None:
    same(len(OllamaTextEmbedder(model=EMBEDS, url=URL).run("a cat")["embedding"]), 384)
    found = OllamaDocumentEmbedder(model=EMBEDS, url=URL).run([Document(content="a"), Document(content="b")])[
        "documents"
    ]
    same([len(one.embedding) for one in found], [384, 384])


@feature("usage")
def usage() -> None:
    for one in generators(SAYS):
        told = one.run([ChatMessage.from_user("Say it.")])["replies"][0].meta["usage"]
        assert told["prompt_tokens"] > 3


@feature("errors")
def errors() -> None:
    for one in generators(ABSENT):
        with refused("not found"):
            one.run([ChatMessage.from_user("Say it.")])


@feature("key")
def key() -> None:
    for one in generators(SAYS, KEYED_URL, KEY):
        same(one.run([ChatMessage.from_user("Say it.")])["replies"][0].text, ANSWER)


run("ollama-haystack", "haystack-ai")
