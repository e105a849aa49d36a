"""What the routes about routing need of the node (`routing.service.Router`)."""

from __future__ import annotations

from typing import Protocol

from ollama_distributed.base.inference import InferenceRequest
from ollama_distributed.base.routing import RouteDecision, RouteDecisions, RouteTimes
from ollama_distributed.gateway.summary import Observer, Summary


class Kept(Protocol):
    """The choices made last (`routing.decisions.Decisions`). `team` None: of all teams."""

    def find(self, request_id: str, team: str | None) -> RouteDecision | None: ...

    def latest(self, most: int, team: str | None) -> RouteDecisions: ...

    def ended(self, request_id: str, team: str, times: RouteTimes) -> None: ...


class Routes(Protocol):
    @property
    def decisions(self) -> Kept: ...

    def explain(self, request: InferenceRequest) -> RouteDecision:
        """What would be chosen for it now; nothing is sent."""
        ...


def told(routes: Routes, node: str) -> Observer:
    """Tells where the time of each answer went. `node`: what this one is called."""

    def observe(summary: Summary) -> None:
        usage = summary.usage
        if usage is None:
            return
        routes.decisions.ended(
            summary.request_id,
            summary.team,
            RouteTimes(
                node=summary.node or node,
                moves=summary.moves,
                load_s=max(usage.load_s - usage.wait_s, 0.0),
                wait_s=usage.wait_s,
                prefill_s=usage.prompt_s,
                decode_s=usage.completion_s,
                total_s=usage.total_s,
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.cached_tokens,
                completion_tokens=usage.completion_tokens,
            ),
        )

    return observe
