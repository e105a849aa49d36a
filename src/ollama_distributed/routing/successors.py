"""Decides who goes on with an answer that lost its node, and who may have what was said of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ollama_distributed.base.ids import NodeId
from ollama_distributed.base.inference import InferenceRequest
from ollama_distributed.base.tokens import Resume
from ollama_distributed.models.names import name_key
from ollama_distributed.routing.choosing import Chooser, Known
from ollama_distributed.routing.ejections import Ejections
from ollama_distributed.routing.plan import MAX_TRIES, Dice, Standing, plan
from ollama_distributed.routing.ports import ClusterView

MOST_ASKED = 64
"""Nodes asked what they did for one model or answer; each costs a connection."""


class Successors:
    """Of one gateway."""

    def __init__(self, chooser: Chooser, ejections: Ejections, view: ClusterView, dice: Dice) -> None:
        self._chooser = chooser
        self._ejections = ejections
        self._view = view
        self._dice = dice

    def exist(self, request: InferenceRequest, resume: Resume) -> bool:
        """Whether a node that it did not leave, lives and takes work could go on with it."""
        fresh, _ = self._allowed(request, resume, self._holders(request))
        return any(one.reachable and one.status not in ("offline", "draining") for one in fresh)

    def order(self, request: InferenceRequest, resume: Resume) -> tuple[tuple[NodeId, ...], Known]:
        """Whom to ask: nodes that it left come last. Of the others the one that has read its prompt lately
        goes on soonest: it is the prompt of the rest, too."""
        key, judged = name_key(request.model), self._ejections.judged
        known = self._chooser.known(request, self._holders(request))
        first, last = (
            plan(judged(some, key), self._view.me, known.loads, self._dice, prompt=known.prompt).order
            for some in self._allowed(request, resume, known.holders)
        )
        return (*first, *last)[:MAX_TRIES], known

    def keepers(self, request: InferenceRequest) -> list[NodeId]:
        """Who may have what was said of an answer: the same nodes wherever it is asked."""
        others = self._chooser.directory.everyone(request.model)
        allowed = (one.node for one in others if self._chooser.allowed(request, one))
        return list(itertools.islice(allowed, MOST_ASKED))

    def _holders(self, request: InferenceRequest) -> tuple[Standing, ...]:
        return self._chooser.holders(request.model, self._chooser.wanted(request))

    def _allowed(
        self, request: InferenceRequest, resume: Resume, holders: Sequence[Standing]
    ) -> tuple[list[Standing], list[Standing]]:
        """Those that the answer did not leave, and those that it did. One where it stalled may not go on,
        and only those may that hold the same content."""
        me = self._view.me
        left = {one.replica or me: one.stalled for one in resume.left}
        held = self._view.state().models.get(name_key(request.model))
        fresh: list[Standing] = []
        old: list[Standing] = []
        for standing in holders:
            copy = held.get(standing.node) if held is not None and standing.node != me else None
            other = resume.ids and copy is not None and copy.digest != resume.model_digest
            if other or left.get(standing.node) or not self._chooser.allowed(request, standing):
                continue
            (old if standing.node in left else fresh).append(standing)
        return fresh, old
