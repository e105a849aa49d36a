"""Where models fit and where they are wanted, under `/api/v1/models`; `/api/v1/placement` for all
of them; `/api/v1/cluster/what-if`.

An order is answered when the cluster has it; what follows from it is in the answer's rows, and
`GET …/place` says how far it is.
"""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ollama_distributed.base.errors import Invalid
from ollama_distributed.base.placement import (
    FitAnswer,
    PinAsk,
    PlaceAsk,
    PlacesAnswer,
    PlacesList,
    ReplicasAsk,
    WhatIfAnswer,
    WhatIfAsk,
)
from ollama_distributed.gateway.cold import ColdRequest
from ollama_distributed.gateway.placement_port import Places
from ollama_distributed.gateway.routes.table import ColdRoute, actor, json_response

TAG = "Places of models"
_MODEL = "/api/v1/models/{name:path}"
_MAX_DIGITS = 9

_REPLICAS = msgspec.json.Decoder(ReplicasAsk)
_PLACE = msgspec.json.Decoder(PlaceAsk)
_PIN = msgspec.json.Decoder(PinAsk)
_WHAT_IF = msgspec.json.Decoder(WhatIfAsk)


def places_routes(places: Places) -> list[ColdRoute]:
    handlers = _Handlers(places)
    return [
        ColdRoute(
            method="GET",
            path=_MODEL + "/fit",
            verb="read",
            run=handlers.fit,
            tag=TAG,
            summary="Where a model would fit, also one that is in its registry only",
            words=("context", "slots"),
            answer=FitAnswer,
        ),
        ColdRoute(
            method="GET",
            path=_MODEL + "/place",
            verb="read",
            run=handlers.places,
            tag=TAG,
            summary="Where a model is wanted and where it is; what comes next, and why not",
            answer=PlacesAnswer,
        ),
        ColdRoute(
            method="GET",
            path="/api/v1/placement",
            verb="read",
            run=handlers.all_places,
            tag=TAG,
            summary="Every model: on how many nodes it is wanted and is, on disk and in memory",
            answer=PlacesList,
        ),
        ColdRoute(
            method="POST",
            path=_MODEL + "/place",
            verb="admin",
            run=handlers.place,
            tag=TAG,
            summary="Which nodes may hold a model, whether it is loaded ahead, how long it is kept",
            body=PlaceAsk,
            answer=PlacesAnswer,
        ),
        ColdRoute(
            method="POST",
            path=_MODEL + "/replicas",
            verb="admin",
            run=handlers.replicas,
            tag=TAG,
            summary="How many nodes hold a model",
            body=ReplicasAsk,
            answer=PlacesAnswer,
        ),
        ColdRoute(
            method="POST",
            path=_MODEL + "/pin",
            verb="admin",
            run=handlers.pin,
            tag=TAG,
            summary="Have a node hold a model in any case",
            body=PinAsk,
            answer=PlacesAnswer,
        ),
        ColdRoute(
            method="POST",
            path=_MODEL + "/unpin",
            verb="admin",
            run=handlers.unpin,
            tag=TAG,
            summary="Take a pin away",
            body=PinAsk,
            answer=PlacesAnswer,
        ),
        ColdRoute(
            method="POST",
            path="/api/v1/cluster/what-if",
            verb="read",
            run=handlers.what_if,
            tag=TAG,
            summary="What would move, and what would no longer fit, if nodes were lost",
            body=WhatIfAsk,
            answer=WhatIfAnswer,
        ),
    ]


class _Handlers:
    def __init__(self, places: Places) -> None:
        self._places = places

    async def fit(self, cold: ColdRequest, request: Request) -> Response:
        answer = await self._places.fit(
            _name(request),
            context_tokens=_number(request, "context"),
            slots=_number(request, "slots"),
            look=cold.may("models", "models"),  # a registry is asked for those only who may pull from it
        )
        return json_response(answer)

    async def places(self, _cold: ColdRequest, request: Request) -> Response:
        return json_response(await self._places.places(_name(request)))

    async def all_places(self, _cold: ColdRequest, _request: Request) -> Response:
        return json_response(PlacesList(models=tuple(await self._places.all_places())))

    async def place(self, cold: ColdRequest, request: Request) -> Response:
        ask = await cold.body(request, _PLACE)
        return json_response(await self._places.place(_name(request), ask, actor=actor(cold)))

    async def replicas(self, cold: ColdRequest, request: Request) -> Response:
        ask = await cold.body(request, _REPLICAS)
        return json_response(await self._places.replicas(_name(request), ask, actor=actor(cold)))

    async def pin(self, cold: ColdRequest, request: Request) -> Response:
        ask = await cold.body(request, _PIN)
        return json_response(await self._places.pin(_name(request), ask.node, actor=actor(cold)))

    async def unpin(self, cold: ColdRequest, request: Request) -> Response:
        ask = await cold.body(request, _PIN)
        return json_response(await self._places.unpin(_name(request), ask.node, actor=actor(cold)))

    async def what_if(self, cold: ColdRequest, request: Request) -> Response:
        ask = await cold.body(request, _WHAT_IF)
        return json_response(await self._places.what_if(ask.lose))


def _name(request: Request) -> str:
    return str(request.path_params["name"])


def _number(request: Request, name: str) -> int | None:
    text = request.query_params.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS):
        raise Invalid(f"{name} must be a number", param=name)
    return int(text)
