"""Which slot of a runner a request gets, so that no tenant finds what another's prompt left.

A runner that keeps copies of prompts in memory shares them between all slots, also for a request that
names its own (tried). It is loaded while there is one tenant, and llama.cpp chooses: it finds the slot,
or the copy, that read the prompt's beginning. From the first request of a second tenant on, nobody looks
back there.

In a runner without copies we choose. A slot is read from only by its holder: the tenant whose prompts
surely are all that it keeps. Who takes another's slot reads anew, and holds it once such a request had
its whole answer with nobody else in the slot: one that was cancelled may never have begun, and what is
kept there may still be the other's. Pure; above it, a runner gets as many requests at once as it has
slots.

Sources: PROMPTPEEK (NDSS 2025); vLLM CVE-2025-46570 (time to first token tells a prefix hit).
"""

from __future__ import annotations

from typing import Any

import msgspec

from ollama_distributed.serving.ports import ChatRequest, CompletionRequest

COMPARED = 4_096
"""Characters of a prompt's beginning that tell which slot of a tenant has read most of it."""

SIMILAR = 0.1
"""Of a prompt, which a slot must have read to be taken for it; llama.cpp's own figure."""


class Seat(msgspec.Struct, frozen=True):
    slot: int
    """Negative: whichever llama.cpp takes."""
    clean: bool
    """What is kept there may be somebody else's: nothing of it is used."""
    turn: int = 0
    """Counts the requests of the runner."""
    alone: bool = True
    """Nobody was in the slot."""

    @property
    def fields(self) -> dict[str, Any]:
        """Of the request to llama.cpp."""
        named = {"id_slot": self.slot} if self.slot >= 0 else {}
        return {**named, "cache_prompt": False} if self.clean else named


ANY = Seat(-1, clean=False)
CLEAN = Seat(-1, clean=True)


class _Slot(msgspec.Struct):
    tenant: str = ""
    """Who took it last; empty: nobody yet."""
    since: int = 0
    """Its first turn of those that nobody else's interrupted."""
    held: bool = False
    """What is kept there surely is this tenant's."""
    busy: int = 0
    used: int = 0
    text: str = ""


class Slots:
    """Of one runner. `copies`: it keeps prompts in memory beside its slots."""

    def __init__(self, count: int, *, copies: bool) -> None:
        self._copies = copies
        self._first = ""
        self._shared = False
        """More than one tenant has come."""
        self._slots = [_Slot() for _ in range(count)]
        self._turn = 0

    def take(self, tenant: str, text: str) -> Seat:
        """`text`: the prompt's beginning. To be given back with `leave`."""
        if self._copies:
            self._first = self._first or tenant
            self._shared = self._shared or tenant != self._first
            return CLEAN if self._shared else ANY
        self._turn += 1
        slot = min(self._slots, key=lambda one: self._rank(one, tenant, text))
        if slot.tenant != tenant:
            slot.held = not slot.tenant  # nobody has left anything there
            slot.tenant, slot.since = tenant, self._turn
        seat = Seat(self._slots.index(slot), not slot.held, self._turn, not slot.busy)
        slot.text, slot.used = text, self._turn
        slot.busy += 1
        return seat

    def leave(self, seat: Seat, *, whole: bool) -> None:
        """`whole`: it had its whole answer."""
        if seat.slot < 0:
            return
        slot = self._slots[seat.slot]
        slot.busy -= 1
        if whole and seat.alone and seat.turn >= slot.since:
            slot.held = True

    @staticmethod
    def _rank(slot: _Slot, tenant: str, text: str) -> tuple[int, bool, int, int, int]:
        """The idle first; of those the tenant's own that read most of it; else one that nobody has used,
        its own, another's; of those which waited longest."""
        own = slot.tenant == tenant
        shared = _shared(slot.text, text) if own else 0
        finds = shared > 0 and shared >= SIMILAR * len(text)
        whose = 1 if own else 2 if slot.tenant else 0
        return slot.busy, not finds, -shared if finds else 0, whose, slot.used


def _shared(one: str, other: str) -> int:
    """Characters that both begin with."""
    least, most = 0, min(len(one), len(other))
    while least < most:
        middle = (least + most + 1) // 2
        if one[:middle] == other[:middle]:
            least = middle
        else:
            most = middle - 1
    return least


def beginning(request: CompletionRequest | ChatRequest) -> str:
    if isinstance(request, ChatRequest):
        return "\n".join(message.content[:COMPARED] for message in request.messages)[:COMPARED]
    prompt = request.prompt
    if isinstance(prompt, str):
        return prompt[:COMPARED]
    return next((part for part in prompt if isinstance(part, str)), "")[:COMPARED]
