"""OpenAI's own client, the newest and an old 1.x."""

import json
from typing import Literal

import openai
from pydantic import BaseModel
from trying import (
    ABSENT,
    ANSWER,
    ASK,
    CALL,
    CALLS,
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
)

client = openai.OpenAI(base_url=f"{URL}/v1", api_key="ollama", max_retries=0)
TOOLS = [
    {
        "type": "function",
        "function": {"name": "get_weather", "description": "Weather", "parameters": PARAMETERS},
    }
]


class City(BaseModel):
    city: Literal["Paris", "Rome"]
    is_capital: bool


@feature("chat")
def chat() -> None:
    same(client.chat.completions.create(model=SAYS, messages=ASK).choices[0].message.content, ANSWER)
    same(client.completions.create(model=SAYS, prompt="Say it.", max_tokens=200).choices[0].text, ANSWER)


@feature("stream")
def stream() -> None:
    chunks = list(client.chat.completions.create(model=SAYS, messages=ASK, stream=True))
    same("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices), ANSWER)


@feature("async")
async def async_stream() -> None:
    async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="ollama") as mine:
        text = ""
        async for chunk in await mine.chat.completions.create(model=SAYS, messages=ASK, stream=True):
            text += chunk.choices[0].delta.content or "" if chunk.choices else ""
        same(text, ANSWER)


@feature("responses")
def responses() -> None:
    if not hasattr(client, "responses"):
        raise NotOfferedError("came later")
    same(client.responses.create(model=SAYS, input="Say it.").output_text, ANSWER)
    with client.responses.stream(model=THINKS, input="Say it.", reasoning={"effort": "low"}) as events:
        kinds = [event.type for event in events]
        same(events.get_final_response().output_text.strip(), CONCLUSION)
    same((kinds[0], kinds[-1]), ("response.created", "response.completed"))
    tool = {
        "type": "function",
        "name": "get_weather",
        "description": "",
        "parameters": PARAMETERS,
        "strict": False,
    }
    asked = [{"role": "user", "content": CALL}]
    first = client.responses.create(model=ECHO, input=asked, tools=[tool], store=False)
    (call,) = [item for item in first.output if item.type == "function_call"]
    again = [
        *asked,
        *first.output,
        {"type": "function_call_output", "call_id": call.call_id, "output": WEATHER},
    ]
    same(client.responses.create(model=ECHO, input=again, tools=[tool]).output_text, WEATHER)
    parsed = client.responses.parse(model=TALKS, input="The capital of France", text_format=City)
    assert isinstance(parsed.output_parsed, City)


@feature("tools")
def tools() -> None:
    asked = [{"role": "user", "content": CALL}]
    first = client.chat.completions.create(model=CALLS, messages=ASK, tools=TOOLS).choices[0]
    same(first.finish_reason, "tool_calls")
    same(json.loads(first.message.tool_calls[0].function.arguments), {"city": "Paris"})
    found = client.chat.completions.create(model=ECHO, messages=asked, tools=TOOLS).choices[0].message
    result = {"role": "tool", "tool_call_id": found.tool_calls[0].id, "content": WEATHER}
    again = client.chat.completions.create(model=ECHO, messages=[*asked, found, result], tools=TOOLS)
    same(again.choices[0].message.content, WEATHER)
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        forced = client.chat.completions.create(model=CALLS, messages=ASK, tools=TOOLS, tool_choice=choice)
        same(forced.choices[0].message.tool_calls[0].function.name, "get_weather")


@feature("structured")
def structured() -> None:
    parse = getattr(client.chat.completions, "parse", None) or client.beta.chat.completions.parse
    said = parse(
        model=TALKS, messages=[{"role": "user", "content": "The capital of France"}], response_format=City
    )
    assert isinstance(said.choices[0].message.parsed, City)


@feature("thinking")
def thinking() -> None:
    message = client.chat.completions.create(
        model=THINKS, messages=ASK, extra_body={"reasoning_effort": "low"}
    )
    same(message.choices[0].message.content.strip(), CONCLUSION)
    same(message.choices[0].message.reasoning_content.strip(), THOUGHT)


@feature("embed")
def embed() -> None:
    same(
        [len(one.embedding) for one in client.embeddings.create(model=EMBEDS, input=["a", "b"]).data],
        [384, 384],
    )
    ids = client.embeddings.create(model=EMBEDS, input=[[101, 1037, 102]], encoding_format="float")
    same(len(ids.data[0].embedding), 384)


@feature("models")
def models() -> None:
    assert f"{SAYS}:latest" in [one.id for one in client.models.list()]
    same(client.models.retrieve(SAYS).object, "model")


@feature("usage")
def usage() -> None:
    chunks = list(
        client.chat.completions.create(
            model=SAYS, messages=ASK, stream=True, stream_options={"include_usage": True}
        )
    )
    told = chunks[-1].usage
    assert told.prompt_tokens > 3
    assert told.completion_tokens > 5
    same(told.total_tokens, told.prompt_tokens + told.completion_tokens)


@feature("errors")
def errors() -> None:
    for wrong, call in (
        (openai.NotFoundError, lambda: client.chat.completions.create(model=ABSENT, messages=ASK)),
        (openai.NotFoundError, lambda: client.models.retrieve(ABSENT)),
        (openai.BadRequestError, lambda: client.chat.completions.create(model=SAYS, messages=[])),
        (
            openai.AuthenticationError,
            lambda: openai.OpenAI(base_url=f"{KEYED_URL}/v1", api_key=WRONG_KEY).models.list(),
        ),
        (
            openai.AuthenticationError,
            lambda: openai.OpenAI(base_url=f"{KEYED_URL}/v1", api_key="ollama").chat.completions.create(
                model=SAYS, messages=ASK
            ),
        ),
    ):
        try:
            call()
        except wrong:
            continue
        raise AssertionError(f"no {wrong.__name__}")


@feature("key")
def key() -> None:
    keyed = openai.OpenAI(base_url=f"{KEYED_URL}/v1", api_key=KEY)
    same(keyed.chat.completions.create(model=SAYS, messages=ASK).choices[0].message.content, ANSWER)


@feature("cancel")
def cancel() -> None:
    stream = client.chat.completions.create(
        model=ENDLESS, messages=[{"role": "user", "content": "words " * 300}], stream=True
    )
    for number, _ in enumerate(stream):
        if number == 3:
            break
    stream.close()
    freed(ENDLESS)


@feature("vision")
def vision() -> None:
    content = [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PICTURE}"}},
    ]
    with refused("BadRequestError"):
        client.chat.completions.create(model=SAYS, messages=[{"role": "user", "content": content}])


@feature("slow")
def slow() -> None:
    slowly = openai.OpenAI(base_url=f"{SLOW_URL}/v1", api_key="ollama")
    chunks = slowly.chat.completions.create(
        model=ECHO, messages=ASK, stream=True, extra_body={"keep_alive": 0}
    )
    same("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices), "Say it.")


run("openai")
