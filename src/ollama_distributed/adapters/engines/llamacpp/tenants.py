"""Which slot of a runner a request gets, so that no tenant finds what another's prompt left.

While one tenant alone uses a runner, llama.cpp chooses: it finds the slot, or the copy in memory,
that read the prompt's beginning. From the first request of a second tenant on we choose: each slot
belongs to the tenant that used it last, and one that changes hands forgets first. The copies in memory
are shared by all slots, also by a request that names its own (tried): a runner that keeps some serves
several tenants without looking back at all. Pure.

Sources: PROMPTPEEK (NDSS 2025); vLLM CVE-2025-46570 (time to first token tells a prefix hit).
"""

from __future__ import annotations

from typing import Any

import msgspec

from ollama_distributed.serving.ports import ChatRequest, CompletionRequest

COMPARED = 4_096
"""Characters of a prompt's beginning that tell which slot of a tenant has read most of it."""


class Seat(msgspec.Struct, frozen=True):
    slot: int
    """Negative: whichever llama.cpp takes."""
    clean: bool
    """What is kept there may be somebody else's: nothing of it is used."""

    @property
    def fields(self) -> dict[str, Any]:
        """Of the request to llama.cpp."""
        named = {"id_slot": self.slot} if self.slot >= 0 else {}
        return {**named, "cache_prompt": False} if self.clean else named


ANY = Seat(-1, clean=False)
CLEAN = Seat(-1, clean=True)


class _Slot(msgspec.Struct):
    tenant: str
    busy: int = 0
    used: int = 0
    text: str = ""


class Slots:
    """Of one runner. `copies`: it keeps prompts in memory beside its slots."""

    def __init__(self, count: int, *, copies: bool) -> None:
        self._count = count
        self._copies = copies
        self._first = ""
        self._slots: list[_Slot] = []
        """Empty while there is one tenant."""
        self._turn = 0

    def take(self, tenant: str, text: str) -> Seat:
        """`text`: the prompt's beginning. To be given back with `leave`."""
        if not self._slots:
            if self._first in ("", tenant):
                self._first = tenant
                return ANY
            self._slots = [_Slot(self._first) for _ in range(self._count)]
        if self._copies:
            return CLEAN
        self._turn += 1
        number = min(range(self._count), key=lambda one: self._rank(self._slots[one], tenant, text))
        slot = self._slots[number]
        clean = slot.tenant != tenant
        slot.tenant, slot.text, slot.used = tenant, text, self._turn
        slot.busy += 1
        return Seat(number, clean)

    def leave(self, seat: Seat) -> None:
        if seat.slot >= 0:
            self._slots[seat.slot].busy -= 1

    @staticmethod
    def _rank(slot: _Slot, tenant: str, text: str) -> tuple[int, bool, int, int]:
        """The idle first; of those the tenant's own that read most of it; else who waited longest."""
        own = slot.tenant == tenant
        shared = _shared(slot.text, text) if own else 0
        return slot.busy, not own, -shared, slot.used


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
