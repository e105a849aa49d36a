"""LlamaIndex: llms-ollama, embeddings-ollama, llms-openai-like."""

from typing import Literal

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.ollama import OllamaEmbedding
from llama_index.llms.ollama import Ollama
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel
from trying import (
    ABSENT,
    ANSWER,
    CALL,
    CONCLUSION,
    ECHO,
    EMBEDS,
    KEY,
    KEYED_URL,
    SAYS,
    SLOW_URL,
    TALKS,
    THINKS,
    URL,
    WEATHER,
    feature,
    refused,
    run,
    same,
)


class City(BaseModel):
    """A city."""

    city: Literal["Paris", "Rome"]
    is_capital: bool


def get_weather(city: str) -> str:
    """The weather of a city."""
    return WEATHER if city else ""


def llms(model: str, url: str = URL, key: str = "ollama"):
    headers = {} if key == "ollama" else {"headers": {"Authorization": f"Bearer {key}"}}
    return [
        Ollama(model=model, base_url=url, request_timeout=60, context_window=2000, **headers),
        OpenAILike(
            model=model,
            api_base=f"{url}/v1",
            api_key=key,
            is_chat_model=True,
            is_function_calling_model=True,
            max_retries=0,
        ),
    ]


@feature("chat")
def chat() -> None:
    for one in llms(SAYS):
        same(one.chat([ChatMessage(role="user", content="Say it.")]).message.content, ANSWER)
        same(one.complete("Say it.").text, ANSWER)


@feature("stream")
def stream() -> None:
    for one in llms(SAYS):
        same(
            "".join(p.delta or "" for p in one.stream_chat([ChatMessage(role="user", content="Say it.")])),
            ANSWER,
        )


@feature("async")
async def async_stream() -> None:
    for one in llms(SAYS):
        parts = await one.astream_chat([ChatMessage(role="user", content="Say it.")])
        same("".join([part.delta or "" async for part in parts]), ANSWER)


@feature("tools")
def tools() -> None:
    made = FunctionTool.from_defaults(get_weather)
    for one in llms(ECHO):
        same(str(one.predict_and_call([made], user_msg=CALL)), WEATHER)


@feature("agent")
async def agent() -> None:
    from llama_index.core.agent.workflow import FunctionAgent

    for one in llms(ECHO):
        worker = FunctionAgent(tools=[get_weather], llm=one)
        same(str(await worker.run(CALL)), WEATHER)


@feature("structured")
def structured() -> None:
    made = llms(TALKS)[0].as_structured_llm(City)
    assert isinstance(made.complete("The capital of France").raw, City)


@feature("thinking")
def thinking() -> None:
    said = Ollama(model=THINKS, base_url=URL, thinking=True).chat(
        [ChatMessage(role="user", content="Say it.")]
    )
    same(said.message.content.strip(), CONCLUSION)


@feature("embed")
def embed() -> None:
    made = OllamaEmbedding(model_name=EMBEDS, base_url=URL)
    same([len(v) for v in made.get_text_embedding_batch(["a cat", "a dog"])], [384, 384])
    same(len(made.get_query_embedding("a cat")), 384)


@feature("usage")
def usage() -> None:
    for one in llms(SAYS):
        raw = one.chat([ChatMessage(role="user", content="Say it.")]).raw
        told = raw["usage"] if isinstance(raw, dict) else dict(raw.usage)
        assert told["prompt_tokens"] > 3


@feature("errors")
def errors() -> None:
    for one in llms(ABSENT):
        with refused("not found", "NotFoundError"):
            one.complete("x")


@feature("key")
def key() -> None:
    for one in llms(SAYS, KEYED_URL, KEY):
        same(one.complete("Say it.").text, ANSWER)


@feature("slow")
def slow() -> None:
    same(
        Ollama(model=ECHO, base_url=SLOW_URL, request_timeout=60, keep_alive=0).complete("Say it.").text,
        "Say it.",
    )


run("llama-index-llms-ollama", "llama-index-embeddings-ollama", "llama-index-llms-openai-like")
