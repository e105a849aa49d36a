"""Decides what a request's options come to (pure).

Precedence: built-in defaults < Modelfile PARAMETER < request. Per-request options become a
complete `Sampling`, load-time options a `Shape`; requests whose shapes a runner `serves`
share it, any other reloads it. Source: Ollama `api/types.go` DefaultOptions, `sched.go`
needsReload.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import msgspec

from ollama_distributed.base.errors import Invalid
from ollama_distributed.base.inference import LoadOptions, Sampling
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.serving.ports import LoadPlan

DEFAULTS = Sampling(
    temperature=0.8,
    top_k=40,
    top_p=0.9,
    min_p=0.0,
    typical_p=1.0,
    repeat_last_n=64,
    repeat_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    seed=-1,
    num_predict=-1,
    num_keep=4,
    stop=(),
    logit_bias={},
    ignore_eos=False,
)
"""Ollama's built-in defaults."""

MIN_CONTEXT_TOKENS = 4
MIN_VISION_CONTEXT_TOKENS = 2048
"""An image alone may take more than a thousand tokens."""

DEFAULT_BATCH = 256
"""Prompt tokens a step. Above, a long prompt stalls the other streams: 512 for 2.0 s."""


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """Settings that shape loads."""

    context_tokens: int = 4096
    """Context of one slot when neither request nor Modelfile say (OLLAMA_CONTEXT_LENGTH)."""
    slots: int = 4
    """Requests that run at once in one model (OLLAMA_NUM_PARALLEL)."""
    kv_type: Literal["f16", "q8_0", "q4_0"] = "f16"
    flash_attention: bool | None = None


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What a loaded model must be like for a request."""

    context_tokens: int
    slots: int
    """Most slots; fewer are taken when memory is short."""
    batch: int = DEFAULT_BATCH
    gpu_layers: int = -1
    main_gpu: int = 0
    use_mmap: bool | None = None
    """None: not asked for."""
    threads: int = 0
    """0: a share of the cores."""
    kv_type: Literal["f16", "q8_0", "q4_0"] = "f16"
    flash_attention: bool | None = None


def input_limit(spec: ModelSpec, asked: LoadOptions, context_tokens: int) -> int:
    """Most tokens of an embedding input: what the request or the Modelfile allow."""
    wanted = _rows(spec.parameters, LoadOptions).num_ctx if asked.num_ctx is None else asked.num_ctx
    return context_tokens if wanted is None else min(wanted, context_tokens)


def model_sampling(parameters: Mapping[str, Any]) -> Sampling:
    """Built-in defaults under the model's own; rows of other kinds are passed over.

    Raises:
        Invalid: a PARAMETER has the wrong type.
    """
    return overlay(DEFAULTS, _rows(parameters, Sampling))


_UNASKED = Sampling()


def overlay(base: Sampling, asked: Sampling) -> Sampling:
    """`asked` over `base`: what is asked for wins."""
    if asked == _UNASKED:
        return base
    changes = {
        name: value for name in Sampling.__struct_fields__ if (value := getattr(asked, name)) is not None
    }
    return msgspec.structs.replace(base, **changes)


def shape_of(spec: ModelSpec, asked: LoadOptions, rules: Rules) -> Shape:
    """The load that this request needs.

    Raises:
        Invalid: a PARAMETER has the wrong type.
    """
    rows = _rows(spec.parameters, LoadOptions)

    def pick(name: str) -> Any:
        value = getattr(asked, name)
        return getattr(rows, name) if value is None else value

    context = max(asked.num_ctx or rows.num_ctx or rules.context_tokens, MIN_CONTEXT_TOKENS)
    if "vision" in spec.capabilities:
        context = max(context, MIN_VISION_CONTEXT_TOKENS)
    if spec.architecture.context_tokens:
        context = min(context, spec.architecture.context_tokens)
    batch = max(pick("num_batch") or DEFAULT_BATCH, 1)
    if reads_whole_inputs(spec):
        # A small `num_ctx` cuts the inputs; the runner takes what is usual, and stays.
        usual = min(rules.context_tokens, spec.architecture.context_tokens or rules.context_tokens)
        context = max(context, usual)
        # Embedding and rerank models must see an input in one step, else the runner fails it.
        batch = context
    threads = pick("num_thread")
    gpu_layers = pick("num_gpu")
    return Shape(
        context_tokens=context,
        slots=rules.slots,
        batch=min(batch, context),
        gpu_layers=-1 if gpu_layers is None or gpu_layers < 0 else gpu_layers,
        main_gpu=pick("main_gpu") or 0,
        use_mmap=pick("use_mmap"),
        threads=max(threads or 0, 0),
        kv_type=rules.kv_type,
        flash_attention=rules.flash_attention,
    )


def reads_whole_inputs(spec: ModelSpec) -> bool:
    return "completion" not in spec.capabilities or spec.pooling not in ("", "none")


def serves(loaded: Shape, wanted: Shape) -> bool:
    """Whether a runner loaded as `loaded` can take a request that wants `wanted`.

    "As many GPU layers as fit" and "no opinion on mmap" are content with whatever there is.
    """
    if loaded is wanted or loaded == wanted:
        return True
    return loaded == msgspec.structs.replace(
        wanted,
        gpu_layers=loaded.gpu_layers if wanted.gpu_layers < 0 else wanted.gpu_layers,
        use_mmap=loaded.use_mmap if wanted.use_mmap is None else wanted.use_mmap,
    )


def plan_of(shape: Shape, *, slots: int, threads: int) -> LoadPlan:
    return LoadPlan(
        slots=slots,
        context_tokens=shape.context_tokens,
        threads=threads,
        batch=shape.batch,
        gpu_layers=shape.gpu_layers,
        main_gpu=shape.main_gpu,
        use_mmap=True if shape.use_mmap is None else shape.use_mmap,
        kv_type=shape.kv_type,
        flash_attention=shape.flash_attention,
    )


_OptionsT = TypeVar("_OptionsT", Sampling, LoadOptions)


def _rows(parameters: Mapping[str, Any], kind: type[_OptionsT]) -> _OptionsT:
    """The PARAMETER rows that `kind` has fields for, typed."""
    chosen = {name: parameters[name] for name in kind.__struct_fields__ if name in parameters}
    try:
        return msgspec.convert(chosen, kind)
    except msgspec.ValidationError as exc:
        raise Invalid(f"the model has a PARAMETER of the wrong type: {exc}") from exc
