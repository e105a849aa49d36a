"""Anthropic's own client, the newest and an old one."""

from typing import Literal

import anthropic
from trying import (
    ABSENT,
    ANSWER,
    ASK,
    CALL,
    CALLS,
    CONCLUSION,
    ECHO,
    ENDLESS,
    KEY,
    KEYED_URL,
    PARAMETERS,
    PICTURE,
    SAYS,
    SLOW_URL,
    TALKS,
    THINKS,
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

client = anthropic.Anthropic(base_url=URL, api_key="ollama", max_retries=0)
TOOLS = [{"name": "get_weather", "description": "Weather", "input_schema": PARAMETERS}]
SHORT = {"max_tokens": 500}


@feature("chat")
def chat() -> None:
    said = client.messages.create(model=SAYS, messages=ASK, system="Be exact.", **SHORT)
    same((said.content[0].text, said.stop_reason), (ANSWER, "end_turn"))


@feature("stream")
def stream() -> None:
    with client.messages.stream(model=SAYS, messages=ASK, **SHORT) as events:
        same("".join(events.text_stream), ANSWER)
        same(events.get_final_message().stop_reason, "end_turn")
    kinds = [event.type for event in client.messages.create(model=SAYS, messages=ASK, stream=True, **SHORT)]
    same((kinds[0], kinds[-1]), ("message_start", "message_stop"))


@feature("async")
async def async_stream() -> None:
    async with (
        anthropic.AsyncAnthropic(base_url=URL, api_key="ollama") as mine,
        mine.messages.stream(model=SAYS, messages=ASK, **SHORT) as events,
    ):
        same("".join([text async for text in events.text_stream]), ANSWER)


@feature("tools")
def tools() -> None:
    first = client.messages.create(model=CALLS, messages=ASK, tools=TOOLS, **SHORT)
    same((first.stop_reason, first.content[-1].input), ("tool_use", {"city": "Paris"}))
    asked = [{"role": "user", "content": CALL}]
    first = client.messages.create(model=ECHO, messages=asked, tools=TOOLS, **SHORT)
    result = {"type": "tool_result", "tool_use_id": first.content[-1].id, "content": WEATHER}
    again = [*asked, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    same(client.messages.create(model=ECHO, messages=again, tools=TOOLS, **SHORT).content[0].text, WEATHER)
    forced = client.messages.create(
        model=CALLS, messages=ASK, tools=TOOLS, tool_choice={"type": "tool", "name": "get_weather"}, **SHORT
    )
    same(forced.content[-1].name, "get_weather")


@feature("structured")
def structured() -> None:
    if version("anthropic") < "0.70" and not version("anthropic").startswith(("1.", "2.")):
        raise NotOfferedError("output_config came later")
    from pydantic import BaseModel

    class City(BaseModel):
        city: Literal["Paris", "Rome"]
        is_capital: bool

    said = client.messages.parse(
        model=TALKS,
        messages=[{"role": "user", "content": "The capital of France"}],
        output_format=City,
        **SHORT,
    )
    assert isinstance(said.parsed_output, City)


@feature("thinking")
def thinking() -> None:
    said = client.messages.create(
        model=THINKS,
        messages=ASK,
        max_tokens=2000,
        extra_body={"thinking": {"type": "enabled", "budget_tokens": 1024}},
    )
    same([block.type for block in said.content], ["thinking", "text"])
    same(said.content[1].text.strip(), CONCLUSION)


@feature("models")
def models() -> None:
    if not hasattr(client, "models"):
        raise NotOfferedError("came later")
    assert f"{SAYS}:latest" in [one.id for one in client.models.list()]
    same(client.models.retrieve(SAYS).type, "model")


@feature("usage")
def usage() -> None:
    with client.messages.stream(model=SAYS, messages=ASK, **SHORT) as events:
        told = events.get_final_message().usage
    assert told.input_tokens > 3
    assert told.output_tokens > 5
    if hasattr(client.messages, "count_tokens"):
        same(client.messages.count_tokens(model=SAYS, messages=ASK).input_tokens, told.input_tokens)


@feature("errors")
def errors() -> None:
    for wrong, call in (
        (anthropic.NotFoundError, lambda: client.messages.create(model=ABSENT, messages=ASK, **SHORT)),
        (anthropic.BadRequestError, lambda: client.messages.create(model=SAYS, messages=ASK, max_tokens=0)),
        (
            anthropic.AuthenticationError,
            lambda: anthropic.Anthropic(base_url=KEYED_URL, api_key=WRONG_KEY).messages.create(
                model=SAYS, messages=ASK, **SHORT
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
    for how in ({"api_key": KEY}, {"auth_token": KEY, "api_key": None}):
        keyed = anthropic.Anthropic(base_url=KEYED_URL, **how)
        same(keyed.messages.create(model=SAYS, messages=ASK, **SHORT).content[0].text, ANSWER)


@feature("cancel")
def cancel() -> None:
    words = [{"role": "user", "content": "words " * 300}]
    with client.messages.stream(model=ENDLESS, messages=words, max_tokens=5000) as events:
        for number, _ in enumerate(events.text_stream):
            if number == 3:
                break
    freed(ENDLESS)


@feature("vision")
def vision() -> None:
    source = {"type": "base64", "media_type": "image/png", "data": PICTURE}
    content = [{"type": "image", "source": source}, {"type": "text", "text": "What is it?"}]
    with refused("BadRequestError"):
        client.messages.create(model=SAYS, messages=[{"role": "user", "content": content}], **SHORT)


@feature("slow")
def slow() -> None:
    slowly = anthropic.Anthropic(base_url=SLOW_URL, api_key="ollama")
    with slowly.messages.stream(model=ECHO, messages=ASK, extra_body={"keep_alive": 0}, **SHORT) as events:
        same("".join(events.text_stream), "Say it.")


run("anthropic")
