"""What there is to subscribe to, asked without a WebSocket; `gateway/events` has those."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import Response

from ollama_distributed.access.roles import demand
from ollama_distributed.base import events
from ollama_distributed.base.errors import Forbidden
from ollama_distributed.base.events import ChannelRow, ChannelsAnswer
from ollama_distributed.base.identity import Identity
from ollama_distributed.gateway.cold import ColdRequest
from ollama_distributed.gateway.events.channels import Channel
from ollama_distributed.gateway.routes.table import ColdRoute, json_response


def event_routes(channels: Mapping[str, Channel]) -> list[ColdRoute]:
    async def show(cold: ColdRequest, _request: Request) -> Response:
        assert cold.identity is not None, "the route asks for a verb"
        found = [one for one in channels.values() if _may(cold.identity, one)]
        return json_response(
            ChannelsAnswer(channels=tuple(ChannelRow(name=c.name, summary=c.summary) for c in found))
        )

    return [
        ColdRoute(
            method="GET",
            path=events.PATH,
            verb="read",
            run=show,
            tag="REST",
            summary="With an upgrade, a WebSocket with events (docs/events.md); without, the channels that "
            "one may subscribe to",
            answer=ChannelsAnswer,
            other=(101,),
        )
    ]


def _may(identity: Identity, channel: Channel) -> bool:
    try:
        demand(identity, channel.right, channel.path)
    except Forbidden:
        return False
    return True
