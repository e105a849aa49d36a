"""Estimates the memory of a model before it is loaded, and what would fit.

weights + KV cache for slots x context + compute buffers + the runner itself. The
estimate is an upper bound: sliding windows and recurrent layers need less. Seen with
SmolLM2-135M on the wheel (resident after a 600-token prompt, estimate; MiB): 1 slot of
2,048 tokens 201, 259; 4 of 8,192 876, 938; the same with q8_0 539, 601.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from ollama_distributed.models.spec import Architecture

KvType = Literal["f16", "q8_0", "q4_0"]

_KV_BLOCK: dict[KvType, tuple[int, int]] = {"f16": (1, 2), "q8_0": (32, 34), "q4_0": (32, 18)}
"""Numbers in a block -> bytes of it."""

_FLOAT_BYTES = 4
_BATCH_COPIES = 12
"""Copies of a batch's activations that a graph holds at once (attention and feed-forward)."""
RUNNER_BYTES = 64 << 20
"""A runner process without a model: Python and the engine's library (seen: 54 MiB)."""
SLOT_BYTES = 1 << 20
"""Sampler and its table of candidates per slot; the vocabulary comes on top."""

CONTEXT_STEP = 256
"""llama.cpp rounds a context up to this."""
NO_MACHINE_BYTES = 1 << 60
"""More memory than any machine has: numbers of a header that lies multiply to far more, past 64 bits."""
LEAST_CONTEXT = 512
"""A shorter context serves no conversation; offering it helps nobody."""


class MemoryNeed(msgspec.Struct, frozen=True, kw_only=True):
    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    runner_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.compute_bytes + self.runner_bytes


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    slots: int
    context_tokens: int
    """Of one slot."""
    need: MemoryNeed


def kv_bytes_per_token(architecture: Architecture, kv_type: KvType = "f16") -> int:
    """Keys and values of one token in all layers (grouped heads share theirs)."""
    block, size = _KV_BLOCK[kv_type]
    numbers = architecture.kv_heads * (architecture.key_length + architecture.value_length)
    return architecture.layers * -(-numbers // block) * size


def estimate(
    architecture: Architecture,
    *,
    weights_bytes: int,
    context_tokens: int,
    slots: int = 1,
    kv_type: KvType = "f16",
    batch: int = 256,
    flash_attention: bool = True,
) -> MemoryNeed:
    """Memory of a runner. `weights_bytes`: files of model, projectors and adapters together.

    `context_tokens` is that of one slot. Grows with each argument, and without flash attention
    (the default of the engine where it can), which keeps no table of scores.
    """
    context = -(-context_tokens // CONTEXT_STEP) * CONTEXT_STEP
    logits = architecture.vocabulary * _FLOAT_BYTES
    activations = _BATCH_COPIES * max(architecture.embedding_length, 1) * _FLOAT_BYTES
    scores = 0 if flash_attention else architecture.heads * slots * context * _FLOAT_BYTES
    return MemoryNeed(
        weights_bytes=weights_bytes,
        kv_bytes=min(slots * context * kv_bytes_per_token(architecture, kv_type), NO_MACHINE_BYTES),
        compute_bytes=min(batch * (logits + activations + scores), NO_MACHINE_BYTES),
        runner_bytes=min(RUNNER_BYTES + slots * (SLOT_BYTES + 3 * logits), NO_MACHINE_BYTES),
    )


def largest_fit(
    architecture: Architecture,
    *,
    memory_bytes: int,
    weights_bytes: int,
    context_tokens: int,
    slots: int = 1,
    kv_type: KvType = "f16",
    batch: int = 256,
    flash_attention: bool = True,
) -> Fit | None:
    """The most of what was asked that fits into `memory_bytes`; None when nothing does.

    Gives up slots before context: a request that fits nowhere fails, one that waits does not.
    """

    def need(some_slots: int, context: int) -> MemoryNeed:
        return estimate(
            architecture,
            weights_bytes=weights_bytes,
            context_tokens=context,
            slots=some_slots,
            kv_type=kv_type,
            batch=batch,
            flash_attention=flash_attention,
        )

    for some_slots in range(slots, 0, -1):
        if need(some_slots, context_tokens).total_bytes <= memory_bytes:
            return Fit(slots=some_slots, context_tokens=context_tokens, need=need(some_slots, context_tokens))
    low, high = 0, context_tokens // CONTEXT_STEP
    while low < high:
        middle = (low + high + 1) // 2
        if need(1, middle * CONTEXT_STEP).total_bytes <= memory_bytes:
            low = middle
        else:
            high = middle - 1
    context = low * CONTEXT_STEP
    if context < LEAST_CONTEXT:
        return None
    return Fit(slots=1, context_tokens=context, need=need(1, context))
