"""What the programs beside this one share: where the nodes are, and how a feature that was tried is told.

    @feature("chat")
    def chat() -> None: ...

    run()

Each program runs in the environment of one client, so this imports nothing but the standard library.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import inspect
import json
import os
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

URL = os.environ["CLIENT_URL"]
"""A node that asks this machine for no key."""
KEYED_URL = os.environ["CLIENT_KEYED_URL"]
"""A node that asks everybody for one."""
KEY = os.environ["CLIENT_KEY"]
SLOW_URL = os.environ["CLIENT_SLOW_URL"]
"""A node whose echo model takes some seconds to load."""
WRONG_KEY = "odk_aaaaaaaa_" + "a" * 20
ANSWER = os.environ["CLIENT_ANSWER"]
THOUGHT, CONCLUSION = os.environ["CLIENT_THOUGHT"], os.environ["CLIENT_CONCLUSION"]

SAYS = "scripted"
"""Answers `ANSWER`."""
CALLS = "scripted-tools"
"""Calls `get_weather` for Paris, whatever it is asked."""
THINKS = "scripted-thinking"
TALKS = "smollm2:135m"
EMBEDS = "minilm"
ECHO = "echo"
"""Says what it was asked last; `call NAME {arguments}` on a line of its own makes it call that tool."""
ENDLESS = "endless"
"""Never ends by itself."""
ABSENT = "no-such-model"

ASK = [{"role": "user", "content": "Say it."}]
CITY_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}, "is_capital": {"type": "boolean"}},
    "required": ["city", "is_capital"],
    "additionalProperties": False,
}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CALL = 'call get_weather {"city": "Paris"}'
"""Has the echo model call the tool; its next answer is what the tool said."""
WEATHER = "sunny, 21 degrees"
PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="

_FREE_S = 10.0
_features: dict[str, Callable[[], Any]] = {}


class NotOfferedError(Exception):
    """This version of the client has no such thing."""


def feature(name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def keep(function: Callable[[], Any]) -> Callable[[], Any]:
        _features[name] = function
        return function

    return keep


def version(package: str) -> str:
    return importlib.metadata.version(package)


def run(*packages: str) -> None:
    """Try all of them; a line of JSON each, and one with the versions of `packages` before."""
    if packages:
        print(json.dumps({"versions": {name: version(name) for name in packages}}), flush=True)
    wanted = os.environ.get("CLIENT_FEATURES", "").split()
    for name, function in _features.items():
        if wanted and name not in wanted:
            continue
        began = time.monotonic()
        row: dict[str, Any] = {"feature": name}
        try:
            made = function()
            if inspect.iscoroutine(made):
                asyncio.run(made)
        except NotOfferedError as exc:
            row |= {"outcome": "not offered", "why": str(exc)}
        except (Exception, SystemExit) as exc:  # each feature by itself, whatever a client raises
            row |= {"outcome": "failed", "why": f"{type(exc).__name__}: {exc}"[:600]}
            traceback.print_exc()
        else:
            row["outcome"] = "passed"
        row["took_s"] = round(time.monotonic() - began, 2)
        print(json.dumps(row), flush=True)


@contextlib.contextmanager
def refused(*words: str) -> Iterator[None]:
    """What is inside raises, and one of `words` is in the class or text of the error or of what caused it."""
    try:
        yield
    except Exception as exc:
        told: list[str] = []
        cause: BaseException | None = exc
        while cause is not None:
            told.append(f"{type(cause).__name__}: {cause} {getattr(cause, 'status_code', '')}")
            cause = cause.__cause__ or cause.__context__
        if not any(word.lower() in " ".join(told).lower() for word in words):
            raise AssertionError(f"none of {words} in: {' | '.join(told)[:800]}") from exc
    else:
        raise AssertionError(f"nothing was raised; expected {words}")


def same(got: object, expected: object) -> None:
    assert got == expected, f"{got!r} is not {expected!r}"


def busy(model: str) -> int:
    """Slots of the model that work."""
    with urllib.request.urlopen(f"{URL}/api/ps", timeout=30) as answer:
        loaded = json.load(answer)["models"]
    return sum(
        int(one.get("slots_busy", 0)) for one in loaded if one["name"].split(":")[0] == model.split(":")[0]
    )


def freed(model: str) -> None:
    """The slot is free soon after the client left."""
    end = time.monotonic() + _FREE_S
    while busy(model):
        assert time.monotonic() < end, f"{model} still works {_FREE_S:g} s after the client left"
        time.sleep(0.1)
