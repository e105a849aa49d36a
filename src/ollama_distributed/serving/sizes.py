"""Memory of a model before it is loaded, and what would fit instead (pure)."""

from __future__ import annotations

from collections.abc import Callable

from ollama_distributed.models import memory
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.serving.options import Shape
from ollama_distributed.serving.plan import mib
from ollama_distributed.serving.ports import LoadPlan

Estimate = Callable[[ModelSpec, LoadPlan], int]
"""Memory in bytes that a model takes when it is loaded so."""


def estimate_bytes(spec: ModelSpec, plan: LoadPlan) -> int:
    """0 for a model that another server holds."""
    if spec.remote is not None:
        return 0
    return memory.estimate(
        spec.architecture,
        weights_bytes=files_bytes(spec),
        context_tokens=plan.context_tokens,
        slots=plan.slots,
        kv_type=plan.kv_type,
        batch=plan.batch,
        flash_attention=plan.flash_attention is not False,
    ).total_bytes


def what_fits(spec: ModelSpec, shape: Shape, memory_bytes: int) -> str:
    """The second half of a refusal: what the user can do."""
    fit = memory.largest_fit(
        spec.architecture,
        memory_bytes=memory_bytes,
        weights_bytes=files_bytes(spec),
        context_tokens=shape.context_tokens,
        slots=1,
        kv_type=shape.kv_type,
        batch=shape.batch,
        flash_attention=shape.flash_attention is not False,
    )
    if fit is not None:
        return f"it fits with num_ctx {fit.context_tokens} ({mib(fit.need.total_bytes)} MiB)"
    return "use a smaller model or a smaller quantisation"


def files_bytes(spec: ModelSpec) -> int:
    """Weights, projectors and adapters; the manifest's sum holds them all."""
    return max(spec.weights_bytes, spec.size_bytes)
