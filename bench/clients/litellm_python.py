"""LiteLLM: its providers ollama, ollama_chat, openai and anthropic."""

import json
from typing import Literal

import litellm
from trying import (
    ABSENT,
    ANSWER,
    ASK,
    CALL,
    CALLS,
    CONCLUSION,
    ECHO,
    EMBEDS,
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
    feature,
    refused,
    run,
    same,
)

TOOLS = [
    {
        "type": "function",
        "function": {"name": "get_weather", "description": "Weather", "parameters": PARAMETERS},
    }
]
WAYS = {
    "ollama_chat": {"api_base": URL},
    "ollama": {"api_base": URL},
    "openai": {"api_base": f"{URL}/v1", "api_key": "ollama"},
    "anthropic": {"api_base": URL, "api_key": "ollama"},
}
CHAT_WAYS = [way for way in WAYS if way != "ollama"]


@feature("chat")
def chat() -> None:
    for way, where in WAYS.items():
        same(
            litellm.completion(model=f"{way}/{SAYS}", messages=ASK, **where).choices[0].message.content,
            ANSWER,
        )


@feature("stream")
def stream() -> None:
    for way, where in WAYS.items():
        chunks = litellm.completion(model=f"{way}/{SAYS}", messages=ASK, stream=True, **where)
        same("".join(chunk.choices[0].delta.content or "" for chunk in chunks), ANSWER)


@feature("async")
async def async_stream() -> None:
    for way, where in WAYS.items():
        chunks = await litellm.acompletion(model=f"{way}/{SAYS}", messages=ASK, stream=True, **where)
        same("".join([chunk.choices[0].delta.content or "" async for chunk in chunks]), ANSWER)


@feature("responses")
def responses() -> None:
    said = litellm.responses(model=f"openai/{SAYS}", input="Say it.", **WAYS["openai"])
    same(said.output[0].content[0].text, ANSWER)


@feature("tools")
def tools() -> None:
    for way in CHAT_WAYS:
        asked = [{"role": "user", "content": CALL}]
        found = (
            litellm.completion(model=f"{way}/{ECHO}", messages=asked, tools=TOOLS, **WAYS[way])
            .choices[0]
            .message
        )
        same(json.loads(found.tool_calls[0].function.arguments), {"city": "Paris"})
        result = {"role": "tool", "tool_call_id": found.tool_calls[0].id, "content": WEATHER}
        again = litellm.completion(
            model=f"{way}/{ECHO}", messages=[*asked, found.model_dump(), result], tools=TOOLS, **WAYS[way]
        )
        same(again.choices[0].message.content, WEATHER)
        chunks = list(
            litellm.completion(model=f"{way}/{ECHO}", messages=asked, tools=TOOLS, stream=True, **WAYS[way])
        )
        built = litellm.stream_chunk_builder(chunks).choices[0].message
        same(json.loads(built.tool_calls[0].function.arguments), {"city": "Paris"})


@feature("structured")
def structured() -> None:
    from pydantic import BaseModel

    class City(BaseModel):
        city: Literal["Paris", "Rome"]
        is_capital: bool

    question = [{"role": "user", "content": "The capital of France"}]
    for way in ("ollama_chat", "openai"):
        said = litellm.completion(
            model=f"{way}/{TALKS}", messages=question, response_format=City, **WAYS[way]
        )
        City.model_validate_json(said.choices[0].message.content)


@feature("thinking")
def thinking() -> None:
    for way in CHAT_WAYS:
        message = (
            litellm.completion(
                model=f"{way}/{THINKS}",
                messages=ASK,
                reasoning_effort="low",
                allowed_openai_params=["reasoning_effort"],
                max_tokens=2000,
                **WAYS[way],
            )
            .choices[0]
            .message
        )
        same(message.content.strip(), CONCLUSION)
        same(message.reasoning_content.strip(), THOUGHT)


@feature("embed")
def embed() -> None:
    for way in ("ollama", "openai"):
        rows = litellm.embedding(model=f"{way}/{EMBEDS}", input=["a cat", "a dog"], **WAYS[way]).data
        same([len(row["embedding"]) for row in rows], [384, 384])


@feature("models")
def models() -> None:
    info = litellm.get_model_info(f"ollama/{CALLS}", api_base=URL)
    assert info["supports_function_calling"], info


@feature("usage")
def usage() -> None:
    for way in WAYS:
        chunks = list(
            litellm.completion(
                model=f"{way}/{SAYS}",
                messages=ASK,
                stream=True,
                stream_options={"include_usage": True},
                **WAYS[way],
            )
        )
        told = chunks[-1].usage
        assert told.prompt_tokens > 3, way
        assert told.completion_tokens > 5, way


@feature("errors")
def errors() -> None:
    for way in ("openai", "anthropic"):
        with refused("NotFoundError"):
            litellm.completion(model=f"{way}/{ABSENT}", messages=ASK, **WAYS[way])
        wrong = WAYS[way] | {"api_key": WRONG_KEY, "api_base": WAYS[way]["api_base"].replace(URL, KEYED_URL)}
        with refused("AuthenticationError"):
            litellm.completion(model=f"{way}/{SAYS}", messages=ASK, **wrong)
    with refused("not found"):
        litellm.completion(model=f"ollama_chat/{ABSENT}", messages=ASK, **WAYS["ollama_chat"])


@feature("key")
def key() -> None:
    for way, where in WAYS.items():
        keyed = {"api_key": KEY, "api_base": where["api_base"].replace(URL, KEYED_URL)}
        same(
            litellm.completion(model=f"{way}/{SAYS}", messages=ASK, **keyed).choices[0].message.content,
            ANSWER,
        )


@feature("vision")
def vision() -> None:
    content = [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PICTURE}"}},
    ]
    for way in CHAT_WAYS:
        with refused("image", "vision"):
            litellm.completion(
                model=f"{way}/{SAYS}", messages=[{"role": "user", "content": content}], **WAYS[way]
            )


@feature("slow")
def slow() -> None:
    chunks = litellm.completion(
        model=f"ollama_chat/{ECHO}", messages=ASK, stream=True, keep_alive=0, api_base=SLOW_URL
    )
    same("".join(chunk.choices[0].delta.content or "" for chunk in chunks), "Say it.")


run("litellm")
