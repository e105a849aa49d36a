"""How a cold route is declared; `app.py` registers the tables of this folder."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ollama_distributed.access.roles import Verb
from ollama_distributed.base.errors import Invalid, NotOffered
from ollama_distributed.gateway.cold import ColdRequest
from ollama_distributed.gateway.disk_port import Disks
from ollama_distributed.gateway.metrics import GatewayMetrics
from ollama_distributed.gateway.overload import Overload
from ollama_distributed.gateway.placement_port import Places
from ollama_distributed.gateway.ports import Catalog, Moves, Preloaded, Residents, Transfers, VersionInfo
from ollama_distributed.gateway.queue_port import Queues
from ollama_distributed.gateway.usage_port import UsageDesk

Run = Callable[[ColdRequest, Request], Awaitable[Response]]


class ColdRoute(msgspec.Struct, frozen=True, kw_only=True):
    method: str
    path: str
    verb: Verb | None
    """None: public."""
    run: Run
    summary: str
    tag: str
    body: type[Any] | None = None
    """For the documentation; `run` decodes it itself."""
    body_optional: bool = False
    """For the documentation too: without one it does what its defaults say."""
    answer: type[Any] | None = None
    """For the documentation too: what the answer's JSON is."""
    status: int = 200
    """For the documentation: of a request that worked."""
    other: tuple[int, ...] = ()
    """For the documentation too: other good answers' statuses, without a schema."""
    same: tuple[int, ...] = ()
    """For the documentation: other statuses of the same answer."""
    media: str = "application/json"
    """For the documentation: how `answer` comes; text or a file where there is none."""
    other_media: tuple[str, ...] = ()
    """For the documentation: how a good answer may come too, if asked for."""
    query: tuple[str, ...] = ()
    """Names of yes-or-no parameters, for the documentation."""
    words: tuple[str, ...] = ()
    """Names of parameters with text, for the documentation."""
    upload: str = ""
    """For the documentation: the media type of a body that is a file."""
    hidden: bool = False
    """Not documented (HEAD beside a GET, what pages load)."""


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """What cold routes work on."""

    catalog: Catalog
    residents: Residents
    version: VersionInfo
    metrics: GatewayMetrics
    wall: Callable[[], float]
    ready: Callable[[], bool]
    cluster_status: Callable[[], str] | None = None
    """In one word, for probes; None: there is no cluster."""
    transfers: Transfers | None = None
    """None: this gateway moves no models."""
    moves: Moves | None = None
    disks: Disks | None = None
    """None: this gateway has no disk."""
    places: Places | None = None
    queues: Queues | None = None
    usage: UsageDesk | None = None
    overload: Overload
    preloaded: Callable[[], Mapping[str, Preloaded]] = dict
    """Models that were to be loaded at the start, by name."""

    def need_moves(self) -> Moves:
        if self.moves is None:
            raise NotOffered("this server does not move models between nodes")
        return self.moves

    def need_transfers(self) -> Transfers:
        if self.transfers is None:
            raise NotOffered("this server does not move models to or from registries")
        return self.transfers


def json_response(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json; charset=utf-8")


def actor(cold: ColdRequest) -> str:
    """Who asks, for the record of a change: a person's name, or the key's id."""
    assert cold.identity is not None, "only routes with a verb ask"
    return cold.identity.user or cold.identity.key_id or cold.identity.role


def flag(request: Request, name: str) -> bool:
    """A yes or no of the query; absent: no."""
    match request.query_params.get(name, "false").lower():
        case "true" | "1" | "yes" | "":
            return True
        case "false" | "0" | "no":
            return False
    raise Invalid(f"{name} must be true or false", param=name)
