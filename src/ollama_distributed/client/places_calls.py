"""The calls about models' places as data. Pure; as `cluster_calls.py`.

What a model's places are to be may be said twice; it is the same then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

import msgspec

from ollama_distributed.base import placement as wire
from ollama_distributed.client.answers import decoder_of
from ollama_distributed.client.calls import Call, model_path

_decode_fit = decoder_of(wire.FitAnswer)
_decode_places = decoder_of(wire.PlacesAnswer)
_decode_list = decoder_of(wire.PlacesList)
_decode_what_if = decoder_of(wire.WhatIfAnswer)
_encode = msgspec.json.Encoder().encode


def fit(name: str, *, context_tokens: int | None = None, slots: int | None = None) -> Call[wire.FitAnswer]:
    """Where a model would fit, with how much context, and how fast it would be: the best node
    first. None: as nodes load it by themselves."""
    asked = {"context": context_tokens, "slots": slots}
    query = urlencode({key: value for key, value in asked.items() if value is not None})
    path = model_path(name) + "/fit" + (f"?{query}" if query else "")
    return Call(method="GET", path=path, decode=_decode_fit, repeat="always")


def places(name: str) -> Call[wire.PlacesAnswer]:
    """Where a model is wanted and where it is, what comes next, and why not. `settled`: nothing is
    left to do."""
    return Call(method="GET", path=model_path(name) + "/place", decode=_decode_places, repeat="always")


def all_places() -> Call[wire.PlacesList]:
    """Every model: on how many nodes it is wanted and is, on disk and in memory."""
    return Call(method="GET", path="/api/v1/placement", decode=_decode_list, repeat="always")


def replicas(
    name: str, count: int | None = None, *, least: int | None = None, most: int | None = None
) -> Call[wire.PlacesAnswer]:
    """How many nodes hold a model. Without `count`: as many as demand asks for, from `least` to
    `most`."""
    body: dict[str, Any] = {"replicas": count}
    body |= {key: value for key, value in (("min", least), ("max", most)) if value is not None}
    return _order(name, "replicas", body)


def place(
    name: str,
    *,
    labels: Mapping[str, str] | None = None,
    preload: bool | None = None,
    keep_alive_s: float | None = None,
    keep: bool | None = None,
    priority: int | None = None,
    clear: bool = False,
) -> Call[wire.PlacesAnswer]:
    """Which nodes may hold a model, and how. None leaves a thing as it is; `clear`: nothing is
    wanted any more, and the model stays where it is."""
    said = {
        "labels": labels,
        "preload": preload,
        "keep_alive_s": keep_alive_s,
        "keep": keep,
        "priority": priority,
    }
    body: dict[str, Any] = {key: value for key, value in said.items() if value is not None}
    return _order(name, "place", body | ({"clear": True} if clear else {}))


def pin(name: str, node: str) -> Call[wire.PlacesAnswer]:
    """Have a node, by id or name, hold the model in any case."""
    return _order(name, "pin", {"node": node})


def unpin(name: str, node: str) -> Call[wire.PlacesAnswer]:
    """Take the pin away."""
    return _order(name, "unpin", {"node": node})


def what_if(lose: Sequence[str]) -> Call[wire.WhatIfAnswer]:
    """What would move, and what would no longer fit, if these nodes were lost."""
    return Call(
        method="POST",
        path="/api/v1/cluster/what-if",
        body=_encode({"lose": list(lose)}),
        decode=_decode_what_if,
        repeat="always",
    )


def _order(name: str, what: str, body: Mapping[str, Any]) -> Call[wire.PlacesAnswer]:
    return Call(
        method="POST",
        path=f"{model_path(name)}/{what}",
        body=_encode(body),
        decode=_decode_places,
        repeat="always",
    )
