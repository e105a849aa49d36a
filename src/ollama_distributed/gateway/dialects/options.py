"""The `options` extension: any Ollama option on every dialect, and `keep_alive`.

The dialect's own field wins over the option of the same meaning.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from ollama_distributed.base.errors import Invalid
from ollama_distributed.base.inference import LoadOptions, Sampling
from ollama_distributed.gateway.dialects.fields import INT_MAX, SEED_MAX, stops, within


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Ollama's `options` object; unknown ones are ignored."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_last_n: int | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    num_predict: int | None = None
    num_keep: int | None = None
    stop: str | list[str] | None = None
    num_ctx: int | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    main_gpu: int | None = None
    use_mmap: bool | None = None
    num_thread: int | None = None


_SAMPLING = tuple(n for n in Sampling.__struct_fields__ if n in Options.__struct_fields__ and n != "stop")
_NO_LOAD_OPTIONS = LoadOptions()


def sampling(options: Options | None, **own: Any) -> Sampling:
    """The sampling asked for: `own` (the dialect's fields) before `options`."""
    asked = {name: value for name, value in own.items() if value is not None}
    if options is not None:
        for name in _SAMPLING:
            value = getattr(options, name)
            if value is not None and name not in asked:
                asked[name] = within(
                    f"options.{name}", value, -INT_MAX, SEED_MAX if name == "seed" else INT_MAX
                )
        if "stop" not in asked:
            asked["stop"] = stops("options.stop", options.stop)
    if asked.get("seed", 0) > INT_MAX:
        asked["seed"] &= INT_MAX
    return Sampling(**asked)


def load_options(options: Options | None) -> LoadOptions:
    if options is None:
        return _NO_LOAD_OPTIONS
    return LoadOptions(
        num_ctx=within("options.num_ctx", options.num_ctx, 0, INT_MAX) or None,
        num_batch=within("options.num_batch", options.num_batch, 0, INT_MAX) or None,
        num_gpu=options.num_gpu,
        main_gpu=options.main_gpu,
        use_mmap=options.use_mmap,
        num_thread=within("options.num_thread", options.num_thread, 0, 1024) or None,
    )


_DURATION = re.compile(
    r"(?P<sign>[-+]?)(?P<parts>(?:(?:\d+\.?\d*|\.\d+)(?:ns|us|µs|μs|ms|s|m|h))+|0)", re.ASCII
)
_PART = re.compile(r"(?P<number>\d+\.?\d*|\.\d+)(?P<unit>ns|us|µs|μs|ms|s|m|h)", re.ASCII)
_UNIT_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def keep_alive_s(value: str | float | None) -> float | None:
    """Seconds from Ollama's `keep_alive`: a number of seconds, or a Go duration (`5m`, `-1s`)."""
    if value is None or not isinstance(value, str):
        return None if value is None else float(value)
    match = _DURATION.fullmatch(value.strip())
    if not match:
        raise Invalid(
            f'keep_alive must be seconds or a duration such as "5m" or "-1s", got "{value}"',
            param="keep_alive",
        )
    seconds = sum(float(part["number"]) * _UNIT_S[part["unit"]] for part in _PART.finditer(match["parts"]))
    return -seconds if match["sign"] == "-" else seconds
