"""Ollama's own client, the newest and old ones."""

import asyncio
import os

import ollama
from trying import (
    ABSENT,
    ANSWER,
    ASK,
    CALL,
    CALLS,
    CITY_SCHEMA,
    CONCLUSION,
    ECHO,
    EMBEDS,
    ENDLESS,
    KEY,
    KEYED_URL,
    PARAMETERS,
    PICTURE,
    SAYS,
    SLOW_URL,
    TALKS,
    THINKS,
    THOUGHT,
    URL,
    WEATHER,
    WRONG_KEY,
    NotOfferedError,
    feature,
    freed,
    refused,
    run,
    same,
    version,
)

client = ollama.Client(host=URL)
TOOLS = [
    {
        "type": "function",
        "function": {"name": "get_weather", "description": "Weather", "parameters": PARAMETERS},
    }
]


@feature("chat")
def chat() -> None:
    same(client.chat(SAYS, messages=ASK)["message"]["content"], ANSWER)
    same(client.generate(SAYS, prompt="Say it.")["response"], ANSWER)


@feature("stream")
def stream() -> None:
    parts = list(client.chat(SAYS, messages=ASK, stream=True))
    same("".join(part["message"]["content"] for part in parts), ANSWER)
    assert len(parts) > 5
    parts = list(client.generate(SAYS, prompt="Say it.", stream=True))
    same("".join(part["response"] for part in parts), ANSWER)


@feature("async")
async def async_stream() -> None:
    mine = ollama.AsyncClient(host=URL)
    parts = [part async for part in await mine.chat(SAYS, messages=ASK, stream=True)]
    same("".join(part["message"]["content"] for part in parts), ANSWER)


@feature("tools")
def tools() -> None:
    def get_weather(city: str) -> str:
        """The weather.

        Args:
          city (str): where
        """
        return city

    for offered in (TOOLS, [get_weather]):
        if offered is not TOOLS and version("ollama") < "0.4":
            continue
        said = client.chat(CALLS, messages=ASK, tools=offered)
        (call,) = said["message"]["tool_calls"]
        same(call["function"]["name"], "get_weather")
        same(dict(call["function"]["arguments"]), {"city": "Paris"})
    asked = [{"role": "user", "content": CALL}]
    first = client.chat(ECHO, messages=asked, tools=TOOLS)["message"]
    assert first["tool_calls"]
    again = client.chat(ECHO, messages=[*asked, first, {"role": "tool", "content": WEATHER}], tools=TOOLS)
    same(again["message"]["content"], WEATHER)


@feature("structured")
def structured() -> None:
    if version("ollama") < "0.4.3":
        raise NotOfferedError("format takes a schema since 0.4.3")
    import json

    said = client.chat(
        TALKS, messages=[{"role": "user", "content": "The capital of France"}], format=CITY_SCHEMA
    )
    same(sorted(json.loads(said["message"]["content"])), ["city", "is_capital"])


@feature("thinking")
def thinking() -> None:
    if version("ollama") < "0.5":
        raise NotOfferedError("think came with 0.5")
    said = client.chat(THINKS, messages=ASK, think=True)
    same(said["message"]["thinking"].strip(), THOUGHT)
    same(said["message"]["content"].strip(), CONCLUSION)


@feature("embed")
def embed() -> None:
    same(len(client.embeddings(EMBEDS, prompt="a cat")["embedding"]), 384)
    if hasattr(client, "embed"):
        same([len(one) for one in client.embed(EMBEDS, input=["a cat", "a dog"])["embeddings"]], [384, 384])


@feature("models")
def models() -> None:
    names = [one.get("model") or one.get("name") for one in client.list()["models"]]
    assert f"{SAYS}:latest" in names, names
    shown = client.show(CALLS)
    assert "{{" in (shown["template"] or "") or shown["modelfile"]
    same(shown["details"]["format"], "gguf")
    if hasattr(client, "ps"):
        client.ps()
    client.copy(SAYS, "copied")
    client.delete("copied")


@feature("usage")
def usage() -> None:
    said = client.chat(SAYS, messages=ASK)
    assert said["prompt_eval_count"] > 3
    assert said["eval_count"] > 5
    assert said["total_duration"] > 0


@feature("errors")
def errors() -> None:
    with refused("not found"):
        client.chat(ABSENT, messages=ASK)
    with refused("not found"):
        list(client.generate(ABSENT, prompt="x", stream=True))
    with refused("401", "key"):
        ollama.Client(host=KEYED_URL, headers={"Authorization": f"Bearer {WRONG_KEY}"}).chat(
            SAYS, messages=ASK
        )


@feature("key")
def key() -> None:
    keyed = ollama.Client(host=KEYED_URL, headers={"Authorization": f"Bearer {KEY}"})
    same(keyed.chat(SAYS, messages=ASK)["message"]["content"], ANSWER)
    keyed.list()
    if version("ollama") > "0.5":
        os.environ["OLLAMA_API_KEY"] = KEY
        same(ollama.Client(host=KEYED_URL).chat(SAYS, messages=ASK)["message"]["content"], ANSWER)
        del os.environ["OLLAMA_API_KEY"]


@feature("cancel")
async def cancel() -> None:
    mine = ollama.AsyncClient(host=URL)
    n = 0
    stream = await mine.chat(ENDLESS, messages=[{"role": "user", "content": "words " * 300}], stream=True)
    async for _ in stream:
        n += 1
        if n == 3:
            break
    await stream.aclose()
    await asyncio.to_thread(freed, ENDLESS)


@feature("vision")
def vision() -> None:
    with refused("image", "vision"):
        client.chat(SAYS, messages=[{"role": "user", "content": "What is it?", "images": [PICTURE]}])


@feature("slow")
def slow() -> None:
    parts = list(ollama.Client(host=SLOW_URL).chat(ECHO, messages=ASK, stream=True, keep_alive=0))
    same("".join(part["message"]["content"] for part in parts), "Say it.")


run("ollama")
