"""The choices that this gateway made last, for people who ask why (`explain`) and for `replay`.

In memory only, the oldest goes first. What is shown of one is made when somebody looks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from ollama_distributed.base.ids import NodeId, RequestId
from ollama_distributed.base.routing import (
    Candidate,
    Circuit,
    NotAsked,
    RouteDecision,
    RouteDecisions,
    RouteTimes,
)
from ollama_distributed.routing.plan import Plan

MOST = 1024
"""Kept; with prompts of 32 KB some 3 MB."""


class Record:
    """One choice."""

    __slots__ = ("at", "keys", "model", "plan", "prompt_tokens", "request_id", "team", "times")

    def __init__(
        self,
        request_id: RequestId | str,
        team: str,
        model: str,
        at: float,
        plan: Plan,
        keys: tuple[int, ...] = (),
        prompt_tokens: int = 0,
    ) -> None:
        self.request_id = request_id
        self.team = team
        self.model = model
        self.at = at
        self.plan = plan
        self.keys = keys
        self.prompt_tokens = prompt_tokens
        self.times: RouteTimes | None = None


class Decisions:
    """`me`: of this node; `name_of`: what people call one; `circuit`: of a node's replica of a model now,
    and what opened it."""

    def __init__(
        self,
        me: Callable[[], NodeId],
        name_of: Callable[[NodeId], str],
        circuit: Callable[[NodeId, str], tuple[Circuit, str]] = lambda _node, _model: ("closed", ""),
        most: int = MOST,
    ) -> None:
        self._me = me
        self._name_of = name_of
        self._circuit = circuit
        self._most = most
        self._records: OrderedDict[tuple[str, str], Record] = OrderedDict()
        """By request id and team: ids are the clients' own, and two teams may have the same."""

    def add(self, record: Record) -> None:
        self._records[record.request_id, record.team] = record
        if len(self._records) > self._most:
            self._records.popitem(last=False)

    def ended(self, request_id: str, team: str, times: RouteTimes) -> None:
        """The answer ended; nothing if its choice is not kept."""
        record = self._records.get((request_id, team))
        if record is not None:
            record.times = times

    def find(self, request_id: str, team: str | None) -> RouteDecision | None:
        """None: it is not kept, or another team's. `team` None: the newest of any."""
        if team is None:
            newest = (one for one in reversed(self._records.values()) if one.request_id == request_id)
            record = next(newest, None)
        else:
            record = self._records.get((request_id, team))
        return self.shown(record) if record is not None else None

    def latest(self, most: int, team: str | None) -> RouteDecisions:
        """Newest first."""
        found: list[RouteDecision] = []
        for record in reversed(self._records.values()):
            if len(found) >= most:
                break
            if team in (None, record.team):
                found.append(self.shown(record))
        return RouteDecisions(decisions=tuple(found), kept=self._most)

    def shown(self, record: Record) -> RouteDecision:
        me, name, plan = self._me(), self._name_of, record.plan
        circuits = {score.node: self._circuit(score.node, record.model) for score in plan.scores}
        return RouteDecision(
            request_id=record.request_id,
            at=record.at,
            model=record.model,
            gateway=name(me),
            policy=plan.policy,
            reason=plan.reason,
            prompt_tokens=record.prompt_tokens,
            prefix="".join(f"{key:016x}" for key in record.keys),
            order=tuple(map(name, plan.order)),
            candidates=tuple(
                Candidate(
                    node=score.node,
                    name=name(score.node),
                    here=score.node == me,
                    loaded=score.load.loaded,
                    slots=score.load.slots,
                    busy=score.load.busy,
                    queued=score.load.queued,
                    cached_tokens=score.cached_tokens,
                    read_tokens_per_s=score.read_tokens_per_s,
                    hop_s=score.hop_s,
                    load_s=score.load_s,
                    wait_s=score.wait_s,
                    read_s=score.read_s,
                    ttft_s=score.ttft_s,
                    circuit=circuits[score.node][0],
                    circuit_reason=circuits[score.node][1],
                )
                for score in sorted(plan.scores, key=lambda one: (one.ttft_s, one.node))
            ),
            left_out=tuple(
                NotAsked(node=one.node, name=name(one.node), reason=one.reason) for one in plan.left_out
            ),
            times=record.times,
        )
