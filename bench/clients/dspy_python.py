"""DSPy, through LiteLLM's providers or its own client."""

import dspy
from trying import ABSENT, ANSWER, EMBEDS, KEY, KEYED_URL, SAYS, URL, feature, refused, run, same


def lms(model: str, url: str = URL, key: str = "ollama"):
    return [
        dspy.LM(f"ollama_chat/{model}", api_base=f"{url}/v1", api_key=key, cache=False),
        dspy.LM(f"openai/{model}", api_base=f"{url}/v1", api_key=key, cache=False),
    ]


@feature("chat")
def chat() -> None:
    for one in lms(SAYS):
        found = one("Say it.")[0]
        same(found if isinstance(found, str) else found["text"], ANSWER)


@feature("embed")
def embed() -> None:
    made = dspy.Embedder(f"openai/{EMBEDS}", api_base=f"{URL}/v1", api_key="ollama", caching=False)
    same([len(row) for row in made(["a cat", "a dog"])], [384, 384])


@feature("errors")
def errors() -> None:
    for one in lms(ABSENT):
        with refused("not found"):
            one("x")


@feature("key")
def key() -> None:
    for one in lms(SAYS, KEYED_URL, KEY):
        found = one("Say it.")[0]
        same(found if isinstance(found, str) else found["text"], ANSWER)


run("dspy")
