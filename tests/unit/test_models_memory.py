"""The memory estimate: monotone, and what it says fits does fit."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from ollama_distributed.models.memory import (
    CONTEXT_STEP,
    LEAST_CONTEXT,
    estimate,
    kv_bytes_per_token,
    largest_fit,
)
from ollama_distributed.models.spec import Architecture

SMOL = Architecture(
    name="llama",
    layers=30,
    context_tokens=8192,
    embedding_length=576,
    heads=9,
    kv_heads=3,
    key_length=64,
    value_length=64,
    parameters=134_515_008,
    file_type="Q4_1",
    vocabulary=49_152,
)
architectures = st.builds(
    Architecture,
    name=st.just("llama"),
    layers=st.integers(1, 200),
    context_tokens=st.integers(0, 1 << 20),
    embedding_length=st.integers(0, 20_000),
    heads=st.integers(0, 200),
    kv_heads=st.integers(0, 64),
    key_length=st.integers(0, 512),
    value_length=st.integers(0, 512),
    parameters=st.just(1),
    file_type=st.just("F16"),
    vocabulary=st.integers(0, 300_000),
)
kv_types = st.sampled_from(["f16", "q8_0", "q4_0"])


def test_kv_of_a_known_model() -> None:
    assert kv_bytes_per_token(SMOL) == 30 * 3 * 128 * 2
    assert kv_bytes_per_token(SMOL, "q8_0") == 30 * 3 * 128 * 34 // 32
    need = estimate(SMOL, weights_bytes=100, context_tokens=2048, slots=4)
    assert need.kv_bytes == 4 * 2048 * 23_040
    assert need.total_bytes == need.weights_bytes + need.kv_bytes + need.compute_bytes + need.runner_bytes


def test_the_estimate_lies_above_what_was_seen_and_not_far() -> None:
    """Resident MiB of a runner with SmolLM2-135M Q4_1 after a 600-token prompt (the wheel, CPU)."""
    for slots, context, kv, seen in ((1, 2048, "f16", 201), (4, 8192, "f16", 876), (4, 8192, "q8_0", 539)):
        asked: dict[str, Any] = {"context_tokens": context, "slots": slots, "kv_type": kv}
        need = estimate(SMOL, weights_bytes=98_362_432, **asked).total_bytes / (1 << 20)
        assert seen < need < 1.35 * seen, (slots, context, kv, need)


@given(architectures, st.integers(1, 16), st.integers(1, 200_000), kv_types)
def test_more_never_needs_less(architecture: Architecture, slots: int, context: int, kv: Any) -> None:
    def total(**changes: Any) -> int:
        asked: dict[str, Any] = {
            "weights_bytes": 10,
            "context_tokens": context,
            "slots": slots,
            "kv_type": kv,
        }
        return estimate(architecture, **(asked | changes)).total_bytes

    assert total() <= total(slots=slots + 1)
    assert total() <= total(context_tokens=context + 1)
    assert total() < total(weights_bytes=11)
    assert total() <= total(batch=512)
    assert total() <= total(flash_attention=False)
    if kv == "q4_0":
        # A row of a few numbers pads to a block; real rows have 64 and more.
        wide = msgspec.structs.replace(architecture, key_length=64, value_length=64)
        assert (
            kv_bytes_per_token(wide, "q4_0") <= kv_bytes_per_token(wide, "q8_0") <= kv_bytes_per_token(wide)
        )


@given(
    architectures,
    st.integers(1, 8),
    st.integers(CONTEXT_STEP, 100_000),
    st.integers(0, 200 << 30),
    kv_types,
)
def test_what_is_said_to_fit_fits_and_is_the_most(
    architecture: Architecture, slots: int, context: int, memory: int, kv: Any
) -> None:
    def total(some_slots: int, some_context: int) -> int:
        return estimate(
            architecture, weights_bytes=1 << 20, context_tokens=some_context, slots=some_slots, kv_type=kv
        ).total_bytes

    fit = largest_fit(
        architecture,
        memory_bytes=memory,
        weights_bytes=1 << 20,
        context_tokens=context,
        slots=slots,
        kv_type=kv,
    )
    if fit is None:
        assert total(1, min(context, LEAST_CONTEXT)) > memory or context < LEAST_CONTEXT
        return
    assert fit.need.total_bytes <= memory
    assert 1 <= fit.slots <= slots
    assert fit.context_tokens <= context
    if fit.slots < slots and fit.context_tokens == context:
        assert total(fit.slots + 1, context) > memory
    if fit.context_tokens < context:
        assert fit.slots == 1
        assert total(1, min(context, fit.context_tokens + CONTEXT_STEP)) > memory
