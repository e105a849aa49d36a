"""Simon Willison's `llm` with llm-ollama, as a command line."""

import json
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from trying import (
    ABSENT,
    ANSWER,
    CALL,
    CITY_SCHEMA,
    ECHO,
    EMBEDS,
    KEY,
    KEYED_URL,
    SAYS,
    TALKS,
    URL,
    WEATHER,
    WRONG_KEY,
    feature,
    refused,
    run,
    same,
)

HOME = tempfile.mkdtemp()
PROGRAM = str(Path(sys.executable).parent / "llm")


def llm(*arguments: str, url: str = URL, key: str = "") -> str:
    """What it printed; models have a prefix beside those of other plugins."""
    arguments = tuple(
        f"ollama/{one}" if before == "-m" else one for before, one in pairwise(("", *arguments))
    )
    env = os.environ | {"OLLAMA_HOST": url, "LLM_USER_PATH": HOME} | ({"OLLAMA_API_KEY": key} if key else {})
    ran = subprocess.run(
        [PROGRAM, *arguments], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    if ran.returncode:
        raise RuntimeError(ran.stderr[-800:] + ran.stdout[-300:])
    return ran.stdout


@feature("chat")
def chat() -> None:
    same(llm("-m", SAYS, "--no-stream", "Say it.").strip(), ANSWER)


@feature("stream")
def stream() -> None:
    same(llm("-m", SAYS, "Say it.").strip(), ANSWER)


@feature("tools")
def tools() -> None:
    functions = f'def get_weather(city: str) -> str:\n    "The weather."\n    return {WEATHER!r}\n'
    same(llm("-m", ECHO, "--functions", functions, CALL).strip(), WEATHER)


@feature("structured")
def structured() -> None:
    found = llm("-m", TALKS, "--schema", json.dumps(CITY_SCHEMA), "The capital of France")
    same(sorted(json.loads(found)), ["city", "is_capital"])


@feature("embed")
def embed() -> None:
    same(len(json.loads(llm("embed", "-m", EMBEDS, "-c", "a cat"))), 384)


@feature("models")
def models() -> None:
    assert SAYS in llm("ollama", "models")


@feature("errors")
def errors() -> None:
    with refused("unknown model"):
        llm("-m", ABSENT, "x")
    with refused("unknown model"):  # it lists none where it may not
        llm("-m", SAYS, "x", url=KEYED_URL, key=WRONG_KEY)


@feature("key")
def key() -> None:
    same(llm("-m", SAYS, "Say it.", url=KEYED_URL, key=KEY).strip(), ANSWER)


run("llm", "llm-ollama")
