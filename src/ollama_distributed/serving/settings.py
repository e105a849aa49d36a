"""What the node tells serving."""

from __future__ import annotations

import msgspec

from ollama_distributed.serving.options import Rules


class ServingSettings(msgspec.Struct, frozen=True, kw_only=True):
    rules: Rules = Rules()
    keep_alive_s: float = 300.0
    """How long an idle model stays loaded; negative: for ever. 5 min as in Ollama."""
    max_loaded_models: int = 3
    """As Ollama on a CPU."""
    max_queue: int = 512
    """Requests that wait for a slot or a load; the next is refused. As Ollama."""
    queue_timeout_s: float = 1800.0
    """Longest wait for a slot, loads included: a queue must not hold a request for ever."""
    load_timeout_s: float = 300.0
    """A load that makes no progress for so long failed. As Ollama."""
    unload_timeout_s: float = 10.0
    """After it a runner that will not end is given up; the engine kills after its grace of 2 s."""
    quiet_s: float = 2.0
    """A busy runner that was silent for so long is asked whether it is healthy."""
    memory_limit_bytes: int = 0
    """For loaded models; 0: what is free when none is loaded, less the reserve."""
    memory_reserve_bytes: int = 512 << 20
    """Left free for the node and its neighbours when no limit is set."""
    threads: int = 0
    """CPU threads for all runners; 0: the physical cores."""
