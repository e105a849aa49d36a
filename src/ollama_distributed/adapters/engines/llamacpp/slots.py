"""Which slot of a runner a request gets.

*Beside those that work.* llama.cpp computes the next tokens of slots together where the slots are
neighbours, and one group after the other where they are not: with each group it reads the model once more.
Four streams in slots 0-3 of eight make 190 tokens/s here, in 0, 1, 4, 5 141, and in 0, 2, 4, 6 129. Left to
itself it takes the slot that waited longest, wherever that is.

*Where most of the prompt is kept.* Prompts are compared by text, which is cheap, and never exactly what the
slot holds: llama.cpp reads what it does not find. A page of text is worth more than a neighbour.

*So that no tenant finds what another's prompt left.* A slot is read from only by its holder: the tenant
whose prompts surely are all that it keeps. Who takes another's slot reads anew, and holds it once such a
request had its whole answer with nobody else in the slot: one that was cancelled may never have begun, or
begin after all, and what is kept there may still be the other's. A runner that keeps copies of prompts in
memory shares them between all slots, also for a request that names its own (tried). It is loaded while there
is one tenant; from the first request of a second one on, nobody looks back there.

Pure; above it, a runner gets as many requests at once as it has slots.

Sources: `llama_batch_allocr::split_equal` (only slots that follow each other, where each has a cache of its
own); PROMPTPEEK (NDSS 2025); vLLM CVE-2025-46570 (time to first token tells a prefix hit).
"""

from __future__ import annotations

from typing import Any

import msgspec

from ollama_distributed.serving.ports import ChatRequest, CompletionRequest

COMPARED = 262_144
"""Characters of a prompt's beginning that tell which slot has read most of it."""

PAGE = 1_024
"""Characters, some 256 tokens: to read so many anew costs more than to compute apart from the others."""

SIMILAR = 0.1
"""Of a shorter prompt, which a slot must have read to be taken for it; llama.cpp's own figure."""

LEAVING_S = 1.0
"""So long llama.cpp may work on in a slot whose request was cancelled, or even begin: another one would wait
for it, and then find what it left."""


class Seat(msgspec.Struct, frozen=True):
    slot: int
    clean: bool
    """What is kept there may be somebody else's: nothing of it is used."""
    turn: int
    """Counts the requests of the runner."""
    alone: bool
    """Nobody was in the slot, and nobody who was cancelled may come there still."""

    @property
    def fields(self) -> dict[str, Any]:
        """Of the request to llama.cpp."""
        return {"id_slot": self.slot, "cache_prompt": False} if self.clean else {"id_slot": self.slot}


class _Slot(msgspec.Struct):
    tenant: str = ""
    """Who took it last."""
    since: int = 0
    """Its first turn of those that nobody else's interrupted."""
    held: bool = False
    """What is kept there surely is this tenant's."""
    busy: int = 0
    used: int = 0
    """The turn that took it last; 0: nobody yet."""
    text: str = ""
    leaving_until_s: float = 0.0


class Slots:
    """Of one runner. `copies`: it keeps prompts in memory beside its slots."""

    def __init__(self, count: int, *, copies: bool) -> None:
        self._copies = copies
        self._first = ""
        self._shared = False
        """More than one tenant has come."""
        self._slots = [_Slot() for _ in range(count)]
        self._turn = 0

    def take(self, tenant: str, text: str, now_s: float) -> Seat:
        """`tenant`: empty for what the node itself asks. `text`: the prompt's beginning. To be given back
        with `leave`; both are told the time."""
        self._turn += 1
        self._first = self._first or tenant
        self._shared = self._shared or bool(tenant and tenant != self._first)
        number = min(range(len(self._slots)), key=lambda one: self._rank(one, tenant, text, now_s))
        slot = self._slots[number]
        if slot.tenant != tenant or not slot.used:
            slot.held = not slot.used  # nobody has left anything there
            slot.tenant, slot.since = tenant, self._turn
        clean = self._shared if self._copies else not slot.held
        alone = not slot.busy and now_s >= slot.leaving_until_s
        seat = Seat(number, clean, self._turn, alone)
        slot.text, slot.used = text, self._turn
        slot.busy += 1
        return seat

    def leave(self, seat: Seat, now_s: float, *, whole: bool) -> None:
        """`whole`: it had its whole answer."""
        slot = self._slots[seat.slot]
        slot.busy -= 1
        if not whole:
            slot.leaving_until_s = now_s + LEAVING_S
        elif seat.alone and seat.turn >= slot.since:
            slot.held = True

    def _rank(self, number: int, tenant: str, text: str, now_s: float) -> tuple[float, ...]:
        """The idle first; of those which keep most pages of the prompt, the one that leaves the fewest
        groups; of those which keep something of it; else one that nobody has used, its own, another's; of
        those which waited longest."""
        slot = self._slots[number]
        own = slot.tenant == tenant
        shared = _shared(slot.text, text) if own and slot.used else 0
        found = shared if shared >= SIMILAR * len(text) else 0
        whose = 0 if not slot.used else 1 if own else 2
        leaving = now_s < slot.leaving_until_s
        return slot.busy, leaving, -(shared // PAGE), -self._neighbours(number), -found, whose, slot.used

    def _neighbours(self, number: int) -> int:
        """Beside it that work: one makes a group longer, two make one of two."""
        return sum(
            self._slots[one].busy > 0 for one in (number - 1, number + 1) if 0 <= one < len(self._slots)
        )


def _shared(one: str, other: str) -> int:
    """Characters that both begin with."""
    least, most = 0, min(len(one), len(other))
    while least + PAGE <= most and one[least : least + PAGE] == other[least : least + PAGE]:
        least += PAGE
    most = min(most, least + PAGE)
    while least < most:
        middle = (least + most + 1) // 2
        if one[least:middle] == other[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least


def beginning(request: CompletionRequest | ChatRequest) -> str:
    """As text, whatever it is made of: to be compared, and for nothing else."""
    if isinstance(request, ChatRequest):
        return "\n".join([message.content for message in request.messages])[:COMPARED]
    prompt = request.prompt
    if isinstance(prompt, str):
        return prompt[:COMPARED]
    return msgspec.json.encode(prompt)[:COMPARED].decode("latin-1")
