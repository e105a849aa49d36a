"""What a runner is started with: plan and model in, typed parameters out. Pure.

`RunnerParams` is the whole allow-list for both ways to run llama.cpp: `runner.py` sets
them on the wheel's parameters, `binary.py` writes them as argv. What is not named here
stays off (security table S-13): slot files, tools, media folders, UI, property changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from ollama_distributed.base.errors import Unsupported
from ollama_distributed.models.spec import ModelSpec
from ollama_distributed.serving.ports import LoadPlan

RUNNER_ENVIRONMENT = {
    # A backtrace starts a debugger on the child and can hang it (trap 5).
    "GGML_NO_BACKTRACE": "1",
    # KV caches in huge pages, where the kernel gives them to who asks: 3 % more tokens/s at eight streams.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
CACHE_RAM_MIB = 512
"""Prompts kept in memory per runner; llama.cpp's own default is 8,192 (trap 7)."""
MAX_BATCH = 256
"""Prompt tokens per step: 2,048 stalls the other streams for 5.7 s, 256 for about 1 s
(trap 3), and a cancel waits as long (trap 2)."""
MAX_CPU_BATCH = 128
"""Without a GPU: 0.66 s, for a prompt that is read 8 % slower."""
POLL = 0
"""How long a compute thread without work spins for more before it sleeps; llama.cpp's 50 is 170 ms.
Others need the core in that time: the node, which passes on the token that was just made, and the
runners of other models. The wheel's threads are OpenMP's, which do not ask."""
DEFAULT_EMBEDDING_TOKENS = 512
"""Longest input of an embedding model whose header does not say."""

PASSED_ENVIRONMENT = frozenset(
    {
        *("PATH", "LANG", "LC_ALL", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"),
        *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES"),
        *("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HSA_OVERRIDE_GFX_VERSION"),
        *("GGML_VK_VISIBLE_DEVICES", "GGML_CUDA_ENABLE_UNIFIED_MEMORY", "ONEAPI_DEVICE_SELECTOR"),
    }
)
"""Where programs, libraries and GPUs are; nothing that could hold a secret."""


class RunnerParams(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    projector: str = ""
    loras: tuple[str, ...] = ()
    alias: str
    context_tokens: int
    """Of all slots together."""
    slots: int
    threads: int
    poll: int = POLL
    http_threads: int
    batch: int
    ubatch: int
    gpu_layers: int
    """Negative: as many as fit."""
    main_gpu: int
    use_mmap: bool
    kv_type: Literal["f16", "q8_0", "q4_0"]
    flash_attention: bool | None
    context_shift: bool
    pooling: Literal["", "none", "mean", "cls", "last", "rank"]
    """Empty: a model that generates."""
    chat_template: str
    """Jinja; empty: the model's own."""
    cache_ram_mib: int
    socket: str
    """Path; llama-server takes a host for a UNIX socket when it ends in `.sock`."""
    api_key: str


class Guard(msgspec.Struct, frozen=True, kw_only=True):
    """Limits that the child puts on itself."""

    parent_pid: int
    address_space_bytes: int | None = None
    """None: no limit. GPU drivers map far more than they use."""
    open_files: int = 1024


def runner_params(
    model: ModelSpec,
    plan: LoadPlan,
    *,
    socket: str,
    api_key: str,
    gpu: bool = False,
    cache_ram_mib: int = CACHE_RAM_MIB,
) -> RunnerParams:
    """How to start the runner of `model` as `plan` says. `gpu`: the program sees one.

    Raises:
        Unsupported: the model cannot run here as described.
    """
    if not model.weights:
        raise Unsupported(f"{model.display} has no weights on this machine")
    if len(model.projectors) > 1:
        raise Unsupported(f"{model.display} has {len(model.projectors)} projectors; llama.cpp takes one")
    batch = min(max(plan.batch, 1), MAX_BATCH if gpu and plan.gpu_layers != 0 else MAX_CPU_BATCH)
    if model.pooling:
        # Such a model sees its whole input at once, so the step must hold it (trap 6).
        batch = min(plan.context_tokens, model.architecture.context_tokens or DEFAULT_EMBEDDING_TOKENS)
    # llama.cpp ends itself where a step cannot hold a token of each slot, and for a model that
    # reads whole inputs where the step is not shared evenly.
    batch = -(-batch // plan.slots) * plan.slots if model.pooling else max(batch, plan.slots)
    return RunnerParams(
        model=model.weights,
        projector=model.projectors[0] if model.projectors else "",
        loras=model.adapters,
        alias=model.display,
        context_tokens=plan.slots * plan.context_tokens,
        slots=plan.slots,
        threads=plan.threads,
        # One thread is taken by each stream; the rest answers health, tokenize and cancelled peers.
        http_threads=2 * plan.slots + 8,
        batch=batch,
        ubatch=batch,
        gpu_layers=plan.gpu_layers,
        main_gpu=plan.main_gpu,
        use_mmap=plan.use_mmap,
        kv_type=plan.kv_type,
        flash_attention=plan.flash_attention,
        context_shift=not model.pooling,
        pooling=model.pooling,
        chat_template=model.chat_template,
        cache_ram_mib=cache_ram_mib,
        socket=socket,
        api_key=api_key,
    )


def scrubbed(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a runner."""
    return {k: v for k, v in environment.items() if k in PASSED_ENVIRONMENT} | RUNNER_ENVIRONMENT
