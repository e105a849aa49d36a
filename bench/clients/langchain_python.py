"""LangChain's three packages: langchain-ollama, langchain-openai, langchain-anthropic."""

from typing import Literal

from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_ollama import ChatOllama, OllamaEmbeddings, OllamaLLM
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel
from trying import (
    ABSENT,
    ANSWER,
    CALL,
    CONCLUSION,
    ECHO,
    EMBEDS,
    ENDLESS,
    KEY,
    KEYED_URL,
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
    freed,
    refused,
    run,
    same,
)


class City(BaseModel):
    """A city."""

    city: Literal["Paris", "Rome"]
    is_capital: bool


@tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return WEATHER if city else ""


def chats(model: str, url: str = URL, key: str = "ollama", **more):
    headers = {} if key == "ollama" else {"client_kwargs": {"headers": {"Authorization": f"Bearer {key}"}}}
    return [
        ChatOllama(model=model, base_url=url, **headers, **more),
        ChatOpenAI(model=model, base_url=f"{url}/v1", api_key=key, max_retries=0, stream_usage=True, **more),
        ChatOpenAI(
            model=model, base_url=f"{url}/v1", api_key=key, max_retries=0, use_responses_api=True, **more
        ),
        ChatAnthropic(model=model, base_url=url, api_key=key, max_retries=0, max_tokens=2000, **more),
    ]


def text(message) -> str:
    told = message.text
    return told if isinstance(told, str) else told()


@feature("chat")
def chat() -> None:
    for one in chats(SAYS):
        same(text(one.invoke("Say it.")), ANSWER)
    same(OllamaLLM(model=SAYS, base_url=URL).invoke("Say it."), ANSWER)


@feature("stream")
def stream() -> None:
    for one in chats(SAYS):
        parts = list(one.stream("Say it."))
        same("".join(text(part) for part in parts), ANSWER)


@feature("async")
async def async_stream() -> None:
    for one in chats(SAYS):
        same("".join([text(part) async for part in one.astream("Say it.")]), ANSWER)


@feature("tools")
def tools() -> None:
    for one in chats(ECHO):
        bound = one.bind_tools([get_weather])
        talk = [HumanMessage(CALL)]
        called = bound.invoke(talk)
        (call,) = called.tool_calls
        same((call["name"], call["args"]), ("get_weather", {"city": "Paris"}))
        talk += [called, ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])]
        same(text(bound.invoke(talk)), WEATHER)
        whole = None
        for part in bound.stream([HumanMessage(CALL)]):
            whole = part if whole is None else whole + part
        same(whole.tool_calls[0]["args"], {"city": "Paris"})


@feature("structured")
def structured() -> None:
    for one in chats(TALKS):
        made = one.with_structured_output(City, method="json_schema").invoke("The capital of France")
        assert isinstance(made, City)


@feature("thinking")
def thinking() -> None:
    said = ChatOllama(model=THINKS, base_url=URL, reasoning=True).invoke("Say it.")
    same(said.additional_kwargs["reasoning_content"].strip(), THOUGHT)
    same(text(said).strip(), CONCLUSION)
    said = ChatAnthropic(
        model=THINKS,
        base_url=URL,
        api_key="ollama",
        max_tokens=2000,
        thinking={"type": "enabled", "budget_tokens": 1024},
    ).invoke("Say it.")
    same(text(said).strip(), CONCLUSION)
    said = ChatOpenAI(
        model=THINKS,
        base_url=f"{URL}/v1",
        api_key="ollama",
        use_responses_api=True,
        reasoning={"effort": "low", "summary": "auto"},
    ).invoke("Say it.")
    same(text(said).strip(), CONCLUSION)


@feature("embed")
def embed() -> None:
    same(
        [len(v) for v in OllamaEmbeddings(model=EMBEDS, base_url=URL).embed_documents(["a", "b"])], [384, 384]
    )
    made = OpenAIEmbeddings(
        model=EMBEDS, base_url=f"{URL}/v1", api_key="ollama", check_embedding_ctx_length=False
    )
    same([len(v) for v in made.embed_documents(["a", "b"])], [384, 384])


@feature("models")
def models() -> None:
    ChatOllama(model=SAYS, base_url=URL, validate_model_on_init=True)
    with refused("not found"):
        ChatOllama(model=ABSENT, base_url=URL, validate_model_on_init=True)


@feature("usage")
def usage() -> None:
    for one in chats(SAYS):
        assert one.invoke("Say it.").usage_metadata["output_tokens"] > 5
        whole = None
        for part in one.stream("Say it."):
            whole = part if whole is None else whole + part
        assert whole.usage_metadata, type(one)
        assert whole.usage_metadata["input_tokens"] > 3


@feature("errors")
def errors() -> None:
    for one in chats(ABSENT):
        with refused("not found", "NotFoundError"):
            one.invoke("Say it.")
    for one in chats(SAYS, KEYED_URL, WRONG_KEY):
        with refused("401", "AuthenticationError"):
            one.invoke("Say it.")


@feature("key")
def key() -> None:
    for one in chats(SAYS, KEYED_URL, KEY):
        same(text(one.invoke("Say it.")), ANSWER)


@feature("cancel")
def cancel() -> None:
    for one in chats(ENDLESS):
        parts = one.stream("words " * 300)
        for _ in range(3):
            next(parts)
        parts.close()
        freed(ENDLESS)


@feature("vision")
def vision() -> None:
    content = [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PICTURE}"}},
    ]
    for one in chats(SAYS):
        with refused("image", "vision"):
            one.invoke([HumanMessage(content)])


@feature("slow")
def slow() -> None:
    same(text(ChatOllama(model=ECHO, base_url=SLOW_URL, keep_alive=0).invoke("Say it.")), "Say it.")


run("langchain-ollama", "langchain-openai", "langchain-anthropic")
